"""Answer: where models of several families answer, found by gradients, and what an interchange there does."""

import copy

import pytest
import torch
from torch import nn

from distill import DIITO, KD, Answer, DistillError, Scattered, fit, interchange_accuracy
from distill.interchange.answer import resolved
from distill.interchange.mapping import entries_of
from distill.training.computation import Computation
from interventions import Location, interchange, run
from tests.distill.every_site import bart, distilbert, sentences, t5
from tests.distill.interchange.test_sources import PADDED, uniform
from tests.distill.tiny_models import (
    CNN,
    LSTM,
    QUIET,
    bert,
    bert_with,
    gpt2,
    gpt2_lm,
    images,
    llama,
    masked_lm,
    mlp,
    same,
    spread,
    text,
    vectors,
    vit,
    weights,
)  # fmt: skip


def rows(make, side="right"):
    if make in (vit, CNN):
        return images(6)
    if make is mlp:
        return vectors(6)
    return sentences(6) if make in (t5, bart) else text(6, side=side, labels=False)


WHERE = [
    (bert, 0), (distilbert, 0), (vit, 0), (gpt2, -1), (gpt2_lm, -1), (llama, -1), (masked_lm, -1), (t5, -1), (bart, -1),
]  # fmt: skip


@pytest.mark.parametrize(("make", "token"), WHERE)
@pytest.mark.parametrize("side", ["right", "left"])
def test_where_models_answer(make, token, side):
    model = spread(make(2))
    if side == "left" and make in (bert, distilbert):  # they read the first column, which is padding in shorter rows
        with pytest.raises(DistillError, match="finds no answering position"):
            resolved(Answer(), model, rows(make, side).batch(range(6)))
        return
    found = resolved(Answer(), model, rows(make, side).batch(range(6)))
    assert found == Answer(token)
    assert not model.training
    assert resolved(Answer(3), model, {}) == Answer(3)
    assert resolved(Scattered(), model, {}) == Scattered()
    assert resolved(None, model, {}) is None


@pytest.mark.parametrize("make", [bert, distilbert, gpt2, vit])
def test_swapped_at_the_last_block_it_gives_the_answer_to_the_source(make):
    """The definition: at the output of the last block the logits read this token and no other."""
    model, data = spread(make(2)), rows(make, "left" if make is gpt2 else "right")
    rule = resolved(Answer(), model, data.batch(range(6)))
    batch = data.batch(range(6))
    inputs = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask", "pixel_values")}
    source = {name: value.roll(1, 0) for name, value in inputs.items()}
    with torch.no_grad():
        width = run(model, inputs).vectors(Location(-1)).shape[1]
        real = [side.get("attention_mask", torch.ones(6, width)).bool() for side in (inputs, source)]
        written, read = rule.draw(*real, uniform(6, 1))
        after = interchange(model, inputs, source, Location(-1), positions=written, source_positions=read).logits
        others = interchange(model, inputs, inputs, Location(-1), positions=~written & real[0]).logits
    torch.testing.assert_close(after, run(model, source).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(others, run(model, inputs).logits, rtol=1e-4, atol=1e-5)


def test_without_blocks_the_place_itself_is_looked_at():
    """Of an LSTM the last state answers; of models whose places have no positions nothing is to be found."""
    batch = text(6, 5, 5, labels=False).batch(range(6))
    assert resolved(Answer(), LSTM().eval(), batch, [Location(module="lstm")]) == Answer(-1)
    assert resolved(Answer(), LSTM().eval(), batch) == Answer()
    plain = vectors(6).batch(range(6))
    assert resolved(Answer(), mlp(), plain, [Location(module="1")]) == Answer()


def test_the_last_answer_that_has_a_label():
    """A causal model says nothing of what follows its last token, so with labels it answers last at the one before."""
    batch = text(6, labels=False).batch(range(6))
    known = batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    assert resolved(Answer(), spread(gpt2_lm(2)), known) == Answer(-2)
    tagger = spread(bert_with("TokenClassification", 2, num_labels=3))
    tags = torch.where(batch["special_tokens_mask"].bool() | (batch["attention_mask"] == 0), -100, 1)
    assert resolved(Answer(), tagger, batch | {"labels": tags}) == Answer(-2)
    first = torch.full_like(tags, -100)
    first[:, 1] = 1  # the second token of rows of other lengths: no one token from the end
    assert resolved(Answer(), tagger, batch | {"labels": first}) == Answer(-1)


class MeanPooled(nn.Module):
    """A BERT whose answer is of the mean of its tokens."""

    def __init__(self):
        super().__init__()
        self.bert, self.head = bert(2).bert, nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask):
        states = self.bert(input_ids, attention_mask=attention_mask)[0] * attention_mask[..., None]
        return self.head(states.sum(1) / attention_mask.sum(1, keepdim=True))


