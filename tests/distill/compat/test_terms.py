"""The terms of the original programs by hand, and the laws of masking and splicing."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch

from distill import DIITO, KD, DistillError, Rows, Span
from distill.compat.terms import CountedMaskedLM, MaskedKD, Patience, Spliced, SquaredLogits
from distill.interchange.mapping import Entry
from distill.losses import kd
from distill.models.inputs import MASKED
from distill.objectives import Moment, Step
from interventions import Location, run
from tests.distill.tiny_models import VOCABULARY, bert, masked_lm, spread, text

HERE = (Location(site="embedding"),)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def step_of(teacher, student, batch, *, reads=(), mapping=(), moment=None, resumable=False):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        taught = run(teacher, inputs, [*reads], resumable=resumable)
    base = partial(run, student, inputs, [*reads], resumable=resumable)
    return Step(batch, student, base, taught, mapping, generator(), moment=moment or Moment())


@pytest.fixture
def models():
    return spread(masked_lm(3), 1), spread(masked_lm(3), 2)


@pytest.fixture
def batch():
    return text(6, 5, 9, labels=False).batch(range(6))


def test_patience_by_hand(batch):
    teacher, student = spread(bert(4), 1), spread(bert(2), 2)
    objective = Patience({Location(1): Location(0), Location(3): Location(1)})
    read, inputs = objective.reads(()), {name: batch[name] for name in ("input_ids", "attention_mask")}
    above, below = run(teacher, inputs, [*read.teacher]), run(student, inputs, [*read.student])
    step = Step(batch, student, lambda: below, above, (), generator())
    errors = [
        (above.vectors(one)[:, 0] - below.vectors(other)[:, 0]).square().mean()
        for one, other in objective.layers.items()
    ]
    torch.testing.assert_close(objective(step)["pkd"], torch.stack(errors).mean())


def test_squared_logits_is_a_sum_over_words_and_a_mean_over_real_tokens(models, batch):
    step = step_of(*models, batch)
    real = batch["attention_mask"].bool()
    errors = [(s - t).square().sum() for s, t in zip(step.student.logits[real], step.taught.logits[real], strict=True)]
    torch.testing.assert_close(SquaredLogits()(step)["mse"], torch.stack(errors).mean())


def test_masked_kd_is_that_of_the_masked_tokens_alone(models, batch):
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 1] = labels[2, 3] = 7
    step = step_of(*models, {**batch, MASKED: labels})
    chosen = [(0, 1), (2, 3)]
    rows = [torch.stack([logits[place] for place in chosen]) for logits in (step.student.logits, step.taught.logits)]
    torch.testing.assert_close(MaskedKD(2.0)(step)["kd"], kd(*rows, 2.0))
    none = step_of(*models, {**batch, MASKED: torch.full_like(labels, -100)})
    assert MaskedKD(2.0)(none)["kd"] == 0
    with pytest.raises(DistillError, match=r"MaskedKD\(\) needs a column 'mlm_labels'"):
        MaskedKD(2.0)(step_of(*models, batch))


# --- masking ----------------------------------------------------------------------------------------------------------


def ragged(rows: int = 40) -> dict[str, torch.Tensor]:
    return text(rows, 12, 20, labels=False).batch(range(rows))


def test_masking_chooses_the_asked_share_and_nothing_special():
    batch = ragged()
    weights = torch.ones(VOCABULARY)
    weights[1] = 0
    altered = CountedMaskedLM(weights, 3, share=0.15).alter(batch, generator())
    chosen = altered[MASKED] != -100
    tokens = int(batch["attention_mask"].sum())
    assert int(chosen.sum()) == -(-15 * tokens // 100)  # rounded up, as in the original
    assert not chosen[batch["attention_mask"] == 0].any()
    assert not chosen[batch["input_ids"] == 1].any()
    assert torch.equal(altered[MASKED][chosen], batch["input_ids"][chosen])
    assert torch.equal(altered["input_ids"][~chosen], batch["input_ids"][~chosen])


@pytest.mark.parametrize(("words", "mask", "same"), [((1, 0, 0), 1, 0), ((0, 1, 0), 0, 1), ((0, 0, 1), 0, None)])
def test_what_chosen_tokens_become(words, mask, same):
    batch = ragged()
    altered = CountedMaskedLM(torch.ones(VOCABULARY), 3, share=0.5, words=words).alter(batch, generator())
    chosen = altered[MASKED] != -100
    became = altered["input_ids"][chosen]
    assert (became == 3).float().mean() == mask if mask else (became == 3).float().mean() < 0.2
    kept = (became == batch["input_ids"][chosen]).float().mean()
    assert kept < 0.2 if same is None else kept == same
    assert same is not None or len(became.unique()) > VOCABULARY // 2


def test_rare_tokens_are_chosen_more_often_in_proportion():
    ids = torch.randint(5, 7, (200, 20), generator=generator())
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    weights = torch.zeros(VOCABULARY)
    weights[5], weights[6] = 1.0, 3.0
    objective, draws, counts = CountedMaskedLM(weights, 3, share=0.01), generator(1), torch.zeros(2)
    for _ in range(60):
        labels = objective.alter(batch, draws)[MASKED]
        counts += torch.tensor([(labels == 5).sum(), (labels == 6).sum()])
    assert counts[1] / counts[0] == pytest.approx(3, rel=0.15)


def test_every_row_has_a_masked_token_where_that_is_asked_for():
    batch = ragged()
    alone = CountedMaskedLM(torch.ones(VOCABULARY), 3, share=0.01).alter(batch, generator())[MASKED]
    assert not (alone != -100).any(1).all()
    every = CountedMaskedLM(torch.ones(VOCABULARY), 3, share=0.01, every_row=True).alter(batch, generator())[MASKED]
    assert (every != -100).any(1).all()


def test_masking_is_decided_by_the_generator():
    objective, batch = CountedMaskedLM(torch.ones(VOCABULARY), 3), ragged()
    one, same, other = (objective.alter(batch, generator(seed))["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_term_is_the_cross_entropy_of_what_was_masked(models):
    batch = ragged(4)
    objective = CountedMaskedLM(torch.ones(VOCABULARY), 3, share=0.3)
    altered = objective.alter(batch, generator())
    step = step_of(*models, altered)
    chosen = altered[MASKED] != -100
    expected = -step.student.logits[chosen].log_softmax(-1).gather(1, altered[MASKED][chosen][:, None]).mean()
    torch.testing.assert_close(objective(step)["mlm"], expected)
    assert objective.counts(altered) == {MASKED: int(chosen.sum())}
    half = step_of(*models, altered, moment=Moment(shares={MASKED: 0.5}))
    torch.testing.assert_close(objective(half)["mlm"], expected / 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, "--mlm_mask_prop 0.0 is not a share"),
        ({"words": (0.8, 0.1, 0.2)}, "--word_mask 0.8, --word_keep 0.1 and --word_rand 0.2 .* must add up to 1"),
        ({"words": (1.2, -0.1, -0.1)}, "must add up to 1"),
    ],
)
def test_shares_that_cannot_be(settings, message):
    with pytest.raises(DistillError, match=message):
        CountedMaskedLM(torch.ones(4), 3, **settings)


# --- splicing ---------------------------------------------------------------------------------------------------------


def test_spliced_texts_have_a_span_of_another_text_of_the_batch():
    rows, width = 6, 10
    ids = torch.arange(rows)[:, None] * 100 + torch.arange(width)  # every token says where it stood
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    drawn = Spliced(Span(0.3)).draw(batch, None, generator(2))["input_ids"]
    changed = drawn != ids
    moved = drawn // 100 != torch.arange(rows)[:, None]
    assert torch.equal(changed | moved, changed)
    for row, new in enumerate(drawn):
        theirs = new[moved[row]]
        assert len(theirs) in (0, 3)
        assert len((theirs // 100).unique()) <= 1
        assert (theirs.diff() == 1).all()  # consecutive there too
    assert moved.any()


def test_spliced_texts_keep_to_real_tokens():
    batch = text(8, 4, 9, labels=False).batch(range(8))
    drawn = Spliced(Span(1.0)).draw(batch, None, generator())["input_ids"]
    padding = batch["attention_mask"] == 0
    assert torch.equal(drawn[padding], batch["input_ids"][padding])


@dataclass
class Remembering:
    """Spliced texts, and which they were."""

    drawn: dict | None = None
    aligned: bool = True

    def draw(self, batch, vocabulary, generator):
        self.drawn = Spliced(Span(0.5)).draw(batch, vocabulary, generator)
        return self.drawn


def test_interchange_of_spliced_texts_at_the_embedding_is_a_run_of_them(models, batch):
    teacher, student = models
    pairs = Remembering()
    objective = DIITO(pairs, positions=None, match=KD(2.0))
    step = step_of(teacher, student, batch, mapping=(Entry(HERE, HERE),), reads=HERE, resumable=True)
    found = objective(step)["kd_cf"]
    assert pairs.drawn is not None
    assert not torch.equal(pairs.drawn["input_ids"], batch["input_ids"])
    inputs = {name: pairs.drawn[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        edited = kd(student(**inputs).logits, teacher(**inputs).logits, 2.0, mask=batch["attention_mask"])
        plain = kd(step.student.logits, step.taught.logits, 2.0, mask=batch["attention_mask"])
    torch.testing.assert_close(found, edited)
    assert not torch.allclose(found, plain)


def test_rows_without_labels_are_enough_for_masking():
    assert Rows.of(ragged()).columns == ("input_ids", "attention_mask", "special_tokens_mask")
    assert CountedMaskedLM(torch.ones(VOCABULARY), 3).needs == ()
