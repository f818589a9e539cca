"""Perplexity, agreement and divergence are means over the answers that count, by hand, whatever the batches."""

from math import exp, inf, nan

import pytest
import torch

from distill import DistillError, Rows, accuracy, calibration, evaluate
from distill.evaluation.answers import beside_teacher
from distill.evaluation.answers.beside_teacher import perplexity_of
from distill.evaluation.metrics import perplexity
from distill.losses import chunked
from distill.losses.chunked import LazyLogits
from distill.models import head as heads
from tests.distill.tiny_models import bert, gpt2_lm, llama, masked_lm, mlp, spread, t5, text

TOKENS = text(7, labels=False)
ROWS = list(TOKENS.table["input_ids"])


def labelled(first=2):
    """Rows whose labels are their tokens, but the first few do not count."""
    labels = [torch.where(torch.arange(len(row)) < first, -100, row) for row in ROWS]
    return Rows({**TOKENS.table, "labels": labels})


def log_probabilities(model, row):
    """The logarithms of the probabilities that a model gives for one row without padding."""
    with torch.no_grad():
        return model(input_ids=row[None]).logits.flatten(0, -2).double().log_softmax(-1)


def by_hand(teacher, student, rows, first):
    """The figures of decoders, one row at a time, without padding."""
    nll, teacher_nll, same, kl, count = 0.0, 0.0, 0, 0.0, 0
    for row in rows:
        own, other = (
            model(input_ids=row[None]).logits[0, :-1].double().log_softmax(-1) for model in (student, teacher)
        )
        for at in range(max(first - 1, 0), len(row) - 1):
            nll -= float(own[at, row[at + 1]])
            teacher_nll -= float(other[at, row[at + 1]])
            same += int(own[at].argmax() == other[at].argmax())
            kl += float((other[at].exp() * (other[at] - own[at])).sum())
            count += 1
    return {"perplexity": exp(nll / count), "teacher_perplexity": exp(teacher_nll / count), "agreement": same / count,
            "kl": kl / count}, count  # fmt: skip


