import math

import pytest
import torch

from distill import DIITO, DKD, KD, DistillError, Labels, Rows, Schedule, steps
from distill.losses import LogitNoise, dkd, reverse_kl, squared_error
from distill.objectives import Moment
from distill.training.computation import Computation
from tests.distill.tiny_models import CLASSES, bert, gpt2_lm, masked_lm, mlp, same, spread, t5, text, vectors, weights

SHORT = Schedule(steps=2, batch_size=6)


def terms(teacher, student, objective, batch):
    return Computation(teacher, student, (), [objective])(batch, torch.Generator())


class Fixed(torch.nn.Module):
    """Answers the same whatever it is asked."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, inputs):
        return self.logits.expand(len(inputs), *self.logits.shape)


BATCH = {"inputs": torch.zeros(2, 1), "labels": torch.tensor([0, 1])}


def test_kd_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2): 0.75 ln 1.5 + 0.25 ln 0.5 at temperature 1."""
    teacher, student = Fixed(math.log(3), 0.0), Fixed(0.0, 0.0)
    value = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert terms(teacher, student, KD(1), BATCH)["kd"].item() == pytest.approx(value, rel=1e-6)
    assert terms(teacher, student, KD(1, reduction="mean"), BATCH)["kd"].item() == pytest.approx(value / 2, rel=1e-6)
    hotter = Fixed(2 * math.log(3), 0.0)
    assert terms(hotter, student, KD(2.0), BATCH)["kd"].item() == pytest.approx(4 * value, rel=1e-6)
    assert terms(hotter, student, KD(2.0, scale_t2=False), BATCH)["kd"].item() == pytest.approx(value, rel=1e-6)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    found = terms(teacher, student, KD(1, divergence=reverse_kl), BATCH)["kd"].item()
    assert found == pytest.approx(reverse, rel=1e-6)


def test_kd_reaches_the_student_alone():
    teacher, student = spread(mlp()), spread(mlp(), 1)
    terms(teacher, student, KD(), vectors().batch(range(4)))["kd"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad.norm() > 0 for p in student.parameters())


@pytest.mark.parametrize("make", [gpt2_lm, masked_lm])
def test_kd_of_token_models_leaves_padding_out(make):
    teacher, student = spread(make(2)), spread(make(2), 1)
    batch = text(6).batch(range(6))
    value = terms(teacher, student, KD(1), batch)["kd"]
    logits = [
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for model in (teacher, student)
    ]
    p, q = (each.log_softmax(-1) for each in logits)
    each = (p.exp() * (p - q)).sum(-1)
    real = batch["attention_mask"].bool()
    assert value.item() == pytest.approx(each[real].mean().item(), rel=1e-5)
    assert value.item() != pytest.approx(each.mean().item(), rel=1e-3)


def test_labels_by_hand():
    student = Fixed(math.log(3), 0.0)
    assert terms(None, student, Labels(), BATCH)["labels"].item() == pytest.approx(
        -(math.log(0.75) + math.log(0.25)) / 2
    )
    left_out = {**BATCH, "labels": torch.tensor([0, -100])}
    assert terms(None, student, Labels(), left_out)["labels"].item() == pytest.approx(-math.log(0.75))


