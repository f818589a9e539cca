import pytest
import torch

from distill import KD, DistillError, Schedule, Served, fit, steps
from distill.data.token_alignment import TokenAlignment, span_kd
from distill.losses import chunked, forward_kl, reverse_kl
from distill.models import head as heads
from distill.objectives.spans import SpanKD
from distill.training.computation import Computation
from tests.distill.data.test_token_alignment import MERGES, TEXTS, byte_level, pieces, words
from tests.distill.tiny_models import QUIET, bert, same, spread, weights


def language_model(tokenizer, layers=2, seed=0, width=16):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=width, n_layer=layers, n_head=2, n_positions=64, bos_token_id=0,
        eos_token_id=None, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return spread(GPT2LMHeadModel(config), seed)


def term(teacher, student, objective, batch):
    return Computation(teacher, student, (), [objective])(batch, torch.Generator())


def couple():
    alignment = TokenAlignment(byte_level(MERGES), pieces())
    return alignment, language_model(alignment.teacher, 3), language_model(alignment.student, 2, 1)


def test_each_model_reads_its_own_tokens():
    alignment, teacher, student = couple()
    batch = alignment.rows(TEXTS).batch(range(3))
    found = term(teacher, student, SpanKD(alignment, 3.0), batch)
    with torch.no_grad():
        theirs = teacher(batch["teacher_input_ids"], attention_mask=batch["teacher_attention_mask"]).logits
        ours = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = span_kd(ours, theirs, alignment.spans(batch), alignment.shared, 3.0)
    assert found.keys() == {"span_kd"}
    assert found["span_kd"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert found["span_kd"].item() > 0.1
    found["span_kd"].backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
@pytest.mark.parametrize("by", ["prefix", "token"])
@pytest.mark.parametrize("labelled", [True, False])
def test_answers_that_are_made_in_parts_are_those_that_are_made_whole(by, labelled, divergence, monkeypatch):
    """Of both models, and of a student alone whose teacher ran to its end; bins of the padded vocabulary too."""
    alignment, teacher, student = couple()
    teacher, student = teacher.double(), student.double()
    teacher.resize_token_embeddings(len(alignment.teacher) + 8)
    batch = alignment.rows(TEXTS).batch(range(3))
    if labelled:
        labels = batch["input_ids"].clone()
        labels[:, :2] = -100
        batch = {**batch, "labels": labels}
    found, least = {}, chunked.LEAST
    for kept in ("whole", "both", "student"):
        monkeypatch.setattr(heads, "LARGE", 2**62 if kept == "whole" else 1)
        monkeypatch.setattr(chunked, "LEAST", least if kept == "whole" else 3)
        taught = Served(teacher) if kept == "student" else teacher
        student.zero_grad()
        value = term(taught, student, SpanKD(alignment, 3.0, by=by, divergence=divergence), batch)["span_kd"]
        value.backward()
        found[kept] = value.detach(), [each.grad for each in student.parameters()]
    assert float(found["whole"][0]) > 0.01
    for kept, near in (("both", 1e-12), ("student", 1e-6)):  # a served teacher answers in single precision
        torch.testing.assert_close(found[kept][0], found["whole"][0], rtol=near, atol=near)
        for one, other in zip(found[kept][1], found["whole"][1], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=near * max(1.0, float(other.abs().max())))


def test_one_tokenizer_on_both_sides_is_kd():
    alignment = TokenAlignment(pieces(), pieces())
    teacher, student = language_model(alignment.teacher, 3), language_model(alignment.student, 2, 1)
    batch = alignment.rows(TEXTS).batch(range(3))  # these pieces come without special tokens
    plain = {name: column for name, column in batch.items() if not name.startswith("teacher_")}
    found = term(teacher, student, SpanKD(alignment), batch)["span_kd"].item()
    assert found == pytest.approx(term(teacher, student, KD(), plain)["kd"].item(), rel=1e-6)


def test_a_copy_has_nothing_to_learn():
    alignment = TokenAlignment(words(), words())
    teacher = language_model(alignment.teacher)
    batch = alignment.rows(TEXTS).batch(range(3))
    assert term(teacher, language_model(alignment.student), SpanKD(alignment), batch)["span_kd"].item() < 1e-9


@pytest.mark.parametrize("by", ["prefix", "token"])
def test_fit_between_two_tokenizers(by):
    alignment, teacher, student = couple()
    rows, before = alignment.rows(TEXTS * 4), weights(teacher)
    records = list(
        steps(teacher, student, data=rows, objective=SpanKD(alignment, by=by),
              schedule=Schedule(steps=40, batch_size=6, lr=1e-2))
    )  # fmt: skip
    assert records[-1].terms["span_kd"] < 0.5 * records[0].terms["span_kd"]
    assert same(before, weights(teacher))


def test_fit_says_what_is_missing():
    alignment, teacher, student = couple()
    with pytest.raises(DistillError, match="different vocabularies.*TokenAlignment"):
        fit(teacher, student, data={"input_ids": torch.ones(4, 3).long()}, objective=SpanKD(alignment), steps=1,
            console=QUIET)  # fmt: skip
    same_size = language_model(alignment.student)
    with pytest.raises(DistillError, match=r"make it with data=alignment.rows\(texts\)"):
        fit(same_size, student, data={"input_ids": torch.ones(4, 3).long()}, objective=SpanKD(alignment), steps=1,
            console=QUIET)  # fmt: skip


def test_parts_of_a_step_are_the_step():
    alignment, teacher, _ = couple()
    found = []
    for parts in (1, 3):
        student = language_model(alignment.student, 2, 1)
        rows = alignment.rows([TEXTS[0], TEXTS[1], "bird"])
        schedule = Schedule(steps=3, batch_size=3, lr=1e-2, **({} if parts == 1 else {"accumulate": 3}))
        records = list(steps(teacher, student, data=rows, objective=SpanKD(alignment), schedule=schedule))
        found.append([record.loss for record in records])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_classifiers_are_refused():
    alignment, teacher, _ = couple()
    with pytest.raises(DistillError, match=r"the student gives logits of shape \[3, 3\]; for classifiers use KD"):
        term(teacher, spread(bert()), SpanKD(alignment), alignment.rows(TEXTS).batch(range(3)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=0.0), r"SpanKD\(temperature=0.0\) softens nothing"),
        (dict(by="word"), r"SpanKD\(by='word'\) does not pair tokens"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(DistillError, match=message):
        SpanKD(TokenAlignment(words(), words()), **settings)
