"""A record of the rows that a network was trained on, so that it is not measured on them.

Each row is recorded by hashes of its columns without their padding, so that the length, side and token of the padding
do not matter.
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

from distill.data.sources.lazy_columns import parts_of_table
from distill.errors import DistillError

CHUNK = 4096
FILE = "trained_on.safetensors"
Marks = np.ndarray  # hashes, uint64 [rows]
# Two rows that differ only in these columns count as one row; their names may begin with `teacher_` or `decoder_`.
IGNORED = ("labels", "special_tokens_mask", "token_type_ids", "position_ids", "attention_mask")
MASK = "attention_mask"


@dataclass(frozen=True, eq=False)
class SeenRows:
    """The rows that a network was trained on.

    Attributes:
        batches: makes the rows anew, batch by batch: {column: tensor `[rows, ...]`, or one tensor a row}. For rows that
            cannot change, as those that a causal model samples by a seed.
        marks: {column: a hash of each row}, recorded at the training.
    """

    batches: Callable[[], Iterable[Mapping[str, Any]]] = tuple
    marks: Mapping[str, Marks] | None = field(default=None, repr=False)
    _known: dict[tuple[str, ...], Marks] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, table: Mapping[str, Any], read: Iterable[str] | None = None) -> "SeenRows":
        """Return a record of the rows of a table as they are now.

        Args:
            table: the columns.
            read: the columns that a network reads, if that is known: a column of row numbers, say, is not among them.
        """
        kept = identifying(table, read)
        parts = [_marks_of_columns(part, kept) for part in parts_of_table(table, CHUNK)]
        return cls(marks={name: np.concatenate([part[name] for part in parts]) for name in kept})

    def among(self, table: Mapping[str, Any]) -> Bool[Tensor, " rows"]:
        """Return which rows of a table are among the recorded ones, by the columns that both have.

        Raises:
            DistillError: no columns in common.
        """
        recorded = self.marks if self.marks is not None else identifying(next(iter(self.batches())))
        common = tuple(name for name in sorted(identifying(table)) if name in recorded)
        if not common:
            raise DistillError(
                f"the rows trained on have {', '.join(recorded)} and those to measure on {', '.join(table)}, so they "
                "cannot be compared; give the columns the same names."
            )
        if common not in self._known:
            self._known[common] = np.unique(np.concatenate([_combine(marks) for marks in self._marks(common)]))
        marks = [_combine(_marks_of_columns(part, common)) for part in parts_of_table(table, CHUNK)]
        return torch.from_numpy(np.isin(np.concatenate(marks), self._known[common]))

    def save(self, folder: Path) -> None:
        """Write the hashes to a folder; the rows cannot be read from them."""
        save_file(dict(self.remembered().marks or {}), folder / FILE)

    @classmethod
    def load(cls, folder: Path, name: str = FILE) -> "SeenRows | None":
        """Return the rows that `save` recorded in a folder; None if there is no record.

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
        """Return the same rows, each once, as hashes only, as a file holds them."""
        names = tuple(self.marks if self.marks is not None else identifying(next(iter(self.batches()), {})))
        parts = list(self._marks(names)) if names else []
        rows = np.unique(np.concatenate([np.stack([part[name] for name in names], 1) for part in parts]), axis=0)
        return SeenRows(marks={name: np.ascontiguousarray(rows[:, i]) for i, name in enumerate(names)})

    def _marks(self, names: tuple[str, ...]) -> Iterator[Mapping[str, Marks]]:
        """Yield the hashes of these columns: the recorded ones at once, or batch by batch."""
        if self.marks is not None:
            yield {name: self.marks[name] for name in names}
            return
        for batch in self.batches():
            yield _marks_of_columns(batch, names)


