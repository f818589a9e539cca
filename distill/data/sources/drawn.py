"""Data sets whose rows are made by number, as a torch Dataset: read once in order, and kept in memory if small.

Of larger ones numbers and names, one a row, are kept, and the lengths of the rows; the rest is made again by its number
when it is used, under the seed of the first reading.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from distill.data.columns import bytes_of, column_of, join, transpose
from distill.data.draws import DRAWN_TWICE, FIRST_READING, DataSource, named, warn_if_unseeded
from distill.data.sources.lazy_columns import LazyColumn
from distill.errors import DistillError

IN_MEMORY = 2**28
"""The bytes of the rows up to which all of them are kept in memory."""


@dataclass(frozen=True, eq=False)
class DrawnStore:
    """The rows of a source, made by number.

    Attributes:
        source: makes the rows.
        counted: the number of values in each row, by column.
    """

    source: DataSource
    counted: Mapping[str, "array[int]"] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, names: Sequence[str], numbers: Int[Tensor, " rows"]) -> dict[str, Any]:
        """Return these columns of these rows, as they were at the first reading.

        Raises:
            DistillError: a row that cannot be read, or that lacks a column now.
        """
        wanted = numbers.tolist()
        if self.source.collate is None:
            columns = named(transpose(self.source.draw(wanted, FIRST_READING, 0)))
        else:
            columns = self._collated(wanted)
        lost = next((name for name in names if name not in columns), None)
        if lost is not None:
            raise DistillError(
                f"row {wanted[0]} of the data had a column {lost!r} at first and has {', '.join(columns)} now; give "
                "every row the same columns in every reading."
            )
        return {name: column_of(name, columns[name]) for name in names}

    def lengths(self, name: str) -> Int[Tensor, " rows"] | None:
        """Return the number of values in each row of a column; None where a collation decides it."""
        found = self.counted.get(name)
        return None if found is None else torch.tensor(found, dtype=torch.int64)

    def _collated(self, wanted: Sequence[int]) -> dict[str, Any]:
        """Return rows out of the batches that they were in at the first reading."""
        size, made = self.source.size, dict[int, dict[str, Tensor]]()
        for part in sorted({number // size for number in wanted}):
            rows = range(part * size, min((part + 1) * size, len(self.source)))
            made[part] = self.source.collated(rows, FIRST_READING, 0)
        first = next(iter(made.values()))
        return {name: [made[number // size][name][number % size] for number in wanted] for name in first}


def read(source: DataSource) -> Mapping[str, Any]:
    """Return all rows of a source as columns, after a reading of all of them in order.

    Raises:
        DistillError: a row that cannot be read, or has other columns than the first one.
    """
    size = 1 if source.collate is None else source.size
    first: list[Any] = []
    kept: list[Any] = []
    small, bytes_so_far = _Small(source), 0
    for start in range(0, len(source), size):
        rows = range(start, min(start + size, len(source)))
        if source.collate is None:
            items: list[Any] = source.draw(rows, FIRST_READING, 0)
            first += items[: DRAWN_TWICE - len(first)]
        else:
            items = [source.collated(rows, FIRST_READING, 0)]
        bytes_so_far += sum(bytes_of(value) for item in items for value in _values(item))
        small.add(items[0], start)
        if bytes_so_far <= IN_MEMORY:
            kept += items
        else:
            kept.clear()
    if source.collate is not None:
        first = source.draw(range(min(DRAWN_TWICE, len(source))), FIRST_READING, 0)
    warn_if_unseeded(source, first)
    if bytes_so_far > IN_MEMORY:
        return small.columns()
    return transpose(kept) if source.collate is None else join(kept)


@dataclass(eq=False)
class _Small:
    """The part of a large data set that is kept: numbers and labels, one a row, and lengths of the other columns."""

    source: DataSource
    single: dict[str, list[Any]] = field(default_factory=dict)
    counted: dict[str, "array[int]"] = field(default_factory=dict)
    texts: dict[str, Any] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def add(self, item: Any, number: int) -> None:
        """Take a row, or a batch that a collation made, whose first row has a number.

        Raises:
            DistillError: other columns than those of the first row.
        """
        columns = named(item if self.source.collate is not None else transpose([item], number))
        if not number:
            self._begin(columns)
        known = {*self.single, *self.counted, *self.texts}
        if columns.keys() != known:
            raise DistillError(
                f"rows 0 and {number} of the data have different columns: {sorted(known)} and {sorted(columns)}; give "
                "every row the same."
            )
        for name, values in self.single.items():
            values += [each.item() if _is_number(each) else each for each in columns[name]]
        for name, counts in self.counted.items():
            counts.extend(len(each) if hasattr(each, "__len__") else 1 for each in columns[name])

    def _begin(self, columns: Mapping[str, Any]) -> None:
        """Decide by the first row what becomes of each column."""
        for name, values in columns.items():
            first, is_label = values[0], name == "labels"
            if is_label and isinstance(_innermost(first), str):
                self.single[name] = []
            elif isinstance(first, str | bytes | Mapping):
                self.texts[name] = first  # no model can be given it
            elif first is None or isinstance(first, int | float) or _is_number(first):
                self.single[name] = []
                self.dtypes |= {name: first.dtype} if isinstance(first, Tensor) else {}
            else:
                self.counted[name] = array("q")

    def columns(self) -> dict[str, Any]:
        """Return the columns, of which the larger ones are read when they are used."""
        store = DrawnStore(self.source, {} if self.source.collate is not None else self.counted)
        found: dict[str, Any] = {name: LazyColumn(store, name) for name in self.counted}
        found |= {name: [value] * len(store) for name, value in self.texts.items()}
        for name, values in self.single.items():
            is_whole = name in self.dtypes and all(isinstance(each, int | float) for each in values)
            found[name] = torch.tensor(values, dtype=self.dtypes[name]) if is_whole else values
        return found


def _innermost(value: Any) -> Any:
    """Return the first value inside of lists."""
    while isinstance(value, list | tuple) and len(value):
        value = value[0]
    return value


def _is_number(value: Any) -> bool:
    """Return whether a value is a single number of an array."""
    return getattr(value, "shape", None) == ()


def _values(item: Any) -> Any:
    """Return the values of a row, or of a batch."""
    return item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ()
