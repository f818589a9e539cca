"""Sums over the tensors of a write, kept on their device, for which no write waits: changes, and NaN in sources."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from interventions.devices import is_on_host, moved

_SUMMED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def without_graph(tensor: Tensor) -> Tensor:
    """Return a tensor without its graph: itself where it has none, as `detach` is an operation too."""
    return tensor.detach() if tensor.requires_grad else tensor


@dataclass(eq=False)
class Change:
    """The size of what a write changed, for the user who reads it.

    Attributes:
        difference: the norm of the change, over the written entries of all calls; None before the first.
        before: the norm of the activation before it, over the same entries.
    """

    difference: Tensor | None = None
    before: Tensor | None = None

    def add(self, before: Tensor, after: Tensor) -> None:
        """Add the entries that one call writes, both without their graph."""
        self.include(_norm(after - before), _norm(before))

    def replace(self, before: Tensor, value: Tensor | None) -> bool:
        """Add entries that are replaced by others, or by zeros.

        Returns:
            True where this shows that no new entry is NaN, so that they need not be read again.
        """
        before, value = without_graph(before), None if value is None else without_graph(value)
        size = _norm(before)
        difference = size if value is None else _norm(value - before)
        self.include(difference, size)
        return value is None or (is_on_host(difference) and _is_number(difference.item()))

    def include(self, difference: Tensor, before: Tensor) -> None:
        """Add the norms of further entries."""
        self.difference = difference if self.difference is None else torch.hypot(self.difference, difference)
        self.before = before if self.before is None else torch.hypot(self.before, before)

    @property
    def share(self) -> float:
        """The root mean square of the change, divided by that of the activation before it; 0 if nothing was written."""
        if self.difference is None or self.before is None:
            return 0.0
        return float(self.difference / self.before.clamp_min(1e-15))


def _norm(entries: Tensor) -> Tensor:
    if entries.dtype in (torch.float16, torch.bfloat16):  # whose squares overflow from 256 on, or lose their digits
        return torch.linalg.vector_norm(entries, dtype=torch.float32)
    return torch.linalg.vector_norm(entries if entries.is_floating_point() or entries.is_complex() else entries.float())


@dataclass(eq=False)
class Missing:
    """The entries of sources that are NaN, counted on their device until a verb ends.

    Attributes:
        count: their number; None where all that was looked at so far lay on the host.
        entries: the number of all entries that were looked at.
    """

    count: Tensor | None = None
    entries: int = 0

    def look(self, part: Tensor) -> int:
        """Count the entries of a part that are NaN; return their number on the host, and 0 on another device."""
        if not part.is_floating_point() or part.is_meta:
            return 0
        part = without_graph(part)
        if is_on_host(part):
            # A sum is NaN if an entry is, and takes one operation; infinite entries of both signs give NaN too.
            return 0 if part.dtype in _SUMMED and _is_number(part.sum().item()) else int(part.isnan().sum())
        found = part.isnan().sum()
        self.count = found if self.count is None else moved(self.count, found.device) + found
        self.entries += part.numel()
        return 0


def _is_number(value: float) -> bool:
    return value == value


def count_missing(several: Sequence[Missing]) -> list[int]:
    """Return the number of NaN of each that counted on a device, waiting for it once, and 0 for the others."""
    counts = [each.count for each in several if each.count is not None]
    if not counts:
        return [0] * len(several)
    found = iter(torch.stack([moved(count, counts[0].device) for count in counts]).tolist())
    return [0 if each.count is None else next(found) for each in several]
