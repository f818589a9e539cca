"""The values that a variable of a causal model may take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from distill.causal.values import Values, described
from distill.errors import DistillError


@dataclass(frozen=True, eq=False)
class Domain:
    """The values that a variable may take, in the order in which classes are numbered."""

    values: Tensor
    _sorted: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

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
        table, order = self._in_order(values.device, dtype)
        wanted = values.to(dtype).contiguous()
        place = torch.searchsorted(table, wanted).clamp(max=len(table) - 1)
        return torch.where(table[place] == wanted, order[place], -1)

    def _in_order(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The values sorted, and where each stands in the domain: once for each device and dtype."""
        if (device, dtype) not in self._sorted:
            table, order = self.values.to(device, dtype).sort()
            self._sorted[device, dtype] = (table, order)
        return self._sorted[device, dtype]


def domain_of(name: str, given: Any) -> Domain:
    """The domain that a range, a sequence or a 1-D tensor stands for; a domain of another model is taken as it is."""
    if isinstance(given, Domain):
        return given
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


def first_outside(values: Values, domains: Mapping[str, Domain], what: str) -> tuple[str, int] | None:
    """The first variable with a value outside its domain, and the row of that; None if there is none.

    Raises:
        DistillError: more than one number an example.
    """
    found = {}
    for name, domain in domains.items():
        if values[name].ndim > 1:
            raise DistillError(
                f"{what} {described(values[name])} as {name!r}, which has a domain of numbers; give one number an "
                "example, or no domain."
            )
        found[name] = domain.index(values[name]) < 0
    if not found or not bool(torch.stack(list(found.values())).any()):  # one look at the device, not one a variable
        return None
    name, outside = next((name, outside) for name, outside in found.items() if bool(outside.any()))
    return name, int(outside.nonzero()[0])
