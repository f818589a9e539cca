"""The values that a variable of a causal model may take."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from distill.errors import DistillError


@dataclass(frozen=True, eq=False)
class Domain:
    """The values that a variable may take, in the order in which classes are numbered."""

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __str__(self) -> str:
        listed = self.values.tolist()
        return ", ".join(map(str, listed if len(listed) < 7 else [*listed[:3], "…", *listed[-2:]]))

    def index(self, values: Tensor) -> Int[Tensor, " batch"]:
        """The place of each value in the domain, −1 where it has none."""
        dtype = torch.promote_types(torch.promote_types(values.dtype, self.values.dtype), torch.uint8)
        if values.is_floating_point() and self.values.is_floating_point():
            dtype = self.values.dtype
        table, order = self.values.to(values.device, dtype).sort()
        wanted = values.to(dtype).contiguous()
        place = torch.searchsorted(table, wanted).clamp(max=len(table) - 1)
        return torch.where(table[place] == wanted, order[place], -1)


def domain_of(name: str, given: Any) -> Domain:
    """The domain that a range, a sequence or a 1-D tensor stands for."""
    try:
        values = torch.tensor(list(given)) if isinstance(given, Sequence) else torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0)
    if values.ndim != 1 or not len(values) or len(values.unique()) < len(values):
        found = " ".join(repr(given).split())
        raise DistillError(
            f"the domain of {name!r} must be some different numbers: {found[:80]}; give a range, a list or a 1-D "
            f"tensor of them, as {name!r}: range(10) or {name!r}: (False, True)."
        )
    return Domain(values.detach().cpu().clone())
