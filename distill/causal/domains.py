"""Domains: the values that a variable of a causal model may take, and the classes that they number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from distill.causal.values import Values, describe
from distill.errors import DistillError

WHOLE = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


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

    @cached_property
    def _first(self) -> int | None:
        """The first value, where each is the whole number after the one before; None of any other domain."""
        whole = not self.values.is_floating_point() and not self.values.is_complex()
        first = int(self.values[0]) if whole else 0
        return first if whole and self.values.tolist() == list(range(first, first + len(self))) else None

    def holds_span(self, values: Tensor) -> bool:
        """Return whether the least and the greatest of some values show that all are in the domain.

        This is not known of a domain with gaps, of real values, and of those on a device, which would be waited for.
        """
        if self._first is None or not values.is_cpu or values.dtype not in WHOLE or not values.numel():
            return False
        least, greatest = torch.aminmax(values)
        return self._first <= int(least) and int(greatest) < self._first + len(self)

    def index(self, values: Tensor) -> Int[Tensor, " batch"]:
        """Return the place of each value in the domain, −1 for a value outside it."""
        if self._first is not None and self.holds_span(values):
            return values.long() - self._first
        dtype = torch.promote_types(torch.promote_types(values.dtype, self.values.dtype), torch.uint8)
        if values.is_floating_point() and self.values.is_floating_point():
            dtype = self.values.dtype
        table, order = self._sort(values.device, dtype)
        wanted = values.to(dtype).contiguous()
        place = torch.searchsorted(table, wanted).clamp(max=len(table) - 1)
        return torch.where(table[place] == wanted, order[place], -1)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw `n` of the values, each with the same probability, on the device of `generator`."""
        values = self.values.to(generator.device)
        return values[torch.randint(len(values), (n,), generator=generator, device=generator.device)]

    def _sort(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the values sorted, and the place of each in the domain; computed once for each device and dtype."""
        if (device, dtype) not in self._sorted:
            table, order = self.values.to(device, dtype).sort()
            self._sorted[device, dtype] = (table, order)
        return self._sorted[device, dtype]


def domain_of(name: str, given: Any) -> Domain:
    """Return the domain of a variable, from a range, a sequence or a 1-D tensor; a `Domain` is returned as it is.

    Raises:
        DistillError: no numbers, or one twice.
    """
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
    """Return the first variable with a value outside its domain, and the row of that value; None if there is none.

    Raises:
        DistillError: a variable with a domain has more than one number an example.
    """
    found = {}
    for name, domain in domains.items():
        if values[name].ndim > 1:
            raise DistillError(
                f"{what} {describe(values[name])} as {name!r}, which has a domain of numbers; give one number an "
                "example, or no domain."
            )
        if not domain.holds_span(values[name]):
            found[name] = domain.index(values[name]) < 0
    if not found or not bool(torch.stack(list(found.values())).any()):  # one look at the device, not one a variable
        return None
    name, outside = next((name, outside) for name, outside in found.items() if bool(outside.any()))
    return name, int(outside.nonzero()[0])


def number_classes(name: str, output: Tensor, domain: Domain | None) -> Tensor:
    """Return the class of each output: its place in the domain, 0 or 1 for a bool, the value itself if real.

    Args:
        name: the variable that is the output.
        output: its values.
        domain: its domain, if it has one.

    Raises:
        DistillError: whole numbers without a domain.
    """
    if domain is not None:
        return domain.index(output)
    if output.dtype == torch.bool and output.ndim == 1:
        return output.long()
    if output.is_floating_point():
        return output
    highest = int(output.max()) if output.numel() else 1
    raise DistillError(
        f"the output {name!r} is {describe(output)} without a domain, so its classes are not known; give one number an "
        f"example and domains={{{name!r}: range({highest + 1})}}."
    )
