"""The positions of a location that an answer depends on, found by gradients where the model runs.

A zero is added to the activations at the location. Position p is visible if the gradient of a random mixture of the
logits, Σ_c r_c z_c, with respect to the zero at p has an entry other than 0.

This file is sent to where the teacher runs, so it imports only torch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Probe:
    """An operator that adds a zero to the activations, and keeps that zero to take gradients with respect to it."""

    needs_source = False

    def __init__(self) -> None:
        self.zero: Tensor | None = None

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        self.zero = torch.zeros_like(base).requires_grad_()
        return base + self.zero


class VisiblePositions:
    """A function from an output to one mask for each probe, `[batch, position]` (`[batch, 1]` without positions).

    A position that the output does not depend on has a gradient of exactly 0. The result is None if the output has no
    graph.

    Args:
        probes: the operators at the locations.
        weights: the weight of each prediction; 0 leaves it out.
        reads: finds the logits in an output.
    """

    def __init__(self, probes: list[Probe], weights: Tensor, reads: Callable[[Any], Tensor]) -> None:
        self.probes, self.weights, self.reads = probes, weights, reads

    def __call__(self, output: Any) -> list[Tensor] | None:
        logits = self.reads(output)
        zeros = [probe.zero for probe in self.probes if probe.zero is not None]
        if not logits.requires_grad:
            return None
        found = torch.autograd.grad(mix_logits(logits, self.weights), zeros, allow_unused=True)
        return [nonzero_positions(zero, gradient) for zero, gradient in zip(zeros, found, strict=True)]


def mix_logits(logits: Tensor, weights: Tensor) -> Tensor:
    """Return a mixture of all logits, each times a fixed random factor and the weight of its prediction."""
    factors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    return (logits * factors * weights.to(logits)[..., None]).sum()


def nonzero_positions(probe: Tensor, gradient: Tensor | None) -> Tensor:
    """Return the positions at which any entry of a gradient is not 0, `[batch, position]`; None is a gradient of 0."""
    mask = torch.zeros_like(probe) != 0 if gradient is None else gradient != 0
    return mask.flatten(2).any(-1) if mask.ndim > 2 else mask.any(-1, keepdim=True)
