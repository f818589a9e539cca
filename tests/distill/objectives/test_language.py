import pytest
import torch
from torch.nn import functional

from distill import DIITO, KD, CausalLM, DistillError, Labels, MaskedLM, Rows, Schedule, Span, steps
from distill.training.computation import Computation
from tests.distill.tiny_models import CNN, bert, gpt2_lm, images, llama, masked_lm, same, spread, t5, text, weights
from tests.distill.words import Words

SHORT = Schedule(steps=2, batch_size=6)


def terms(student, objective, batch, teacher=None):
    return Computation(teacher, student, (), [objective])(batch, torch.Generator())


def masked(rows=200, **settings):
    batch = text(rows, 12, 20, labels=False).batch(range(rows))
    return batch, MaskedLM(Words(), **settings).alter(batch, torch.Generator().manual_seed(0))


def test_what_is_masked():
    """Of 15 % of the real, not special tokens 80 % are the mask token, about 10 % another, about 10 % themselves."""
    batch, new = masked()
    labels, ids = new["mlm_labels"], batch["input_ids"]
    chosen = labels != -100
    eligible = batch["attention_mask"].bool() & ~batch["special_tokens_mask"].bool()
    assert not (chosen & ~eligible).any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(new["input_ids"][~chosen], ids[~chosen])
    count = chosen.sum().item()
    assert count / eligible.sum().item() == pytest.approx(0.15, abs=0.02)
    now = new["input_ids"][chosen]
    assert (now == 2).sum().item() / count == pytest.approx(0.8, abs=0.06)
    assert (now == labels[chosen]).sum().item() / count == pytest.approx(0.1 + 0.1 / 40, abs=0.05)
    assert len(now.unique()) > 10
    assert batch.keys() | {"mlm_labels"} == new.keys()


def test_other_shares():
    batch, new = masked(share=1.0, replaced=(1.0, 0.0))
    eligible = batch["attention_mask"].bool() & ~batch["special_tokens_mask"].bool()
    assert torch.equal(new["mlm_labels"] != -100, eligible)
    assert (new["input_ids"][eligible] == 2).all()
    _, few = masked(share=1e-6)
    assert ((few["mlm_labels"] != -100).sum(1) == 1).all()  # one in every row
    same_batch = MaskedLM(Words()).alter(new, torch.Generator())
    assert same_batch is new  # what another objective masked is not masked again


def test_teacher_and_student_read_the_same_masked_text():
    seen = []

    class Watching(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module = inner

        def forward(self, input_ids, attention_mask):
            seen.append(input_ids)
            return self.module(input_ids=input_ids, attention_mask=attention_mask)

    teacher, student = (Watching(spread(masked_lm(2), seed)) for seed in (0, 1))
    list(steps(teacher, student, data=text(6, labels=False), objective=[KD(), MaskedLM(Words())],
               schedule=Schedule(steps=1, batch_size=6)))  # fmt: skip
    assert torch.equal(seen[-1], seen[-2])
    assert (seen[-1] == 2).any()


def test_mlm_by_hand_and_under_padding():
    student = spread(masked_lm(2))
    batch = text(5, labels=False).batch(range(5))
    new = MaskedLM(Words(), share=0.5).alter(batch, torch.Generator().manual_seed(1))
    logits = student(input_ids=new["input_ids"], attention_mask=new["attention_mask"]).logits
    chosen = new["mlm_labels"] != -100
    expected = functional.cross_entropy(logits[chosen], new["mlm_labels"][chosen]).item()
    assert terms(student, MaskedLM(Words()), new)["mlm"].item() == pytest.approx(expected, rel=1e-6)
    fills = {"mlm_labels": -100, "special_tokens_mask": 1}
    wider = {name: functional.pad(column, (0, 4), value=fills.get(name, 0)) for name, column in new.items()}
    assert terms(student, MaskedLM(Words()), wider)["mlm"].item() == pytest.approx(expected, rel=1e-5)


def test_data_that_was_masked_before():
    student, rows = spread(masked_lm(2)), text(4, labels=False)
    labels = [torch.where(torch.arange(len(ids)) == 1, ids, -100) for ids in rows.table["input_ids"]]
    batch = Rows({**rows.table, "labels": labels}).batch(range(4))
    expected = terms(student, Labels(), batch)["labels"].item()
    assert terms(student, MaskedLM(), batch)["mlm"].item() == expected


def test_no_masked_token_is_no_loss_and_no_error():
    student, rows = masked_lm(2), text(3, labels=False)
    nothing = [torch.full_like(ids, -100) for ids in rows.table["input_ids"]]
    value = terms(student, MaskedLM(), Rows({**rows.table, "labels": nothing}).batch(range(3)))["mlm"]
    value.backward()
    assert value.item() == 0


def test_masks_are_drawn_anew_in_every_step_by_the_seed():
    found = []
    for seed in (0, 0, 1):
        student = spread(masked_lm(2))
        schedule = Schedule(steps=3, batch_size=6, seed=seed, lr=1e-12, warmup=0)
        records = list(steps(None, student, data=text(6, labels=False), objective=MaskedLM(Words()), schedule=schedule))
        found.append([record.loss for record in records])
    assert found[0] == found[1] != found[2]
    assert len({round(loss, 5) for loss in found[0]}) == 3


def test_interchanges_among_masked_tokens():
    """`Span(among="labelled")` takes the tokens that this step masked."""
    teacher, student = spread(masked_lm(4)), spread(masked_lm(2), 1)
    objective = [MaskedLM(Words()), DIITO(positions=Span(0.5, among="labelled"))]
    records = list(steps(teacher, student, data=text(12, labels=False), objective=objective, schedule=SHORT))
    assert records[0].terms["kd_cf"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"share": 0.0}, "are no shares"), ({"replaced": (0.9, 0.2)}, "are no shares"), ({"share": 1.5}, "are no shares")],
)
def test_shares_that_are_none(settings, message):
    with pytest.raises(DistillError, match=message):
        MaskedLM(Words(), **settings)


