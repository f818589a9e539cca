"""What a step draws and what its masks hold, read on the host, so that Python need not wait for an accelerator.

The positions of an interchange are drawn for each row by its mask, and their number decides the shape of what is
written. Drawn on the device they would have to be read from there, and everything that was sent there before would have
to be done first.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_generators: WeakKeyDictionary[torch.Generator, torch.Generator] = WeakKeyDictionary()
_copies: Any = WeakIdKeyDictionary()


class Columns(Mapping[str, Tensor]):
    """Columns of a batch that are made when they are read first.

    Args:
        names: their names.
        make: makes the column of a name.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = tuple(names), make
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names  # that of Mapping would make the column

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def host_generator(generator: torch.Generator) -> torch.Generator:
    """Return the generator for draws that the host reads: one of the CPU itself, or one that its seed decides."""
    if generator.device.type == "cpu":
        return generator
    if generator not in _generators:
        _generators[generator] = torch.Generator().manual_seed(generator.initial_seed() ^ 0x5EED)
    return _generators[generator]


def host_columns(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the columns of a batch on the host.

    A column that `keep_host_copy` knows is taken as it was moved; of another one that is elsewhere a copy is made when
    it is read first, once.
    """
    if all(column.device.type == "cpu" and column not in _copies for column in batch.values()):
        return batch
    return Columns(batch, lambda name: _host_copy(batch[name]))


def keep_host_copy(column: Tensor, copy: Tensor) -> None:
    """Remember where a column came from that was moved to a device, for as long as it lives and is not written."""
    if column is not copy and copy.device.type == "cpu" and not column.is_inference():
        _copies[column] = (column._version, copy, copy._version)


def rows_of_columns(batch: Mapping[str, Tensor], rows: Tensor) -> Columns:
    """Return these rows of all columns."""
    return Columns(batch, lambda name: batch[name][rows.to(batch[name].device, non_blocking=True)])


def _host_copy(column: Tensor) -> Tensor:
    """Return a column on the host; a kept copy is taken if neither it nor the column was written since."""
    if column.is_inference():  # changes of it are not counted
        return column.cpu()
    known = _copies.get(column)
    if known is None and column.device.type == "cpu":
        return column
    if known is not None and (known[0], known[2]) == (column._version, known[1]._version):
        found: Tensor = known[1]
        return found
    copy = column.cpu()
    keep_host_copy(column, copy)
    return copy
