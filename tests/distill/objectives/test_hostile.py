"""What a hostile tester found: each of these was once silent, or a crash without a way out."""

import copy
import os
import signal
from dataclasses import replace
from functools import partial
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch.nn import functional

from distill import (
    AT,
    BSS,
    CRD,
    DIITO,
    DKD,
    ICD,
    KD,
    PKD,
    Cosine,
    DistilBERT,
    DistillError,
    FitNets,
    Labels,
    MaskedLM,
    Rows,
    Schedule,
    Sobolev,
    TinyBERT,
    fit,
    steps,
)
from distill.evaluation.calibration import calibration
from distill.interchange.mapping import entries_of
from distill.losses import LogitNoise, jensen_shannon, kd
from distill.training.computation import Computation
from interventions import Location, run
from tests.distill.tiny_models import QUIET, bert, masked_lm, mlp, same, spread, t5, text, vectors, weights
from tests.distill.words import Words

SHORT = Schedule(steps=2, batch_size=6)


def terms(teacher, student, objective, batch, mapping=None):
    pairs = () if mapping is None else entries_of(mapping, teacher, student)
    computation = Computation(teacher, student, pairs, [objective])
    with torch.random.fork_rng():
        computation.prepare(batch, torch.Generator(), Rows(dict(batch)))
    return computation(batch, torch.Generator().manual_seed(0))


# --- masks ------------------------------------------------------------------------------------------------------------

ENCODER = {Location(1, stack="encoder"): Location(0, stack="encoder")}
PATTERNS = {Location(1, "attention_pattern", stack="encoder"): Location(0, "attention_pattern", stack="encoder")}


def translations(width):
    """As many target tokens as source tokens, or not; the first row is padded in both, to different lengths."""
    plain = text(4, 4, 7, labels=False).batch(range(4))
    labels = torch.randint(5, 40, (4, width), generator=torch.Generator().manual_seed(1))
    labels[0, 2:] = -100
    return {name: plain[name] for name in ("input_ids", "attention_mask")} | {"labels": labels}


@pytest.mark.parametrize(
    "objective", [FitNets(ENCODER), Cosine(next(iter(ENCODER))), AT(PATTERNS), ICD(4, at=next(iter(ENCODER)))]
)
def test_an_encoder_has_the_mask_of_its_own_tokens(objective):
    teacher, student = spread(t5(4)), spread(t5(2), 1)
    source = translations(3)["input_ids"].shape[1]
    (first, *_), *others = (list(terms(teacher, student, objective, translations(w)).values()) for w in (source, 3))
    assert others[0][0].item() == pytest.approx(first.item(), rel=1e-5)  # what the decoder writes is no matter
    batch = translations(3)
    wider = {n: functional.pad(c, (0, 4)) if n != "labels" else c for n, c in batch.items()}
    assert next(iter(terms(teacher, student, objective, wider).values())).item() == pytest.approx(
        first.item(), rel=1e-4
    )


def test_parts_of_a_step_with_encoder_terms_add_up():
    teacher, found = spread(t5(4)).double(), []
    batch = translations(3)
    for parts in (1, 2, 4):
        student = spread(t5(2), 1).double()
        schedule = Schedule(steps=1, batch_size=4, accumulate=parts, optimizer="sgd", lr=0.1, clip=None)
        (record,) = steps(teacher, student, data=Rows(batch), objective=[FitNets(ENCODER), KD()], schedule=schedule)
        found.append((record.loss, torch.cat([p.detach().flatten() for p in student.parameters()])))
    for loss, after in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-10)
        assert torch.allclose(after, found[0][1], rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "objective", [KD, lambda: FitNets(LAYERS), Cosine, TinyBERT, lambda: AT(BERT_PATTERNS), Labels]
)
def test_a_part_or_a_batch_without_anything_to_compare_counts_for_nothing(objective):
    teacher, student = spread(masked_lm(4)), spread(masked_lm(2), 1)
    batch = text(4, labels=False).batch(range(4))
    labels = batch["input_ids"].masked_fill(torch.rand(batch["input_ids"].shape) < 0.5, -100)
    batch = {**batch, "labels": labels}
    batch["attention_mask"][2] = 0
    batch["labels"][2] = -100
    schedule = Schedule(steps=1, batch_size=4, accumulate=4)
    (record,) = steps(teacher, student, data=Rows(batch), objective=objective(), schedule=schedule)
    assert all(value > 0 for value in record.terms.values())
    if objective is Labels:  # which refuses data without any
        return
    alone = {name: column[2:3] for name, column in batch.items()}
    assert all(term.item() == 0 for term in terms(teacher, student, objective(), alone).values())