def test_what_cannot_be_masked():
    class Unmasked(Words):
        mask_token_id = None

    with pytest.raises(DistillError, match=r"has no mask token; use CausalLM\(\)"):
        MaskedLM(Unmasked())
    with pytest.raises(DistillError, match=r"MaskedLM masks input_ids and the data has pixel_values"):
        MaskedLM(Words()).alter(images(2).batch(range(2)), torch.Generator())
    with pytest.raises(DistillError, match=r"needs a model that answers at every token.*use Labels\(\)"):
        list(steps(None, bert(2), data=text(6), objective=MaskedLM(Words()), schedule=SHORT))


# --- causal -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2_lm, llama])
@pytest.mark.parametrize("side", ["right", "left"])
def test_next_tokens_by_a_loop(make, side):
    student = spread(make(2))
    batch = text(5, labels=False, side=side).batch(range(5))
    places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)  # padding on the left moves no token
    logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=places)
    logits = logits.logits.log_softmax(-1)
    losses = [
        -logits[row, t, batch["input_ids"][row, t + 1]].item()
        for row in range(5)
        for t in range(logits.shape[1] - 1)
        if batch["attention_mask"][row, t] and batch["attention_mask"][row, t + 1]
    ]
    assert terms(student, CausalLM(), batch)["clm"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_loss_is_that_of_transformers():
    student = spread(gpt2_lm(2))
    batch = text(5, labels=False).batch(range(5))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :2] = -100  # a prompt that does not count
    theirs = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.item()
    assert terms(student, CausalLM(), {**batch, "labels": labels})["clm"].item() == pytest.approx(theirs, rel=1e-6)


def test_what_follows_nothing():
    batch = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])}
    assert terms(gpt2_lm(2), CausalLM(), batch)["clm"].item() == 0
    with pytest.raises(DistillError, match=r"for encoder–decoders use Labels\(\)"):
        terms(t5(2), CausalLM(), {**batch, "decoder_input_ids": torch.tensor([[5]])})
    with pytest.raises(DistillError, match="CausalLM\\(\\) needs a column 'input_ids'"):
        terms(CNN(), CausalLM(), images(2).batch(range(2)))
    with pytest.raises(DistillError, match="needs a model that answers at every token"):
        terms(bert(2), CausalLM(), text(3, labels=False).batch(range(3)))


# --- encoder–decoders -------------------------------------------------------------------------------------------------


def test_an_encoder_decoder_is_given_its_labels_shifted():
    """As transformers computes it from `labels`; and what is padding there does not count."""
    teacher, student = spread(t5(2)), spread(t5(2), 1)
    plain, others = text(4, labels=False), text(4, labels=False, seed=1).table["input_ids"]
    batch = Rows({**plain.table, "labels": list(others)}).batch(range(4))
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    theirs = student(**given)
    assert terms(student, Labels(), batch)["labels"].item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    counted = batch["labels"] != -100
    assert not counted.all()
    p, q = (model(**given).logits.log_softmax(-1)[counted] for model in (teacher, student))
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert terms(student, KD(1), batch, teacher)["kd"].item() == pytest.approx(expected, rel=1e-5)


def test_half_precision():
    student = spread(masked_lm(2))
    new = MaskedLM(Words(), share=0.5).alter(text(4, labels=False).batch(range(4)), torch.Generator().manual_seed(0))
    exact = terms(student, MaskedLM(), new)["mlm"].item()
    with torch.autocast("cpu", torch.bfloat16):
        value = terms(student, MaskedLM(), new)["mlm"]
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact, rel=0.02)


def test_resumed_training_masks_as_an_uninterrupted_one(tmp_path):
    from distill.training.checkpoints import Checkpoints

    def run(student, number=None, **settings):
        running = steps(None, student, data=text(12, labels=False), objective=MaskedLM(Words()),
                        schedule=Schedule(steps=4, batch_size=6, lr=1e-2), **settings)  # fmt: skip
        if number is None:
            return list(running)
        records = [next(running) for _ in range(number)]
        running.close()
        return records

    whole, killed, again = (spread(masked_lm(2)) for _ in range(3))
    expected = run(whole)
    records = run(killed, 2, checkpoints=Checkpoints(tmp_path, every=1))
    records += run(again, checkpoints=Checkpoints(tmp_path, resume=True))
    assert records == expected
    assert same(weights(whole), weights(again))
