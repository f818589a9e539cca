"""Random vectors that are written at places of several widths: one vector, projected to the width of each place."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from interventions import Location, Mixup, Noise, Run, architecture


def narrow(normal: Float[Tensor, "*batch wide"], width: int) -> Float[Tensor, "*batch narrow"]:
    """Return standard normal vectors in fewer dims, by a fixed semi-orthogonal map: they stay standard normal."""
    wide = normal.shape[-1]
    return normal if wide == width else normal @ _semi_orthogonal(wide, width, normal.dtype, normal.device)


@lru_cache(maxsize=16)  # the places of a mapping have few widths, and the decomposition takes as long as a block
def _semi_orthogonal(wide: int, width: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "wide narrow"]:
    """Return a fixed matrix with orthonormal columns."""
    gaussian = torch.randn(wide, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.inference_mode(False):
        return torch.linalg.qr(gaussian).Q.to(device, dtype)


def is_pattern(run: Run, place: Location) -> bool:
    """Return whether a location holds attention patterns."""
    return architecture(run.model).place(place).io == "attention_pattern"


@dataclass(frozen=True, eq=False)
class Attended:
    """An operator on attention patterns that leaves weights of 0, those of masked keys, at 0."""

    op: Mixup | Noise
    needs_source: ClassVar[bool] = False

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return torch.where(base == 0, base, self.op(base, source, generator))
