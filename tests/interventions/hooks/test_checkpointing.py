"""Gradient checkpointing: what is computed again sees the interventions of the forward it repeats."""

from functools import partial

import pytest
import torch
from torch import nn

from interventions import Location, Noise, Zero, interchange, intervene, run
from tests.interventions.tiny_models import INNER, TRANSFORMERS, answer, batch, make, trace


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]


def written(model, inputs, place, op, seed, inside):
    torch.manual_seed(0)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with intervene(model, place, op=op, generator=generator) as handle:
        loss = answer(model, inputs).square().sum()
        found = gradients(model, loss) if inside else None
    return found or gradients(model, loss), handle, generator


def resumed(model, inputs, place, op, seed, inside):
    torch.manual_seed(0)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    done = interchange(model, run(model, inputs), None, {place: op}, generator=generator)
    return gradients(model, done.logits.square().sum()), None, generator


@pytest.mark.parametrize("op", [(Zero(), None), (Noise(0.5), 3), (Noise(0.5), None)], ids=["zero", "seeded", "default"])
@pytest.mark.parametrize(
    "way", [partial(written, inside=True), partial(written, inside=False), partial(resumed, inside=None)]
)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_checkpointed_gradients_are_the_gradients(name, reentrant, way, op):
    model, inputs, place = make(name).train(), batch(name), Location(module=INNER[name][0])
    expected, handle, generator = way(model, inputs, place, *op)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    before = trace(model)
    got, handle_too, generator_too = way(model, inputs, place, *op)
    size = max(grad.norm() for grad in expected)
    assert all((one - other).norm() <= 1e-5 * size for one, other in zip(expected, got, strict=True))
    assert trace(model) == before
    assert handle is None or (handle_too.firings == handle.firings == {place: 1} and handle_too.change == handle.change)
    assert generator is None or torch.equal(generator.get_state(), generator_too.get_state())