@pytest.mark.parametrize("make", [gpt2_lm, llama])
@pytest.mark.parametrize("first", [0, 2, 3])
@torch.no_grad()
def test_decoders_are_measured_as_by_hand(make, first, monkeypatch):
    """In batches of any size, whether logits are whole or made for a few tokens at a time."""
    teacher, student = spread(make(2)).eval(), spread(make(1), 1).eval()
    expected, count = by_hand(teacher, student, ROWS, first)
    monkeypatch.setattr(chunked, "LEAST", 2)
    made, of = [], LazyLogits.of
    monkeypatch.setattr(LazyLogits, "of", lambda logits, chosen: made.append(1) or of(logits, chosen))
    for size, at_once, large in ((8, 1024, 2**62), (3, 2, 2**62), (8, 1024, 1), (3, 2, 1)):
        monkeypatch.setattr(beside_teacher, "ROWS", size)
        monkeypatch.setattr(beside_teacher, "AT_ONCE", at_once)
        monkeypatch.setattr(heads, "LARGE", large)
        made.clear()
        found = evaluate(teacher, student, {}, labelled(first) if first else TOKENS)
        assert {name: found.figures[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert found.agreement.count == count
        assert ("accuracy" in found.figures) == bool(first)
        assert len(made) == 0 if large > 1 else len(made) > 2 * len(ROWS) / size
        if first:
            assert accuracy(student, labelled(first), batch_size=size) == found.accuracy
            assert calibration(student, labelled(first), batch_size=size).accuracy == found.accuracy


def test_encoder_decoders_are_measured_on_their_labels():
    teacher, student = spread(t5(2)), spread(t5(1), 1)
    labels = [torch.cat([row[:-1], torch.tensor([-100])]) for row in ROWS]
    rows = Rows({**TOKENS.table, "labels": labels})
    found = evaluate(teacher, student, {}, rows)
    assert found.perplexity == pytest.approx(perplexity(student, rows))
    assert found.teacher_perplexity == pytest.approx(perplexity(teacher, rows))
    assert found.agreement.count == sum(len(row) - 1 for row in ROWS)


def test_a_student_that_is_its_teacher_agrees_everywhere_and_one_alone_has_a_perplexity():
    model = spread(gpt2_lm(2))
    found = evaluate(model, model, {}, labelled())
    assert (found.agreement.value, found.kl, found.perplexity) == (1, 0, found.teacher_perplexity)
    alone = evaluate(None, model, None, labelled())
    assert alone.perplexity == found.perplexity
    assert (alone.agreement, alone.kl, alone.teacher_perplexity) == (None, None, None)


@pytest.mark.parametrize("make", [bert, masked_lm])
def test_rows_without_labels_are_compared_with_the_teacher(make):
    teacher, student = spread(make(2)), spread(make(1), 1)
    found = evaluate(teacher.eval(), student.eval(), {}, TOKENS)
    assert (found.accuracy, found.perplexity, found.note) == (None, None, "")
    pairs = [[log_probabilities(model, row) for model in (teacher, student)] for row in ROWS]
    same = torch.cat([one.argmax(-1) == other.argmax(-1) for one, other in pairs])
    kl = torch.cat([(one.exp() * (one - other)).sum(-1) for one, other in pairs])
    assert (found.agreement.value, found.agreement.count) == (float(same.double().mean()), len(same))
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-5)


def test_classifiers_with_labels_are_measured_as_before():
    rows = text(8)
    found = evaluate(spread(bert(2)), spread(bert(1), 1), {}, rows)
    assert list(found.figures) == ["accuracy"]
    assert set(found.to_dict()) == {"accuracy", "interchange", "note"}


def test_values_are_no_answers_to_agree_on():
    student = spread(bert(1, labels=2, problem_type="regression"), 1)
    found = evaluate(spread(bert(2, labels=2, problem_type="regression")), student, {}, TOKENS)
    assert found.figures == {}
    assert "nothing was measured" in found.note


def test_another_vocabulary_has_no_agreement_and_says_so():
    student = spread(gpt2_lm(1), 1)
    wide = spread(gpt2_lm(2))
    wide.resize_token_embeddings(wide.config.vocab_size + 8, mean_resizing=False)
    found = evaluate(wide, student, {}, labelled())
    assert (found.agreement, found.kl, found.teacher_perplexity) == (None, None, None)
    assert found.perplexity == pytest.approx(perplexity(student, labelled()))
    assert "so their answers are not compared" in found.note


def test_answers_that_are_none_are_refused():
    student = spread(gpt2_lm(1), 1)
    with torch.no_grad():
        next(student.parameters()).fill_(nan)
    with pytest.raises(DistillError, match="perplexity is of answers, and"):
        evaluate(spread(gpt2_lm(2)), student, {}, labelled())


def test_a_perplexity_above_all_numbers_is_infinite():
    assert perplexity_of(1e6, 1) == inf


def test_it_prints_saves_and_draws_what_was_measured():
    found = evaluate(spread(gpt2_lm(2)), spread(gpt2_lm(1), 1), {}, labelled())
    assert f"perplexity {found.perplexity:.4g} (teacher {found.teacher_perplexity:.4g})" in str(found)
    assert f"agreement with the teacher {found.agreement}, KL {found.kl:.4g} nats" in str(found)
    assert found.to_dict()["perplexity"] == found.perplexity
    assert found.to_dict()["agreement"]["count"] == found.agreement.count
    assert found.to_pandas().loc[("perplexity", "held-out rows"), "value"] == found.perplexity
    unlabelled = evaluate(spread(mlp()), spread(mlp(), 1), {}, {"x": torch.randn(6, 6)})
    assert unlabelled.plot().axes[0].get_yticklabels()[0].get_text() == "agreement"