LAYERS = {Location(1): Location(0)}
BERT_PATTERNS = {Location(1, "attention_pattern"): Location(0, "attention_pattern")}


def test_labels_that_are_all_left_out_are_refused_at_once():
    rows = vectors()
    data = Rows({**rows.table, "labels": torch.full((24,), -100)})
    for objective in (Labels(), DKD(warmup=0)):
        with pytest.raises(DistillError, match="needs a label that is not -100, and none of the 24 rows has one"):
            list(steps(mlp(), mlp(), data=data, objective=objective, schedule=SHORT))


def test_pkd_takes_the_first_token_and_whole_vectors():
    teacher, student = spread(mlp()), spread(mlp(), 1)
    batch, at = vectors().batch(range(4)), Location(module="2")
    a, b = (functional.normalize(run(m, (batch["inputs"],), [at]).vectors(at), dim=1) for m in (teacher, student))
    found = terms(teacher, student, PKD({at: at}), batch)["pkd"].item()
    assert found == pytest.approx((a - b).square().mean().item(), rel=1e-5)
    teacher, student = spread(bert(3)), spread(bert(2), 1)
    sides = []
    for side in ("right", "left"):
        rows = text(4, side=side).batch(range(4))
        rows["position_ids"] = (rows["attention_mask"].cumsum(1) - 1).clamp(min=0)
        sides.append(terms(teacher, student, PKD(LAYERS), rows)["pkd"].item())
    assert sides[0] == pytest.approx(sides[1], rel=1e-4)


# --- what is trained --------------------------------------------------------------------------------------------------


def test_gradients_of_before_are_no_part_of_the_first_step():
    teacher, ends = spread(mlp()), []
    for before in (False, True):
        student = spread(mlp(), 1)
        if before:
            student(vectors().table["inputs"]).sum().backward()
        list(steps(teacher, student, data=vectors(), objective=KD(), schedule=SHORT))
        assert all(parameter.grad is None for parameter in student.parameters())
        ends.append(weights(student))
    assert same(*ends)


def test_a_step_that_failed_leaves_no_gradients():
    class Failing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = mlp(), 0

        def forward(self, inputs):
            self.calls += 1
            if self.calls == 6:
                raise MemoryError
            return self.inner(inputs)

    student = Failing()
    with pytest.raises(MemoryError):
        list(
            steps(
                None,
                student,
                data=vectors(),
                objective=Labels(),
                schedule=Schedule(steps=4, batch_size=6, accumulate=2),
            )
        )
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_student_that_shares_what_it_trains_with_its_teacher_is_refused():
    teacher = spread(bert(2))
    student = spread(bert(2), 1)
    student.bert.embeddings = teacher.bert.embeddings
    for each in (student, teacher):
        with pytest.raises(DistillError, match=r"the student shares \d+ of its parameters with the teacher"):
            list(steps(teacher, each, data=text(), objective=KD(), schedule=SHORT))
    teacher.bert.embeddings.requires_grad_(False)
    list(steps(teacher, student, data=text(), objective=KD(), schedule=SHORT))  # frozen parts may be shared


