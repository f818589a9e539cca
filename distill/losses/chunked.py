"""Means of losses over logits that are made for a few positions at a time, forward and backward.

The logits of a language model, `[batch, token, vocabulary]`, are W h of the last hidden states h and the weights W of
its head, and a loss over them holds several copies. Here W h, the loss and its gradients by h and W are computed for
some positions, added up and let go before the next ones:

    L = Σ_c (n_c / N) L_c,    ∂L/∂h_c = (n_c / N) ∂L_c/∂h_c,    ∂L/∂W = Σ_c (n_c / N) ∂L_c/∂W,

with the mean L_c over the n_c positions of part c, by the same functions as over all. So no position is computed twice,
and the gradients wait, in single precision at least, for that of L.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.losses.common import take_kept
from distill.precision import at_least_single
from interventions import on_host

PARTS, LEAST, MOST = 16, 64, 1024
"""The positions are taken in 16 parts, of 64 to 1024 positions each."""


@dataclass(frozen=True, eq=False)
class LazyLogits:
    """Logits `[*batch, classes]` that are made when they are needed, for a few positions at a time.

    Attributes:
        rows: tensors `[*batch, …]` from which they are made, position by position.
        make: makes the logits of some positions, from those of each of the rows, with tensors in place of `weights`.
        weights: the trained parameters that it uses, by name.
        classes: how many there are.
    """

    rows: tuple[Tensor, ...]
    make: Callable[[Sequence[Tensor], Mapping[str, Tensor]], Tensor]
    weights: Mapping[str, Tensor]
    classes: int

    @property
    def shape(self) -> torch.Size:
        """The shape of the logits."""
        return torch.Size([*self.rows[0].shape[:-1], self.classes])

    @property
    def ndim(self) -> int:
        """The number of axes of the logits."""
        return self.rows[0].ndim

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "LazyLogits":
        """Return the logits of other positions: a function that selects them is applied to each of the rows."""
        return replace(self, rows=tuple(map(function, self.rows)))

    def zero(self) -> Tensor:
        """Return 0 with a graph to all that the logits depend on."""
        parts = [rows[..., :0] for rows in self.rows if rows.is_floating_point()]
        return sum((each.flatten()[:0].sum() for each in self.weights.values()), start=parts[0].sum())

    def of(self, chosen: slice) -> Tensor:
        """Return the logits of some of the positions, `[n, classes]`, of rows `[N, …]`."""
        return self.make([rows[chosen] for rows in self.rows], {})


def size_of_parts(positions: int) -> int:
    """Return how many of some positions are taken at a time."""
    return min(MOST, max(LEAST, -(-positions // PARTS)))


def logits_at(logits: Tensor | LazyLogits, places: Sequence[Tensor]) -> Tensor:
    """Return the logits at some positions, `[n, classes]`.

    Args:
        logits: `[*batch, classes]`.
        places: the numbers of the positions along each axis of the batch, `[n]` each.
    """
    if isinstance(logits, Tensor):
        return logits[tuple(places)]
    there = tuple(each.to(logits.rows[0].device) for each in places)
    return logits.mapped(lambda rows: rows[there]).of(slice(None))


def mean_in_chunks(
    loss: Callable[..., Tensor], student: LazyLogits, *others: LazyLogits | Tensor, mask: Tensor | None = None
) -> Tensor:
    """Return the mean of a loss over positions, made and differentiated for a few of them at a time.

    Args:
        loss: from logits `[n, classes]` of the student, and as much of each of the others, to their mean.
        student: its logits, `[*batch, classes]`.
        others: what they are compared with, without a graph: logits, made in parts too or whole, or labels `[*batch]`.
        mask: the positions that count, `[*batch]`, at least one; None for all. Nothing is made of the others.
    """
    student = student.mapped(lambda rows: _flat(rows, 1, mask))
    parts = [_parts_of(other, mask) for other in others]
    mean = _Mean(loss, student, lambda chosen: [part(chosen) for part in parts])
    tensors = (*student.rows, *student.weights.values())
    if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
        value: Tensor = _Differentiated.apply(mean, *tensors)
        return value
    with torch.no_grad():
        return mean.value()


def _flat(values: Tensor, kept_axes: int, mask: Tensor | None) -> Tensor:
    """Return values `[*batch, *rest]`, with as many axes in the rest, as `[N, *rest]`, at the positions that count."""
    if not kept_axes:
        return _flat(values[..., None], 1, mask)[:, 0]
    return rearrange(values, "... width -> (...) width") if mask is None else take_kept(values, mask)


def _parts_of(other: LazyLogits | Tensor, mask: Tensor | None) -> Callable[[slice], Tensor]:
    """Return a function that gives the part of what is compared with at some of the positions that count."""
    if isinstance(other, LazyLogits):
        return other.mapped(lambda rows: _flat(rows, 1, mask)).of
    if not other.is_floating_point():
        labels = _flat(other, 0, mask)
        return lambda chosen: labels[chosen]
    flat = rearrange(other, "... classes -> (...) classes")
    if mask is None or bool(on_host(mask).all()):
        return lambda chosen: flat[chosen]
    left = on_host(mask).bool().flatten().nonzero()[:, 0].to(flat.device, non_blocking=True)
    return lambda chosen: flat.index_select(0, left[chosen])


@dataclass(frozen=True, eq=False)
class _Mean:
    """A mean of a loss over the positions of a student, `[N, classes]`, and what `parts` gives of the others."""

    loss: Callable[..., Tensor]
    student: LazyLogits
    parts: Callable[[slice], list[Tensor]]

    def chunks(self) -> list[tuple[slice, float]]:
        """Return the positions of each part, with its share of all."""
        count = len(self.student.rows[0])
        size = size_of_parts(count)
        cuts = [slice(first, min(first + size, count)) for first in range(0, count, size)]
        return [(cut, (cut.stop - cut.start) / count) for cut in cuts]

    def value(self) -> Tensor:
        """Return the mean."""
        values = [self.loss(self.student.of(chosen), *self.parts(chosen)) * share for chosen, share in self.chunks()]
        return torch.stack(values).sum()

    def value_and_gradients(self) -> tuple[Tensor, list[Tensor | None]]:
        """Return the mean and its gradients by the rows and the weights of the student, None where it has none."""
        rows, names = self.student.rows, list(self.student.weights)
        weights = [_leaf(each) for each in self.student.weights.values()]
        by_row: list[list[Tensor]] = [[] for _ in rows]
        by_weight: list[Tensor | None] = [None] * len(weights)
        values = []
        for chosen, share in self.chunks():
            others, here = self.parts(chosen), [_leaf(each[chosen], like=each) for each in rows]
            with torch.enable_grad():
                logits = self.student.make(here, dict(zip(names, weights, strict=True)))
                value = self.loss(logits, *others)
            del logits, others
            by = [each for each in (*here, *weights) if each.requires_grad]
            found = iter(torch.autograd.grad(value, by, allow_unused=True))
            for kept, each in zip(by_row, here, strict=True):
                if each.requires_grad:
                    gradient = next(found)
                    kept.append(torch.zeros_like(each) if gradient is None else _widened(gradient) * share)
            for number, gradient in enumerate(found):
                by_weight[number] = _added(by_weight[number], gradient, share)
            values.append(value.detach() * share)
        gradients = [torch.cat(kept) if kept else None for kept in by_row]
        return torch.stack(values).sum(), [*gradients, *by_weight]


class _Differentiated(torch.autograd.Function):
    """A mean whose gradients were computed with it."""

    @staticmethod
    def forward(ctx: Any, mean: _Mean, *tensors: Tensor) -> Tensor:
        value, gradients = mean.value_and_gradients()
        ctx.dtypes = [each.dtype for each in tensors]
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        both = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, *(None if each is None else (each * outer).to(dtype) for each, dtype in both)


def _leaf(values: Tensor, like: Tensor | None = None) -> Tensor:
    """Return the values cut off from their graph, to be differentiated by if they have one, or what is like them."""
    return values.detach().requires_grad_((values if like is None else like).requires_grad)


def _widened(gradient: Tensor) -> Tensor:
    return gradient.to(at_least_single(gradient.dtype))


def _added(total: Tensor | None, gradient: Tensor | None, share: float) -> Tensor | None:
    """Return a sum of gradients with one more, times its share, in place."""
    if gradient is None:
        return total
    return _widened(gradient) * share if total is None else total.add_(gradient, alpha=share)
