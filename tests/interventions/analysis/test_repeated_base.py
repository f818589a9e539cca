"""The base repeated is the run of the repeated base."""

import pytest
import torch

from interventions import run
from interventions.analysis.repeated_base import RepeatedBase
from interventions.execution.run import rows_of
from tests.interventions.analysis.test_passes import Odds
from tests.interventions.analysis.test_sweeps import counted
from tests.interventions.tiny_models import TRANSFORMERS, batch, make

TWICE = ("t5",)
"""Models whose blocks return more than a hidden state, so that the base runs once more with twice the examples."""


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [each for entry in value for each in tensors(entry)] if isinstance(value, tuple | list) else []


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_what_blocks_returned_is_that_of_the_run_of_the_repeated_inputs(name, size):
    model, inputs = make(name), batch(name, size=size)
    base = run(model, inputs)
    count = len(base.recording.calls)
    expected = run(model, rows_of(base.inputs, torch.arange(size).repeat(3)))
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    repeated = RepeatedBase(run(model, inputs))
    calls.clear()
    for first in (1, count):  # more of them, later
        found = repeated.times(3, first)
        for one, other in zip(found.recording.calls[:first], expected.recording.calls[:first], strict=True):
            assert one.block is other.block
            for state, whole in zip(tensors(one.raw), tensors(other.raw), strict=True):
                torch.testing.assert_close(state, whole, rtol=1e-5, atol=1e-5)
        assert all(call.is_intact for call in found.recording.calls)
    handle.remove()
    assert len(calls) == (name in TWICE)
    assert {key: value.shape for key, value in found.inputs.items() if isinstance(value, torch.Tensor)} == {
        key: value.shape for key, value in expected.inputs.items() if isinstance(value, torch.Tensor)
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("value", "runs"),
    [
        (lambda x: None, 0),
        (lambda x: (x.new_zeros(1, 2), [x.new_zeros(3, 3)]), 1),
        (lambda x: x.transpose(0, 1), 1),
        (
            lambda x: x.new_zeros(len(x), len(x)),
            3,
        ),  # both axes are longer: it runs with twice, and three and four times
        (lambda x: iter(x), 2),
    ],
    ids=["a state", "shared", "second axis", "two axes", "an object"],
)
def test_where_shapes_do_not_say_how_it_is_run_anew(value, runs):
    torch.manual_seed(0)
    model, inputs = Odds(value).eval(), torch.randn(3, 4, 8)
    repeated = RepeatedBase(run(model, inputs))
    with counted(model, "blocks") as calls:
        for times in (3, 4, 3):
            found = repeated.times(times, 3).recording
            expected = tensors(found.calls[2].raw)
    assert calls["model"] == runs
    again = run(model, inputs.repeat(3, 1, 1)).recording
    for state, whole in zip(expected, tensors(again.calls[2].raw), strict=True):
        torch.testing.assert_close(state, whole)


def test_once_is_the_run_itself_with_options():
    model, inputs = make("gpt2"), batch("gpt2")
    base = run(model, inputs)
    found = RepeatedBase(base, {"logits_to_keep": 1}).times(1, 2)
    assert found.recording is base.recording
    assert found.inputs == {**base.inputs, "logits_to_keep": 1}