def test_a_student_that_cannot_learn_is_refused():
    with pytest.raises(DistillError, match="the student has no parameter that is trained"):
        list(steps(mlp(), mlp().requires_grad_(False), data=vectors(), objective=[KD(), ICD(4)], schedule=SHORT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("objective", [lambda: FitNets(LAYERS), lambda: TinyBERT(1), lambda: ICD(4)])
def test_regressors_for_students_of_other_precision(objective, dtype):
    student, schedule = spread(bert(2, width=8), 1).to(dtype), replace(SHORT, param_dtype="as loaded")
    records = list(steps(spread(bert(4)), student, data=text(), objective=objective(), schedule=schedule))
    assert all(torch.tensor(record.loss).isfinite() for record in records)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_what_answers_are_is_decided_once_by_all_rows():
    """Real values of which some batches happen to lie between 0 and 1 are squared errors in every batch."""
    labels = torch.rand(12, 2)
    labels[-1] = 3.0
    data = Rows({"inputs": torch.randn(12, 6), "labels": labels})
    student = torch.nn.Linear(6, 2)
    schedule = Schedule(epochs=1, batch_size=2, lr=1e-12)
    before = copy.deepcopy(student)
    records = list(steps(None, student, data=data, objective=Labels(), schedule=schedule))
    total = sum(record.loss for record in records) / len(records)
    assert total == pytest.approx((before(data.table["inputs"]) - labels).square().mean().item(), rel=1e-4)


def test_labels_as_many_as_logits_are_several_labels_whatever_their_type():
    teacher, student = spread(mlp()), spread(mlp(), 1)
    batch = vectors().batch(range(6))
    whole = functional.one_hot(batch["labels"], 3)
    found = [terms(teacher, student, KD(1), {**batch, "labels": each})["kd"].item() for each in (whole, whole.float())]
    assert found[0] == found[1] != terms(teacher, student, KD(1), batch)["kd"].item()
    assert terms(None, student, Labels(), {**batch, "labels": whole})["labels"] > 0
    with pytest.raises(DistillError, match=r"Labels\(smoothing=0.1\) shares a part of the label among classes"):
        terms(None, student, Labels(0.1), {**batch, "labels": whole})


@pytest.mark.parametrize("objective", [Sobolev, BSS, DIITO])
def test_what_runs_by_itself_does_not_match_counterfactual_runs(objective):
    with pytest.raises(DistillError, match="does not compare the runs that it is given; use e.g."):
        DIITO(match=[KD(), objective()])


def test_two_equal_terms_and_none_are_refused_inside_diito():
    with pytest.raises(DistillError, match="and nothing does not compare"):
        DIITO(match=[])
    teacher, student = spread(bert(3)), spread(bert(2), 1)
    with pytest.raises(DistillError, match="two objectives return the term 'kd'"):
        list(steps(teacher, student, data=text(), objective=DIITO(match=[KD(2.0), KD(8.0)]), schedule=SHORT))


def test_noise_of_a_counterfactual_run_is_its_own():
    teacher = spread(bert(2))
    student = copy.deepcopy(teacher)
    noise = partial(KD, 1.0, teacher_noise=LogitNoise(1.0))
    objective = [noise(), DIITO(match=noise(), positions=None)]
    batch = text(4, 5, 5).batch(range(4))
    pairs = entries_of({Location(0): Location(0)}, teacher, student)
    found = Computation(teacher, student, pairs, objective)(batch, torch.Generator().manual_seed(0))
    step = Computation(teacher, student, pairs, objective).step(batch, torch.Generator().manual_seed(0))
    same_draws = LogitNoise(1.0)(step.taught.logits, step.drawing("noise of the teacher"))
    assert found["kd"].item() == pytest.approx(kd(step.student.logits, same_draws).item(), rel=1e-5)
    assert found["kd_cf"].item() != pytest.approx(found["kd"].item(), rel=1e-2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"clip": -1.0}, "clip=-1.0 leaves no gradient"),
        ({"clip": 0.0}, "clip=0.0 leaves no gradient"),
        ({"warmup": 100.0}, "warmup=100.0 is no share of the steps"),
        ({"warmup": -1.0}, "warmup=-1.0 is no share"),
        ({"decay": ()}, "must be shares of the training"),
        ({"decay": 0.5}, r"decay must be a text or a tuple"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"accumulate": True}, "accumulate must be a whole number"),
        ({"epochs": float("inf")}, "epochs=inf never end; use e.g. epochs=3"),
    ],
)
def test_schedules_that_would_do_something_else(wrong, message):
    with pytest.raises(DistillError, match=message):
        Schedule(**wrong)