@dataclass(eq=False)
class PassedRows(Mapping[str, Marks]):
    """The hashes of rows that pass one time, each row once: {column: a hash of each row}.

    Attributes:
        names: the columns that identify a row.
    """

    names: tuple[str, ...]
    _parts: list[Marks] = field(default_factory=list, init=False, repr=False)
    _known: int = field(default=0, init=False, repr=False)

    def add(self, table: Mapping[str, Any]) -> None:
        """Record the rows of a table."""
        marks = _marks_of_columns(table, self.names)
        self._parts.append(np.stack([marks[name] for name in self.names], 1))
        if sum(map(len, self._parts)) > 2 * max(self._known, CHUNK):
            self._join()

    def state(self) -> dict[str, Tensor]:
        """Return the hashes as tensors of int64, which have the same bits."""
        return {name: torch.from_numpy(self[name].view(np.int64)) for name in self.names}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the hashes that `state` returned, in place of those that are recorded."""
        self._parts = [np.stack([state[name].numpy().view(np.uint64) for name in self.names], 1)] if state else []

    def _join(self) -> Marks:
        """Return all hashes, [rows, columns]."""
        parts = self._parts or [np.zeros((0, len(self.names)), np.uint64)]
        self._parts = [np.unique(np.concatenate(parts), axis=0)]
        self._known = len(self._parts[0])
        return self._parts[0]

    def __getitem__(self, name: str) -> Marks:
        return np.ascontiguousarray(self._join()[:, self.names.index(name)])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def seen_of(exclude: Any) -> SeenRows | None:
    """Return the rows that a result of `fit` or `align` was trained on; None for None.

    Raises:
        DistillError: no such result, or one without a record of its rows.
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
    """Return a hash of each row of a table."""
    return _combine({name: marks_of(column) for name, column in table.items()}).tolist()


def marks_of(column: Any) -> Marks:
    """Return a hash of each row of one column."""
    return np.array(
        [int.from_bytes(blake2b(row, digest_size=8).digest()) for row in _contents(column)], dtype=np.uint64
    )


def identifying(names: Iterable[str], read: Iterable[str] | None = None) -> tuple[str, ...]:
    """Return the names of the columns that identify a row: those that a network reads, if that is known and any does.

    Args:
        names: of all columns.
        read: of those that a network reads.
    """
    held = [name for name in names if name.removeprefix("teacher_").removeprefix("decoder_") not in IGNORED]
    known = set(held if read is None else read)
    return tuple(name for name in held if name in known) or tuple(held)


def _marks_of_columns(table: Mapping[str, Any], names: Iterable[str]) -> dict[str, Marks]:
    """Return a hash of each row of these columns of a table, without their padding."""
    masks = {name.removesuffix(MASK): mask for name, mask in table.items() if name.endswith(MASK)}
    found = {}
    for name in names:
        of = max((before for before in masks if name.startswith(before)), key=len, default=None)
        found[name] = marks_of(table[name] if of is None else _without_padding(table[name], masks[of]))
    return found


def _without_padding(column: Any, mask: Any) -> Any:
    """Return the values of each row at its real tokens; the column itself if it has no tokens or no padding."""
    whole = isinstance(column, Tensor) and isinstance(mask, Tensor)
    if whole and (mask.ndim != 2 or column.shape[:2] != mask.shape or bool(mask.all())):
        return column
    rows = list(zip(column, mask, strict=True))
    if not all(isinstance(each, Tensor) and each.ndim and each.shape[:1] == real.shape for each, real in rows):
        return column
    return [each[real.bool().to(each.device)] for each, real in rows]


def _combine(marks: Mapping[str, Marks]) -> Marks:
    """Return one hash for each row from the hashes of its columns, in the order of their names."""
    stacked = np.ascontiguousarray(np.stack([marks[name] for name in sorted(marks)], 1))
    hashed = (int.from_bytes(blake2b(row.tobytes(), digest_size=8).digest()) for row in stacked)
    return np.fromiter(hashed, dtype=np.uint64, count=len(stacked))


def _contents(column: Any) -> Iterator[bytes]:
    """Yield the content of each row of a column, equal for equal numbers of different dtypes."""
    if isinstance(column, Tensor):
        for part in column.reshape(len(column), -1).split(CHUNK):
            yield from (row.tobytes() for row in _unify(part))
        return
    rows = [torch.as_tensor(row) for row in column]
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        if len({(row.dtype, row.device) for row in part}) > 1:
            yield from (_unify(row).tobytes() for row in part)
            continue
        flat = _unify(torch.cat([row.reshape(-1) for row in part]))  # one tensor at a time takes ten times as long
        ends = np.cumsum([row.numel() for row in part])
        yield from (row.tobytes() for row in np.split(flat, ends[:-1]))


def _unify(tensor: Tensor) -> Any:
    """Return numbers in one form, in which 3 is 3.0, 0.0 is −0.0, and 0.1 in fp64 is 0.1 in fp32."""
    plain = tensor.detach().cpu()
    return ((plain.float() if plain.is_floating_point() else plain).double() + 0.0).numpy()