def test_a_mean_over_tokens_has_no_answering_position():
    student = MeanPooled().eval()
    refused = r"Answer\(\) finds no answering position in this MeanPooled.* depend on 3 to 9 tokens .*Answer\(token=0\)"
    with pytest.raises(DistillError, match=refused):
        resolved(Answer(), student, text(24).batch(range(24)))
    with pytest.raises(DistillError, match=r"answers depend on 64 tokens of a row at module:conv2; name a token"):
        resolved(Answer(), CNN().eval(), images(4).batch(range(4)), [Location(module="conv2")])
    with pytest.raises(DistillError, match=r"no answering position in this MeanPooled"):
        fit(MeanPooled(), student, "full", text(8), objective=[KD(), DIITO(positions=Answer())], steps=1, console=QUIET)


def test_tokens_are_counted_over_real_ones():
    for side, token, columns in (("right", -1, [9, 3, 0]), ("left", 0, [0, 6, 9]), ("right", 0, [0, 0, 0])):
        written, read = Answer(token).draw(PADDED[side], PADDED["none"], uniform(3, 1))
        assert written.nonzero()[:, 1].tolist() == columns
        assert read.nonzero()[:, 1].tolist() == [token % 10] * 3
    with pytest.raises(DistillError, match=r"Answer\(token=4\) does not exist in row 1 .* 4 real tokens; use Ans"):
        Answer(4).draw(PADDED["right"], PADDED["none"], uniform(3, 1))
    with pytest.raises(DistillError, match=r"Answer\(token=-2\) does not exist in row 2 .* 1 real tokens; use .*=-1"):
        Answer(-2).draw(PADDED["none"], PADDED["left"], uniform(3, 1))
    with pytest.raises(DistillError, match=r"Answer\(\) is not known for a model yet.*name it: Answer\(token=0\)"):
        Answer().draw(PADDED["none"], PADDED["none"], uniform(3, 1))


@pytest.mark.parametrize(("make", "token"), [(bert, 0), (gpt2, -1), (vit, 0)])
def test_training_and_measuring_at_the_answer_are_those_at_its_token(make, token):
    teacher, start, data = spread(make(3), 0, 0.5), spread(make(2), 1, 0.5), rows(make)
    found = []
    for rule in (Answer(), Answer(token)):
        student = copy.deepcopy(start)
        fit(teacher, student, {Location(0): Location(0)}, data, objective=[KD(), DIITO(positions=rule)], steps=3,
            batch_size=4, console=QUIET)  # fmt: skip
        measured = interchange_accuracy(teacher, student, {Location(0): Location(0)}, data, pairs=20, positions=rule)
        found.append((weights(student), measured.iia, measured.overall.count))
    assert same(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    assert found[0][2]


def test_an_objective_that_was_not_prepared_says_so():
    teacher, student = spread(bert(3)), spread(bert(2))
    entries = entries_of("full", teacher, student)
    with pytest.raises(DistillError, match=r"Answer\(\) is not known for a model yet"):
        Computation(teacher, student, entries, [DIITO(positions=Answer())])(
            text(4).batch(range(4)), torch.Generator().manual_seed(0)
        )
