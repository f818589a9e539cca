"""The k largest logits of an answer, and one number for all others.

A served teacher sends only these. For logits z of C classes, of which R are not among the k largest, it sends the k
largest and the level ℓ = τ log( Σ_{j in R} exp(z_j / τ) / |R| ). The student's teacher has the logits z_j for the k
largest and ℓ for the rest, so that softmax(z / τ) keeps the probabilities of the k largest and the sum of the others.

This file is sent to where the teacher runs, so its imports need only torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor

from distill.precision import widen

Kept = dict[str, Tensor]
"""Logits `[..., classes]` as they are kept: as `logits`; or as the `values` and `indices` `[..., k]` of the k largest
(the largest first), the `level` `[..., 1]` of the others, and the number of `classes`."""


@dataclass(frozen=True)
class TopK:
    """A function that keeps the k largest logits of an output, and one level for all others.

    Args:
        k: the number of logits to keep; None, or the number of classes, keeps the logits as they are.
        temperature: τ.
        reads: finds the logits in an output; None if the output is the logits.

    >>> kept = TopK(1)(torch.tensor([[6.0, 3.0, 1.0]]).log())
    >>> dense(kept).softmax(-1)
    tensor([[0.6000, 0.2000, 0.2000]])
    """

    k: int | None
    temperature: float = 1.0
    reads: Callable[[Any], Tensor] | None = None

    def __call__(self, output: Any) -> Kept:
        """Return the logits of an output as they are kept."""
        logits: Tensor = (output if self.reads is None else self.reads(output)).detach()
        classes = logits.shape[-1]
        if self.k is None or self.k >= classes:
            return {"logits": logits}
        values, indices = logits.topk(self.k, dim=-1)
        softened = widen(logits) / self.temperature
        rest = softened.scatter(-1, indices, float("-inf")).logsumexp(-1, keepdim=True)
        level = self.temperature * (rest - log(classes - self.k))
        return {
            "values": values,
            "indices": indices.to(torch.int32),
            "level": level,
            "classes": torch.tensor(classes, dtype=torch.int32),
        }


def dense(kept: Kept) -> Tensor:
    """Return kept logits as `[..., classes]`, in single precision at least if only the largest were kept."""
    if "logits" in kept:
        return kept["logits"]
    values, level = widen(kept["values"]), kept["level"]
    dtype = torch.promote_types(values.dtype, level.dtype)
    everywhere = level.to(dtype).expand(*level.shape[:-1], int(kept["classes"]))
    return everywhere.scatter(-1, kept["indices"].long(), values.to(dtype))


def nothing(output: Any) -> None:
    """Return None: keep nothing of the output of a model."""
    return None
