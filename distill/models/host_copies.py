"""What a step draws and what its masks hold, read on the host, so that Python need not wait for an accelerator.

The positions of an interchange are drawn for each row by its mask, and their number decides the shape of what is
written. Drawn on the device they would have to be read from there, and everything that was sent there before would have
to be done first.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from interventions import keep_on_host, on_host

T = TypeVar("T")
_generators: WeakKeyDictionary[torch.Generator, torch.Generator] = WeakKeyDictionary()


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
    if generator.device.type == "cpu" and generator not in _generators:
        return generator
    if generator not in _generators:
        _generators[generator] = torch.Generator().manual_seed(generator.initial_seed() ^ 0x5EED)
    return _generators[generator]


def host_columns(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the columns of a batch on the host: the batch itself if it is there.

    A column that was moved is taken as it was before; of another one that is elsewhere a copy is made when it is read
    first, once.
    """
    return batch if _is_here(batch) else Columns(batch, lambda name: on_host(batch[name]))


def on_both(compute: Callable[[Mapping[str, Tensor]], T], batch: Mapping[str, Tensor]) -> T:
    """Return what a function computes from the columns of a batch, with the same of their copies kept beside it.

    Args:
        compute: a function of the columns, whose tensors are new ones or columns.
        batch: the columns.
    """
    made = compute(batch)
    if _is_here(batch):
        return made
    columns = {id(column) for column in batch.values()}
    leaves = cache(lambda: tree_leaves(compute(host_columns(batch))))
    for place, leaf in enumerate(tree_leaves(made)):
        if isinstance(leaf, Tensor) and id(leaf) not in columns:
            keep_on_host(leaf, partial(_leaf, leaves, place))
    return made


def sliced(batch: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Return some rows of all columns, in memory of their own, with those of their copies kept beside them."""
    return on_both(lambda columns: {name: columns[name][rows].clone() for name in columns}, batch)


def rows_of_columns(batch: Mapping[str, Tensor], rows: Tensor) -> Columns:
    """Return these rows of all columns."""
    return Columns(batch, lambda name: batch[name][rows.to(batch[name].device, non_blocking=True)])


def _leaf(leaves: Callable[[], list[Tensor]], place: int) -> Tensor:
    return leaves()[place]


def _is_here(batch: Mapping[str, Tensor]) -> bool:
    """Return whether all columns are on the CPU, and none of them stands for one of a device."""
    return all(column.is_cpu and on_host(column) is column for column in batch.values())
