"""Gradients of losses by the parameters of a network: their lengths, and the angle between two of them."""

from collections.abc import Sequence
from math import nan, sqrt

import torch
from torch import Tensor

Gradient = tuple[Tensor | None, ...]
"""The gradient by each parameter, None where the loss does not depend on it."""


def gradient_of(loss: Tensor, parameters: Sequence[Tensor]) -> Gradient:
    """Return the gradient of a loss, None for parameters that it does not depend on.

    A loss of exactly 0 is at its minimum: what rounding leaves of its gradient is no direction.
    """
    if not loss.requires_grad or not float(loss.detach()):
        return (None,) * len(parameters)
    return torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)


def length(gradient: Gradient) -> float:
    """Return the length of a gradient."""
    return sqrt(sum(float(each.double().square().sum()) for each in gradient if each is not None))


def cosine(one: Gradient, other: Gradient) -> float:
    """Return the cosine of the angle between two gradients; NaN where one of them is 0."""
    lengths = length(one) * length(other)
    both = ((a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None)
    return sum(float((a.double() * b.double()).sum()) for a, b in both) / lengths if lengths else nan
