"""Which rows a network was trained on, so that it is not measured on them.

A row is what it holds without its padding, whatever it is padded with, to which length and on which side.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from distill.errors import DistillError

CHUNK = 4096
FILE = "trained_on.safetensors"
Marks = np.ndarray  # uint64 [rows]
# Of two rows that differ in these alone, one is seen; `teacher_` and `decoder_` may stand before them.
IGNORED = ("labels", "special_tokens_mask", "token_type_ids", "position_ids", "attention_mask")
MASK = "attention_mask"


@dataclass(frozen=True, eq=False)
class SeenRows:
    """Rows that were trained on, known by what they held.

    Attributes:
        batches: makes them anew, batch by batch: {column: tensor `[rows, ...]`, or one tensor a row}. For rows that
            cannot change, as those that a causal model samples by a seed.
        marks: {column: a number for each row, decided by what it held}, remembered when they were trained on.
    """

    batches: Callable[[], Iterable[Mapping[str, Any]]] = tuple
    marks: Mapping[str, Marks] | None = field(default=None, repr=False)
    _known: dict[tuple[str, ...], frozenset[int]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, table: Mapping[str, Any], read: Iterable[str] | None = None) -> "SeenRows":
        """The rows of a table as they are now, whatever becomes of it or of the file that it was read from.

        Args:
            table: the columns.
            read: those that a network reads, where that is known: the numbers of rows, say, are no part of them.
        """
        held = _held(table)
        kept = held.keys() & set(held if read is None else read) or held.keys()
        return cls(marks={name: marks_of(column) for name, column in held.items() if name in kept})

    def among(self, table: Mapping[str, Any]) -> Bool[Tensor, " rows"]:
        """Which rows of a table are among them, by the columns that both have.

        Raises:
            DistillError: they have none in common.
        """
        mine = self.marks if self.marks is not None else _held(next(iter(self.batches())))
        held = _held(table)
        common = tuple(name for name in sorted(held) if name in mine)
        if not common:
            raise DistillError(
                f"the rows trained on have {', '.join(mine)} and those to measure on {', '.join(table)}, so they "
                "cannot be compared; give the columns the same names."
            )
        if common not in self._known:
            self._known[common] = frozenset(number for marks in self._marks(common) for number in _together(marks))
        known = self._known[common]
        return torch.tensor([number in known for number in fingerprints({name: held[name] for name in common})])

    def save(self, folder: Path) -> None:
        """Keep them in a folder, as numbers alone: nobody reads the rows from these."""
        save_file(dict(self.remembered().marks or {}), folder / FILE)

    @classmethod
    def load(cls, folder: Path, name: str = FILE) -> "SeenRows | None":
        """Those that `save` kept in a folder; None where there are none.

        Raises:
            DistillError: the file is damaged.
        """
        path = folder / name
        if not path.is_file():
            return None
        try:
            marks = load_file(path)
            same = all(each.dtype == np.uint64 and each.ndim == 1 for each in marks.values())
        except (SafetensorError, OSError, ValueError) as error:
            raise DistillError(f"{path} is damaged ({error}); delete it, and no row is known as trained on.") from None
        if not same or len({len(each) for each in marks.values()}) > 1:
            raise DistillError(f"{path} is damaged (other numbers); delete it, and no row is known as trained on.")
        return cls(marks=marks)

    def remembered(self) -> "SeenRows":
        """The same rows, each once, kept as numbers alone, as a file holds them."""
        names = tuple(self.marks if self.marks is not None else _held(next(iter(self.batches()), {})))
        parts = list(self._marks(names)) if names else []
        rows = np.unique(np.concatenate([np.stack([part[name] for name in names], 1) for part in parts]), axis=0)
        return SeenRows(marks={name: np.ascontiguousarray(rows[:, i]) for i, name in enumerate(names)})

    def _marks(self, names: tuple[str, ...]) -> Iterator[Mapping[str, Marks]]:
        """The numbers of these columns, as remembered, or batch by batch."""
        if self.marks is not None:
            yield {name: self.marks[name] for name in names}
            return
        for batch in map(_held, self.batches()):
            yield {name: marks_of(batch[name]) for name in names}


def seen_of(exclude: Any) -> SeenRows | None:
    """What a result of `fit` or `align` was trained on.

    Raises:
        DistillError: it is no such result, or does not know.
    """
    if exclude is None:
        return None
    seen = getattr(exclude, "seen", None) if not isinstance(exclude, SeenRows) else exclude
    if seen is None and hasattr(exclude, "seen"):
        raise DistillError(
            f"exclude={exclude!r} does not know which rows it was trained on, as it was made or saved without them; "
            "pass the result that fit or align returned, or leave out the rows yourself: rows.take(…)."
        )
    if not isinstance(seen, SeenRows):
        raise DistillError(f"exclude={exclude!r} is no result of fit or align; pass exclude=result.")
    return seen


def fingerprints(table: Mapping[str, Any]) -> list[int]:
    """A number for each row, decided by what its columns hold."""
    return _together({name: marks_of(column) for name, column in table.items()})


def marks_of(column: Any) -> Marks:
    """A number for each row of one column, decided by what it holds."""
    return np.array([int.from_bytes(blake2b(row, digest_size=8).digest()) for row in _bytes(column)], dtype=np.uint64)


def _held(table: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that make a row what it is, without their padding."""
    masks = {name.removesuffix(MASK): mask for name, mask in table.items() if name.endswith(MASK)}
    found = {}
    for name, column in table.items():
        if name.removeprefix("teacher_").removeprefix("decoder_") not in IGNORED:
            of = max((before for before in masks if name.startswith(before)), key=len, default=None)
            found[name] = column if of is None else _unpadded(column, masks[of])
    return found


def _unpadded(column: Any, mask: Any) -> Any:
    """The values of each row at its real tokens; the column itself where it is none of tokens, or none is padding."""
    whole = isinstance(column, Tensor) and isinstance(mask, Tensor)
    if whole and (mask.ndim != 2 or column.shape[:2] != mask.shape or bool(mask.all())):
        return column
    rows = list(zip(column, mask, strict=True))
    if not all(isinstance(each, Tensor) and each.ndim and each.shape[:1] == real.shape for each, real in rows):
        return column
    return [each[real.bool().to(each.device)] for each, real in rows]


def _together(marks: Mapping[str, Marks]) -> list[int]:
    """One number for each row from those of its columns, in the order of their names."""
    stacked = np.ascontiguousarray(np.stack([marks[name] for name in sorted(marks)], 1))
    return [int.from_bytes(blake2b(row.tobytes(), digest_size=8).digest()) for row in stacked]


def _bytes(column: Any) -> Iterator[bytes]:
    """What each row of a column holds; whole numbers count alike in every width."""
    if isinstance(column, Tensor):
        for part in column.reshape(len(column), -1).split(CHUNK):
            yield from (row.tobytes() for row in _plain(part))
        return
    rows = [torch.as_tensor(row) for row in column]
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        if len({(row.dtype, row.device) for row in part}) > 1:
            yield from (_plain(row).tobytes() for row in part)
            continue
        flat = _plain(torch.cat([row.reshape(-1) for row in part]))  # a tensor at a time takes ten times as long
        ends = np.cumsum([row.numel() for row in part])
        yield from (row.tobytes() for row in np.split(flat, ends[:-1]))


def _plain(tensor: Tensor) -> Any:
    """In one form, so that 3 is 3.0, 0.0 is −0.0, and 0.1 in fp32 that in fp64."""
    plain = tensor.detach().cpu()
    return ((plain.float() if plain.is_floating_point() else plain).double() + 0.0).numpy()