def test_labels_of_tokens():
    model = spread(masked_lm(2))
    rows = Rows({**text(4, 5, 5).table, "labels": torch.tensor([[-100, 7, -100, -100, -100]] * 4)})
    batch = rows.batch(range(4))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = -logits[:, 1].log_softmax(-1)[:, 7].mean()
    assert terms(None, model, Labels(), batch)["labels"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_they_refuse():
    for wrong in (0, -1.0, math.inf):
        with pytest.raises(DistillError, match=r"softens nothing; use a temperature above 0, e.g. KD\(2.0\)"):
            KD(wrong)
    with pytest.raises(
        DistillError, match=r"needs a column 'labels' and the data has input_ids, .*leave Labels\(\) out"
    ):
        terms(None, bert(2), Labels(), text(labels=False).batch([0]))
    with pytest.raises(DistillError, match=r"no teacher|there is none; use objective=\[Labels\(\)\]"):
        terms(None, bert(2), KD(), text().batch([0]))


# --- kinds of answers -------------------------------------------------------------------------------------------------


def several(rows=8):
    draw = torch.Generator().manual_seed(0)
    return Rows(
        {
            "inputs": torch.randn(rows, 6, generator=draw),
            "labels": torch.randint(2, (rows, CLASSES), generator=draw).float(),
        }
    )


def binary_kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_several_labels_an_example_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2), each a yes or no: the mean of two equal divergences."""
    batch = {"inputs": torch.zeros(2, 1), "labels": torch.tensor([[1.0, 0.0], [0.0, 0.0]])}
    teacher, student = Fixed(math.log(3), -math.log(3)), Fixed(0.0, 0.0)
    expected = (binary_kl(0.75, 0.5) + binary_kl(0.25, 0.5)) / 2
    assert terms(teacher, student, KD(1), batch)["kd"].item() == pytest.approx(expected, rel=1e-6)
    assert terms(teacher, student, KD(1, answers="classes"), batch)["kd"].item() != pytest.approx(expected, rel=1e-3)
    assert terms(teacher, student, Labels(), batch)["labels"].item() == pytest.approx(math.log(2), rel=1e-6)


def test_the_configuration_says_what_answers_are():
    teacher, student = spread(bert(2)), spread(bert(2), 1)
    batch = text(6).batch(range(6))
    classes = terms(teacher, student, KD(1), batch)["kd"].item()
    student.config.problem_type = "multi_label_classification"
    assert terms(teacher, student, KD(1), batch)["kd"].item() != pytest.approx(classes, rel=1e-3)
    assert terms(teacher, student, KD(1, answers="classes"), batch)["kd"].item() == classes


def test_real_values_by_hand():
    batch = {"inputs": torch.zeros(2, 1), "labels": torch.tensor([1.0, 3.0])}
    teacher, student = Fixed(2.5), Fixed(0.5)
    assert terms(teacher, student, KD(), batch)["kd"].item() == pytest.approx(4.0)
    assert terms(teacher, student, Labels(), batch)["labels"].item() == pytest.approx((0.25 + 6.25) / 2)
    two = {"inputs": torch.zeros(1, 1), "labels": torch.tensor([[5.0, -1.0]])}
    assert terms(Fixed(1.0, 1.0), Fixed(0.0, 0.0), KD(), two)["kd"].item() == pytest.approx(2.0)


def test_one_logit_and_whole_labels_must_be_told():
    batch = {"inputs": torch.zeros(2, 1), "labels": torch.tensor([0, 1])}
    with pytest.raises(DistillError, match=r"cannot tell whether one logit.*KD\(answers='labels'\)"):
        terms(Fixed(1.0), Fixed(0.5), KD(), batch)
    found = terms(Fixed(0.0), Fixed(0.0), Labels(answers="labels"), batch)["labels"].item()
    assert found == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("wrong", [lambda: KD(answers="class"), lambda: Labels(answers="number")])
def test_answers_that_do_not_exist(wrong):
    with pytest.raises(DistillError, match="is no kind of answers; use 'classes'"):
        wrong()


def test_squared_error_between_logits():
    found = terms(Fixed(1.0, 2.0), Fixed(0.0, 0.0), KD(divergence=squared_error), BATCH)["kd"].item()
    assert found == pytest.approx(5.0)


def test_a_divergence_of_classes_is_refused_for_several_labels():
    rows = several().batch(range(4))
    with pytest.raises(DistillError, match=r"KD\(divergence=reverse_kl\) compares classes"):
        terms(spread(mlp()), spread(mlp(), 1), KD(divergence=reverse_kl), rows)


def test_none_is_no_reduction_of_a_term():
    with pytest.raises(DistillError, match=r"KD\(reduction='none'\) is no scalar"):
        KD(reduction="none")


# --- labels -----------------------------------------------------------------------------------------------------------


def test_smoothing_by_hand():
    """p = (1/2, 1/4, 1/4), label 0, ε 0.3: 0.8 ln 2 + 0.2 ln 4."""
    student = Fixed(math.log(2), 0.0, 0.0)
    batch = {"inputs": torch.zeros(1, 1), "labels": torch.tensor([0])}
    found = terms(None, student, Labels(0.3), batch)["labels"].item()
    assert found == pytest.approx(0.8 * math.log(2) + 0.2 * math.log(4), rel=1e-6)


def test_labels_of_a_causal_model_must_not_be_its_own_tokens():
    rows = text(6, labels=False)
    data = Rows({**rows.table, "labels": rows.table["input_ids"]})
    with pytest.raises(DistillError, match=r"the labels are the tokens that this model reads.*use CausalLM\(\)"):
        list(steps(None, gpt2_lm(2), data=data, objective=Labels(), schedule=SHORT))
    list(steps(None, masked_lm(2), data=data, objective=Labels(), schedule=SHORT))  # reads both ways


def test_data_without_labels_drops_the_label_terms_and_says_so():
    teacher, student = spread(bert(2)), spread(bert(2), 1)
    with pytest.warns(UserWarning, match=r"no labels, so Labels\(\) is left out; what remains: KD"):
        records = list(
            steps(teacher, student, data=text(6, labels=False), objective=[KD(), Labels()], weights={"labels": 0.3},
                  schedule=SHORT)
        )  # fmt: skip
    assert records[0].terms.keys() == {"kd"}
    with pytest.raises(DistillError, match=r"Labels\(\) needs a column 'labels'.*objective=\[KD\(\)\]"):
        list(steps(teacher, student, data=text(6, labels=False), objective=Labels(), schedule=SHORT))


# --- DKD --------------------------------------------------------------------------------------------------------------


def test_dkd_is_its_loss_times_the_warm_up():
    teacher, student = spread(mlp()), spread(mlp(), 1)
    batch = vectors().batch(range(6))
    logits = [model(batch["inputs"]) for model in (student, teacher)]
    whole = dkd(*logits, batch["labels"], 2.0, 3.0, 5.0).item()
    computation = Computation(teacher, student, (), [DKD(2.0, 3.0, 5.0, warmup=4)])
    for epoch, share in ((0.0, 0.25), (0.99, 0.25), (1.0, 0.5), (3.5, 1.0), (9.0, 1.0)):
        found = computation(batch, torch.Generator(), Moment(epoch=epoch, epochs=10))["dkd"].item()
        assert found == pytest.approx(share * whole, rel=1e-6)
    assert terms(teacher, student, DKD(2.0, 3.0, 5.0, warmup=0), batch)["dkd"].item() == pytest.approx(whole)


def test_dkd_with_two_classes_warns_and_is_kd():
    teacher, student = spread(bert(2, labels=2)), spread(bert(2, labels=2), 1)
    rows = text(6)
    data = Rows({**rows.table, "labels": torch.tensor([0, 1, 1, 0, 1, 0])})
    with pytest.warns(UserWarning, match=r"DKD with 2 classes is 1.0 × KD\(4.0\)"):
        records = list(steps(teacher, student, data=data, objective=[KD(4.0), DKD(warmup=0)], schedule=SHORT))
    assert records[0].terms["dkd"] == pytest.approx(records[0].terms["kd"], rel=1e-5)


def test_a_warm_up_longer_than_the_training_warns():
    with pytest.warns(UserWarning, match=r"DKD\(warmup=20\) reaches its full weight after 20 epochs.*has 0.5"):
        list(steps(spread(mlp()), spread(mlp(), 1), data=vectors(), objective=DKD(), schedule=SHORT))


def test_dkd_needs_one_label_an_example():
    with pytest.raises(DistillError, match=r"DKD\(\) compares one label an example.*use KD\(\)"):
        terms(spread(mlp()), spread(mlp(), 1), DKD(warmup=0), several().batch(range(4)))


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [LogitNoise(0.0), LogitNoise(0.5, share=0.0)])
def test_no_noise_is_plain_kd_bit_for_bit(noise):
    runs = []
    for objective in (KD(), KD(teacher_noise=noise, student_noise=noise)):
        student = spread(bert(2, dropout=0.1), 1)
        records = list(steps(spread(bert(2)), student, data=text(12), objective=objective, schedule=SHORT))
        runs.append((records, weights(student)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


def test_noise_leaves_all_other_draws_alone():
    """DIITO draws the same pairs and positions, dropout the same units, with and without it."""
    teacher = spread(bert(3))
    found = []
    for noise in (None, LogitNoise(1.0)):
        student = spread(bert(2, dropout=0.1), 1)
        objective = [KD(student_noise=noise), DIITO()]
        running = steps(teacher, student, data=text(12), objective=objective, schedule=SHORT)
        found.append(next(running).terms)
        running.close()
    assert found[0]["kd_cf"] == found[1]["kd_cf"]
    assert found[0]["kd"] != found[1]["kd"]


def test_noise_of_the_teacher_and_the_student_differ_and_repeat():
    teacher = spread(mlp())
    batch = vectors().batch(range(6))
    both = [
        Computation(teacher, teacher, (), [KD(teacher_noise=LogitNoise(1.0), student_noise=LogitNoise(1.0))])(
            batch, torch.Generator().manual_seed(seed)
        )["kd"].item()
        for seed in (0, 0, 1)
    ]
    assert both[0] == both[1] > 0
    assert both[0] != both[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective", [KD, Labels, lambda: DKD(warmup=0), lambda: KD(reduction="mean")])
def test_half_precision_answers_are_compared_in_single(objective, dtype):
    teacher, student = Fixed(3.0, -1.0, 0.5).to(dtype), Fixed(0.25, 1.0, -2.0).to(dtype)
    batch = {"inputs": torch.zeros(2, 1), "labels": torch.tensor([0, 1])}
    (value,) = terms(teacher, student, objective(), batch).values()
    (wide,) = terms(teacher.float(), student.float(), objective(), batch).values()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(wide.item(), rel=1e-6)


def test_half_precision_answers_of_several_labels():
    batch = {"inputs": torch.zeros(2, 1), "labels": torch.tensor([[1.0, 0.0], [0.0, 0.0]])}
    value = terms(Fixed(3.0, -1.0).bfloat16(), Fixed(0.0, 1.0).bfloat16(), KD(1), batch)["kd"]
    assert value.dtype == torch.float32
    expected = terms(Fixed(3.0, -1.0), Fixed(0.0, 1.0), KD(1), batch)["kd"].item()
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_other_tokenizers_are_told_of_spans():
    rows = text(6, labels=False)
    others = {f"teacher_{name}": list(column) for name, column in text(6, labels=False, seed=1).table.items()}
    data = Rows({**rows.table, **others}).batch(range(6))
    with pytest.raises(DistillError, match=r"KD\(\) compares token by token.*use SpanKD\(alignment\)"):
        terms(spread(gpt2_lm(2)), spread(gpt2_lm(2), 1), KD(), data)


@pytest.mark.parametrize("longer", [0, 2])
def test_a_decoder_and_an_encoder_decoder_answer_to_other_tokens(longer):
    """Where they are as many, too: one answers to the next token that it reads, the other to that which it writes."""
    ids = torch.randint(5, 40, (6, 5 + longer))
    data = {"input_ids": ids, "labels": ids[:, :5].clone()}
    for teacher, student in ((gpt2_lm(1), t5(1)), (t5(1), gpt2_lm(1))):
        with pytest.raises(
            DistillError, match=r"KD\(\) compares token by token, and the answers of one are to what its"
        ):
            list(steps(teacher, student, data=data, objective=KD(), schedule=SHORT))
    with pytest.raises(DistillError, match=r"answers at 4 positions and the teacher at 6; let the student learn what"):
        terms(Fixed(*torch.zeros(6, 3).tolist()), Fixed(*torch.zeros(4, 3).tolist()), KD(), BATCH)