def test_settings_that_name_nothing_are_refused():
    with pytest.raises(DistillError, match=r"FitNets\(regressors=…\) names block_output.-1, which is none"):
        FitNets({Location(3): Location(1)}, regressors={Location(-1): torch.nn.Linear(2, 2)})
    for kind in (FitNets, AT, partial(TinyBERT, 1)):
        with pytest.raises(DistillError, match="compares nothing; give"):
            kind(layers={})
    objective = [MaskedLM(Words(), share=0.9), DistilBERT(Words())]
    with pytest.raises(DistillError, match="two objectives mask the text in two ways"):
        list(steps(masked_lm(2), masked_lm(2), data=text(labels=False), objective=objective, schedule=SHORT))
    with pytest.raises(DistillError, match="a temperature of 0.02 or more"):
        CRD(temperature=0.01)


def test_a_mask_is_not_drawn_where_the_teacher_reads_other_tokens():
    batch = text(4, labels=False).batch(range(4))
    with pytest.raises(DistillError, match="here the teacher reads tokens of its own"):
        MaskedLM(Words()).alter({**batch, "teacher_input_ids": batch["input_ids"]}, torch.Generator())


def test_other_columns_that_begin_with_teacher_are_columns():
    teacher, student = spread(mlp()), spread(mlp(), 1)
    rows = vectors()
    data = Rows({"inputs": rows.table["inputs"], "labels": rows.table["labels"]})
    plain = list(steps(teacher, copy.deepcopy(student), data=data, objective=KD(), schedule=SHORT))
    assert plain[0].terms["kd"] > 0

    class Named(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, inputs):
            return self.inner(inputs)

    more = Rows({**data.table, "teacher_score": torch.randn(24)})
    again = list(steps(Named(teacher), Named(student), data=more, objective=KD(), schedule=SHORT))
    assert again == plain


def test_very_high_temperatures_are_exact():
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    limit = ((student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))).square()
    for temperature in (1e3, 1e4, 1e5):
        found = kd(student, teacher, temperature)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx((limit.sum(1) / 10).mean().item(), rel=5e-3)


def test_calibration_is_of_classes():
    with pytest.raises(DistillError, match="calibration is of classes, and the model has one output"):
        calibration(torch.nn.Linear(6, 1), vectors())


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [
        FitNets({Location(module="2"): Location(module="2")}),
        ICD(4, lr=0.1),
        CRD(4, 8),
        KD(divergence=partial(jensen_shannon, beta=0.1)),
        BSS(until=0.5),
    ],
)
def test_a_run_is_resumed_with_the_same_objects(objective, tmp_path):
    teacher = spread(mlp(8))
    settings = {"data": vectors(), "objective": [Labels(), objective], "schedule": SHORT, "console": QUIET,
                "weights": {"labels": lambda progress: 1.0 - progress}}  # fmt: skip
    first, again = spread(mlp(4), 1), spread(mlp(4), 1)
    with pytest.raises(KeyboardInterrupt):
        fit(teacher, first, output_dir=tmp_path / "run", **{**settings, "console": Stopping(file=StringIO())})
    fit(teacher, again, output_dir=tmp_path / "run", resume=True, **settings)
    whole = spread(mlp(4), 1)
    fit(teacher, whole, **settings)
    assert same(weights(whole), weights(again))
    assert "0x" not in repr(objective)


class Stopping(Console):
    """A console on which Ctrl-C is pressed at the first line."""

    def print(self, *lines, **settings):
        os.kill(os.getpid(), signal.SIGINT)
