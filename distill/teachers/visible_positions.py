"""Which positions of a place an answer depends on, by gradients that are taken where the model is.

It goes where the teacher is, so it imports torch alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Probe:
    """An operator that changes nothing, and keeps what gradients are taken by: a zero that is added."""

    needs_source = False

    def __init__(self) -> None:
        self.zero: Tensor | None = None

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        self.zero = torch.zeros_like(base).requires_grad_()
        return base + self.zero


class VisiblePositions:
    """From an output to one mask `[batch, position]` (`[batch, 1]` without positions) for each probe.

    A position that the output cannot see has a gradient of exactly 0. None where the output has no graph.

    Args:
        probes: what stands at the places.
        weights: which predictions count.
        reads: finds the logits in an output.
    """

    def __init__(self, probes: list[Probe], weights: Tensor, reads: Callable[[Any], Tensor]) -> None:
        self.probes, self.weights, self.reads = probes, weights, reads

    def __call__(self, output: Any) -> list[Tensor] | None:
        logits = self.reads(output)
        zeros = [probe.zero for probe in self.probes if probe.zero is not None]
        if not logits.requires_grad:
            return None
        found = torch.autograd.grad(mixed(logits, self.weights), zeros, allow_unused=True)
        return [nonzero(zero, gradient) for zero, gradient in zip(zeros, found, strict=True)]


def mixed(logits: Tensor, weights: Tensor) -> Tensor:
    """One number that depends on all logits of the predictions that count, each with a factor of its own."""
    factors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    return (logits * factors * weights.to(logits)[..., None]).sum()


def nonzero(probe: Tensor, gradient: Tensor | None) -> Tensor:
    """Where any entry of a gradient is not 0, `[batch, position]`."""
    seen = torch.zeros_like(probe) if gradient is None else gradient
    mask = seen != 0
    return mask.flatten(2).any(-1) if mask.ndim > 2 else mask.any(-1, keepdim=True)
