"""Which rows a network was trained on, so that it is not measured on them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from distill.errors import DistillError

IGNORED = ("labels", "special_tokens_mask", "token_type_ids")  # of two rows that differ in these alone, one is seen


@dataclass(frozen=True, eq=False)
class Seen:
    """Rows that were trained on, known by what they hold.

    Attributes:
        batches: makes them anew, batch by batch: {column: tensor `[rows, ...]`, or one tensor a row}.
    """

    batches: Callable[[], Iterable[Mapping[str, Any]]]
    _known: dict[tuple[str, ...], frozenset[int]] = field(default_factory=dict, repr=False)

    def among(self, table: Mapping[str, Any]) -> Bool[Tensor, " rows"]:
        """Which rows of a table are among them, by the columns that both have.

        Raises:
            DistillError: they have none in common.
        """
        first = next(iter(self.batches()))
        common = tuple(name for name in sorted(table) if name in first and name not in IGNORED)
        if not common:
            raise DistillError(
                f"the rows trained on have {', '.join(first)} and those to measure on {', '.join(table)}, so they "
                "cannot be compared; give the columns the same names."
            )
        if common not in self._known:
            batches = ({name: batch[name] for name in common} for batch in self.batches())
            self._known[common] = frozenset(number for batch in batches for number in fingerprints(batch))
        known = self._known[common]
        return torch.tensor([number in known for number in fingerprints({name: table[name] for name in common})])


def seen_of(exclude: Any) -> Seen | None:
    """What a result of `fit` or `align` was trained on.

    Raises:
        DistillError: it is no such result.
    """
    seen = getattr(exclude, "seen", exclude)
    if seen is not None and not isinstance(seen, Seen):
        raise DistillError(f"exclude={exclude!r} is no result of fit or align; pass exclude=result.")
    return seen


def fingerprints(table: Mapping[str, Any]) -> list[int]:
    """A number for each row, decided by what its columns hold."""
    rows = zip(*(_bytes(table[name]) for name in sorted(table)), strict=True)
    return [int.from_bytes(blake2b(b"|".join(row), digest_size=8).digest()) for row in rows]


def _bytes(column: Any) -> Iterator[bytes]:
    """What each row of a column holds; whole numbers count alike in every width."""
    rows = column.reshape(len(column), -1) if isinstance(column, Tensor) else column
    for row in _plain(rows) if isinstance(rows, Tensor) else map(_plain, map(torch.as_tensor, rows)):
        yield row.tobytes()


def _plain(tensor: Tensor) -> Any:
    """In one form, so that 3 is 3.0, 0.0 is −0.0, and 0.1 in fp32 that in fp64."""
    plain = tensor.detach().cpu()
    return ((plain.float() if plain.is_floating_point() else plain).double() + 0.0).numpy()
