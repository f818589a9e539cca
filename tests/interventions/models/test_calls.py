"""What a call is given, by name."""

from inspect import signature

import pytest
import torch
from torch import nn

from interventions.models.calls import named, signature_of


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
    assert named(Doubled(), (x,), {"scale": 3.0, "mask": None}).keys() == {"x", "scale", "more", "mask"}
    assert named(Tripled(), (x, 4.0), {}) == {"x": x, "factor": 4.0}
    with pytest.raises(TypeError):
        signature_of(Tripled().forward).bind()
