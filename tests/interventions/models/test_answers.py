"""Which part of an output is the answer: by a rule that holds for all kinds of outputs, or as `answers` says."""

from collections import namedtuple
from dataclasses import dataclass
from threading import Thread

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from interventions import InterventionError, Location, Zero, answering, interchange, intervene, logits_of, run

LOGITS, OTHER, LOSS = torch.randn(2, 3), torch.randn(2, 5), torch.tensor(0.5)

POOLED = BaseModelOutputWithPooling(last_hidden_state=OTHER, pooler_output=LOGITS)


@dataclass
class Output:
    scores: Tensor
    loss: Tensor | None = None
    other: Tensor | None = None


Named = namedtuple("Named", "scores loss")

ONE = {
    "a tensor": LOGITS,
    "logits, None": (LOGITS, None),
    "logits, loss": (LOGITS, LOSS),
    "loss, logits": (LOSS, LOGITS),
    "a list": [LOGITS],
    "a dict of logits": {"logits": LOGITS, "other": OTHER},
    "a dict of one": {"scores": LOGITS, "loss": LOSS},
    "a named tuple": Named(LOGITS, 0.5),
    "a dataclass": Output(LOGITS, LOSS),
    "of transformers": ImageClassifierOutput(loss=LOSS, logits=LOGITS),
}
NAMED = {
    "a name of a dict": ({"a": OTHER, "b": LOGITS}, "b"),
    "a name of a dataclass": (Output(LOGITS, None, OTHER), "scores"),
    "a name of transformers": (POOLED, "pooler_output"),
    "an index": ((OTHER, LOGITS), 1),
    "an index from the end": ([OTHER, LOGITS], -1),
    "an index that counts None": ((None, LOGITS), 1),
    "an index of transformers": (POOLED, 1),
    "a function": ((OTHER, (LOGITS, None)), lambda output: output[1][0]),
}  # fmt: skip


@pytest.mark.parametrize("output", ONE.values(), ids=ONE)
def test_the_only_tensor_that_is_no_scalar_is_the_answer(output):
    assert logits_of(output) is LOGITS


@pytest.mark.parametrize(("output", "answers"), NAMED.values(), ids=NAMED)
def test_the_part_that_is_named_is_the_answer(output, answers):
    assert logits_of(output, answers) is LOGITS


@pytest.mark.parametrize(
    ("output", "answers", "match"),
    [
        ((LOGITS, OTHER), None, r"which part of a tuple \(0: \[2, 3\], 1: \[2, 5\]\) .*; say which: answers=0, or a f"),
        ({"last_hidden_state": LOGITS}, None, r"say which: answers='last_hidden_state'"),
        ({"a": LOGITS, "b": OTHER}, None, r"answers='a'"),
        ((LOGITS, (OTHER, OTHER)), None, r"answers=0"),
        ({}, None, r"which part of a dict is the answer"),
        ({"a": LOGITS}, "b", r"answers='b' names no part of a dict \(a: \[2, 3\]\); say which: answers='a'"),
        ((LOGITS,), 3, r"answers=3 names no part of a tuple"),
        ((LOGITS, "text"), 1, r"answers=1 gives str of a tuple .*, which is no tensor"),
        (LOGITS, 0, r"answers=0 asks for a part of an output that is a Tensor \[2, 3\], the answer itself; leave it"),
        ((LOGITS,), lambda output: output.logits, r"answers, a function, fails on a tuple \(0: \[2, 3\]\): Attribute"),
        (LOGITS, True, r"answers=True does not say what of an output is the answer; give a name, an index or a"),
        (LOGITS, 1.5, r"answers=1.5 does not say"),
    ],
)
def test_what_is_not_known_says_how_to_say_it(output, answers, match):
    with pytest.raises(InterventionError, match=match) as raised:
        logits_of(output, answers)
    assert "\n" not in str(raised.value)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        inner = self.first(x)
        return inner, self.last(inner)


def test_runs_and_counterfactual_runs_are_read_as_was_said():
    net, x = Two(), torch.randn(2, 4)
    base = run(net, x, answers=1)
    assert torch.equal(base.logits, net(x)[1])
    after = interchange(net, base, torch.randn(2, 4), Location(module="first"))
    assert torch.equal(after.logits, after.output[1])
    assert torch.equal(base.detach().logits, base.logits)
    assert torch.equal(base.take(torch.tensor([1])).logits, base.logits[1:])


def test_a_rule_holds_inside_of_its_block_and_in_its_thread():
    net, other, x, found = Two(), Two(), torch.randn(2, 4), []
    with answering(net, 1):
        inside = run(net, x)
        thread = Thread(target=lambda: found.append(run(net, x).answers))
        thread.start()
        thread.join()
        assert run(other, x).answers is None
        with answering(net, 0), answering(other, None):
            assert torch.equal(run(net, x).logits, net(x)[0])
        assert torch.equal(run(net, x).logits, net(x)[1])
    assert found == [None]
    assert torch.equal(inside.logits, net(x)[1])
    with pytest.raises(InterventionError, match="answers=0"):
        run(net, x).logits  # noqa: B018


class Answering(nn.Module):
    """Gives an output that holds its answer, a linear function of what it is given."""

    def __init__(self, make) -> None:
        super().__init__()
        self.layer, self.make = nn.Linear(4, 3), make

    def forward(self, inputs):
        return self.make(self.layer(inputs))


PLACES = {
    "logits, None": (lambda logits: (logits, None), None),
    "an index": (lambda logits: (logits + 1, logits), 1),
    "an index from the end": (lambda logits: [logits + 1, logits], -1),
    "a name": (lambda logits: {"other": logits + 1, "scores": logits}, "scores"),
    "a named tuple": (lambda logits: Named(logits + 1, logits), "loss"),
    "of transformers": (lambda logits: BaseModelOutputWithPooling(logits + 1, logits), "pooler_output"),
    "a function": (lambda logits: (logits + 1, (logits, None)), lambda output: output[1][0]),
}


@pytest.mark.parametrize(("make", "answers"), PLACES.values(), ids=PLACES)
def test_the_site_of_the_logits_is_where_the_answer_is(make, answers):
    model, inputs, at = Answering(make), torch.randn(2, 4), Location(site="logits")
    logits = model.layer(inputs)
    with answering(model, answers):
        assert torch.equal(run(model, inputs, at).activations[at], logits)
        with intervene(model, at, op=Zero()):
            output = model(inputs)
        written = interchange(model, inputs, None, {at: Zero()})
    assert type(output) is type(model(inputs))
    assert torch.equal(logits_of(output, answers), torch.zeros(2, 3))
    assert torch.equal(written.logits, torch.zeros(2, 3))
    if isinstance(output, tuple | list) and len(output) == 2 and isinstance(output[0], Tensor) and answers is not None:
        assert torch.equal(output[0], logits + 1)


def test_an_answer_that_is_computed_has_no_place():
    model, inputs = Answering(lambda logits: (logits, logits)), torch.randn(2, 4)
    with (
        answering(model, lambda output: output[0] + output[1]),
        pytest.raises(InterventionError, match=r"answers computes the logits of Answering .* have no place"),
    ):
        run(model, inputs, Location(site="logits"))
    with pytest.raises(InterventionError, match=r"returned no logits .* or say what the answer is: answers='…'"):
        run(model, inputs, Location(site="logits"))
