"""Inputs that a causal model draws, in place of rows of data."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.causal_models import CausalModel

SAMPLED_STEPS = 2000  # where nobody says how long to train


@dataclass(frozen=True, eq=False)
class Samples:
    """Rows without end, of which `count` are trained on: a batch is decided by the seed and the numbers of its rows."""

    model: CausalModel
    seed: int
    count: int

    def __len__(self) -> int:
        return self.count

    def batch(self, rows: Iterable[int] | Tensor) -> dict[str, Tensor]:
        """The values of the inputs of so many examples."""
        numbers = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        generator = torch.Generator().manual_seed(hash((self.seed, *numbers)) % 2**63)
        return self.model.sample(len(numbers), generator)
