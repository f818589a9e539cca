"""Columns whose rows are read when they are used, and what is done with columns of either kind, in memory or not."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, overload, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

CHUNK = 1024
"""The number of rows that are read at a time where a whole column is walked over."""
SAMPLED = 1024
"""The number of rows, evenly spaced, by which a column that is not in memory is checked and recognized."""
Values = Tensor | Sequence[Tensor]
Table = TypeVar("Table", bound=Mapping[str, Any])


@runtime_checkable
class Store(Protocol):
    """Numbered rows that are read by columns."""

    def __len__(self) -> int: ...

    def read(self, names: Sequence[str], numbers: Int[Tensor, " rows"]) -> Mapping[str, Values]:
        """Return these columns of these rows, each as a tensor `[rows, ...]` or as one tensor a row."""

    def lengths(self, name: str) -> Int[Tensor, " rows"] | None:
        """Return the number of values in each row of a column; None where only reading all of them would show it."""


@dataclass(frozen=True, eq=False)
class LazyColumn(Sequence[Any]):  # of Tensor: enforced types would read a row at each check
    """A column that is read from its store when its rows are used.

    Attributes:
        store: holds the rows.
        name: the name of the column there.
        numbers: the numbers of the rows there; None is all of them, in order.
        changes: are applied to what is read, in order, as a renumbering of labels.
    """

    store: Store
    name: str
    numbers: Int[Tensor, " rows"] | None = None
    changes: tuple[Callable[[Tensor], Tensor], ...] = ()

    def __len__(self) -> int:
        return len(self.store if self.numbers is None else self.numbers)

    @overload
    def __getitem__(self, place: int) -> Tensor: ...

    @overload
    def __getitem__(self, place: slice) -> list[Tensor]: ...

    def __getitem__(self, place: int | slice) -> Tensor | list[Tensor]:
        places = range(len(self))[place]
        if isinstance(places, int):
            return self.read(torch.tensor([places]))[0]
        return list(self.read(torch.tensor(places, dtype=torch.int64))) if len(places) else []

    def __iter__(self) -> Iterator[Tensor]:
        for places in torch.arange(len(self)).split(CHUNK):
            yield from self.read(places)

    def read(self, places: Int[Tensor, " rows"]) -> Values:
        """Return some rows, as a tensor `[rows, ...]` or as one tensor a row."""
        return read_columns({self.name: self}, places)[self.name]

    def changed(self, change: Callable[[Tensor], Tensor]) -> "LazyColumn":
        """Return the column with a change that is applied to what is read."""
        return replace(self, changes=(*self.changes, change))

    def lengths(self) -> Int[Tensor, " rows"] | None:
        """Return the number of values in each row; None where only reading all of them would show it."""
        found = self.store.lengths(self.name)
        return found if found is None or self.numbers is None else found[self.numbers]

    def _after_changes(self, values: Values) -> Values:
        for change in self.changes:
            values = change(values) if isinstance(values, Tensor) else [change(each) for each in values]
        return values


Column = Tensor | LazyColumn | Sequence[Tensor]
"""A column: a tensor `[rows, ...]`, one tensor a row, or rows that are read when they are used."""


def read_columns(table: Mapping[str, Column], places: Int[Tensor, " rows"]) -> dict[str, Column]:
    """Return some rows of all columns, those of one store by one reading; a column is a tensor or one tensor a row."""
    groups: dict[tuple[int, int], list[tuple[str, LazyColumn]]] = {}
    for name, column in table.items():
        if isinstance(column, LazyColumn):
            groups.setdefault((id(column.store), id(column.numbers)), []).append((name, column))
    found: dict[str, Column] = {}
    for columns in groups.values():
        store, numbers = columns[0][1].store, columns[0][1].numbers
        read = store.read(
            list(dict.fromkeys(column.name for _, column in columns)), places if numbers is None else numbers[places]
        )
        found |= {name: column._after_changes(read[column.name]) for name, column in columns}
    return {name: found[name] if name in found else _rows_of(column, places) for name, column in table.items()}


def take_columns(table: Mapping[str, Column], places: Int[Tensor, " rows"]) -> dict[str, Column]:
    """Return some rows of all columns, in this order; those that are not in memory are read later."""
    taken: dict[int, Tensor] = {}
    found: dict[str, Column] = {}
    for name, column in table.items():
        if isinstance(column, LazyColumn):
            numbers = column.numbers
            chosen = taken.setdefault(id(numbers), places if numbers is None else numbers[places])
            found[name] = replace(column, numbers=chosen)
        else:
            found[name] = _rows_of(column, places)
    return found


def parts_of_table(table: Mapping[str, Column], size: int) -> Iterator[dict[str, Column]]:
    """Yield a table in parts of so many rows, in order, so that no more of it than a part is in memory."""
    for places in torch.arange(len(next(iter(table.values()), ()))).split(size):
        yield read_columns(table, places)


def some_rows(column: Any) -> Any:
    """Return the rows by which a column is checked: all that are in memory, else a sample that is evenly spaced."""
    return column.read(sampled(len(column))) if isinstance(column, LazyColumn) else column


def sampled(rows: int) -> Int[Tensor, " rows"]:
    """Return evenly spaced numbers of rows, the first and the last among them; all where there are few."""
    return torch.linspace(0, rows - 1, min(rows, SAMPLED), dtype=torch.float64).round().long()


def in_memory(column: Column) -> Values:
    """Return a column with all its rows read, as a tensor if they have one shape."""
    if not isinstance(column, LazyColumn):
        return column
    rows = list(column)
    return torch.stack(rows) if len({row.shape for row in rows}) == 1 else rows


def lengths_of(column: Column) -> Int[Tensor, " rows"] | None:
    """Return the number of values in each row of a column; None where only reading all of them would show it."""
    if isinstance(column, LazyColumn):
        return column.lengths()
    if isinstance(column, Tensor):
        return torch.full((len(column),), column.shape[1] if column.ndim > 1 else 1)
    return torch.tensor([len(row) for row in column])


def is_ragged(column: Column) -> bool:
    """Return whether the rows of a column differ in length, as far as that is known without reading them."""
    if isinstance(column, Tensor):
        return False
    lengths = lengths_of(column) if isinstance(column, LazyColumn) else None
    return not isinstance(column, LazyColumn) or (lengths is not None and bool((lengths != lengths[0]).any()))


def is_lazy(table: Mapping[str, Any]) -> bool:
    """Return whether a column of a table is read when it is used."""
    return any(isinstance(column, LazyColumn) for column in table.values())


def is_floating(column: Column) -> bool:
    """Return whether the numbers of a column are real ones, by its first row."""
    return (column if isinstance(column, Tensor) else column[0]).is_floating_point()


def _rows_of(column: Column, places: Int[Tensor, " rows"]) -> Values:
    return column[places] if isinstance(column, Tensor) else [column[i] for i in places.tolist()]
