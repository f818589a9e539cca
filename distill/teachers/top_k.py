"""The largest logits of an answer, and how much the others are together.

It goes where the teacher is, so what it imports needs torch alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor

from distill.precision import widen

Kept = dict[str, Tensor]
"""What is kept of logits `[..., classes]`: `logits`, or of the k largest `values` and `indices` `[..., k]` (the largest
first) and the `level` `[..., 1]` of the others, with the number of `classes`."""


@dataclass(frozen=True)
class TopK:
    """Keeps the k largest logits z of an output, and of the rest R one number: the level that all of it gets.

    That is τ log( Σ_{j in R} exp(z_j / τ) / |R| ), so that softmax(z / τ) keeps the probabilities of the k largest, and
    the sum of those of the rest.

    Args:
        k: how many; None, or as many as there are classes, keeps the logits as they are.
        temperature: τ.
        reads: finds the logits in an output.

    >>> kept = TopK(1)(torch.tensor([[6.0, 3.0, 1.0]]).log())
    >>> dense(kept).softmax(-1)
    tensor([[0.6000, 0.2000, 0.2000]])
    """

    k: int | None
    temperature: float = 1.0
    reads: Callable[[Any], Tensor] | None = None

    def __call__(self, output: Any) -> Kept:
        """What is kept of the output of a model."""
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
    """Logits `[..., classes]` again, in single precision at least where they are of the largest alone."""
    if "logits" in kept:
        return kept["logits"]
    values, level = widen(kept["values"]), kept["level"]
    dtype = torch.promote_types(values.dtype, level.dtype)
    everywhere = level.to(dtype).expand(*level.shape[:-1], int(kept["classes"]))
    return everywhere.scatter(-1, kept["indices"].long(), values.to(dtype))


def nothing(output: Any) -> None:
    """Keeps nothing of the output of a model."""
    return None
