"""The arguments of a call by name, and what a tap sees of it."""

from inspect import signature

import pytest
import torch
from torch import nn

from interventions.hooks.scopes import Scope
from interventions.models.calls import Call, CallContext, bind_arguments, signature_of
from interventions.tracing.current_call import CurrentCall


class Doubled(nn.Module):
    def forward(self, x, *, scale=2.0, **more):
        return x * scale


class Tripled(Doubled):
    def forward(self, x, factor=3.0):
        return x * factor


def test_a_signature_is_that_of_inspect():
    for module in (Doubled(), Tripled(), nn.Linear(2, 2), nn.LSTM(2, 2)):
        assert signature_of(module.forward) == signature(module.forward)
    replaced = Doubled()
    replaced.forward = lambda y: y
    assert list(signature_of(replaced.forward).parameters) == ["y"]
    assert list(signature_of(Doubled().forward).parameters) == ["x", "scale", "more"]


def test_arguments_are_named_with_those_gathered():
    x = torch.ones(1)
    assert bind_arguments(Doubled(), (x,), {"scale": 3.0, "mask": None}).keys() == {"x", "scale", "more", "mask"}
    assert bind_arguments(Tripled(), (x, 4.0), {}) == {"x": x, "factor": 4.0}
    with pytest.raises(TypeError):
        signature_of(Tripled().forward).bind()


def test_hooks_and_traces_keep_what_a_tap_sees_of_the_running_call():
    assert isinstance(Scope(nn.Linear(1, 1)), CallContext)
    assert isinstance(CurrentCall(), CallContext)
    assert not isinstance(Call(nn.Linear(1, 1), {}, 0, None, None), CallContext)
