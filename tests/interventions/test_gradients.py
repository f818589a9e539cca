"""Gradients reach base and source, and are those of three whole runs with hooks written by hand."""

import pytest
import torch

from interventions import Location, architecture, interchange, run
from tests.interventions.tiny_models import OTHERS, TRANSFORMERS, answer, batch, make, middle

EVERY = [*TRANSFORMERS, *OTHERS]


def naive_interchange(model, module, base, source, dims) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Base, source and counterfactual logits by three whole runs and hooks written by hand."""
    kept = []

    def first(value: object) -> torch.Tensor:
        return value if isinstance(value, torch.Tensor) else value[0]

    with module.register_forward_hook(lambda module, args, output: kept.append(first(output))):
        ran = answer(model, base), answer(model, source)

    def swap(module, args, output) -> object:
        inside = torch.zeros(first(output).shape[1 if first(output).ndim == 4 else -1], dtype=torch.bool)
        inside[dims] = True
        inside = inside[:, None, None] if first(output).ndim == 4 else inside
        new = torch.where(inside, kept[1], first(output))
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    with module.register_forward_hook(swap):
        return (*ran, answer(model, base))


def doubled(inputs: object) -> object:
    if isinstance(inputs, dict):
        return {key: doubled(value) for key, value in inputs.items()}
    return inputs.double() if inputs.is_floating_point() else inputs


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_those_of_three_naive_runs(name):
    model, place = make(name).double(), middle(name, dims=range(2, 8))
    base, source = doubled(batch(name)), doubled(batch(name, seed=2))
    module = architecture(model).place(place).module

    def gradients(logits: tuple) -> list[torch.Tensor]:
        loss = sum(weight * (x * x).sum() for weight, x in zip((1, 2, 3), logits, strict=True))
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return [torch.zeros(()) if grad is None else grad for grad in found]

    ours_base, ours_source = run(model, base), run(model, source)
    counterfactual = interchange(model, ours_base, ours_source, place)
    naive = naive_interchange(model, module, base, source, range(2, 8))
    assert torch.equal(counterfactual.logits, naive[2])
    for ours, theirs in zip(
        gradients((ours_base.logits, ours_source.logits, counterfactual.logits)), gradients(naive), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm() + 1e-9  # Llama and T5 normalise in fp32


@pytest.mark.parametrize("who", ["base", "source"])
def test_gradients_reach_base_and_source_alone(who):
    model, place = make("vit"), Location(1, dims=range(4))
    base, source = batch("vit"), batch("vit", seed=2)
    given = {"base": base, "source": source}[who]["pixel_values"].requires_grad_()
    interchange(model, run(model, base), source, place).logits.sum().backward()
    assert given.grad.abs().sum() > 0
