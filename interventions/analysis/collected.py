"""`Collected`: the activations that `collect` wrote to a folder, as rows that are read by memory mapping."""

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interventions.analysis.activation_shards import ShardFolder, ShardReader
from interventions.arguments import checked, is_whole
from interventions.errors import InterventionError
from interventions.names import printed, shown

ROW, POSITION = "row", "position"


class Collected:
    """Activations of a data set in a folder: rows of vectors, read by memory mapping.

    Row i holds one vector at each location. The columns are "row", the number of its row in the data, "position", its
    token counted over the real tokens of that row (absent at places without tokens), and one for each location, by its
    text. It is a data set of torch too: a `DataLoader` takes it.

    Attributes:
        folder: the folder.
        locations: the texts of the locations.
        columns: the names of all columns.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = ShardFolder(self.folder).index()
        if index is None:
            raise InterventionError(
                f"{self.folder} holds no activations: there is no index.json; write them with collect(model, data, at, "
                "folder)."
            )
        self._index = index
        self.locations: tuple[str, ...] = tuple(index["form"]["columns"])
        positions = (POSITION,) if index["form"]["has_positions"] else ()
        self.columns: tuple[str, ...] = (ROW, *positions, *self.locations)
        self._reader: ShardReader | None = None

    @classmethod
    @checked
    def open(cls, folder: str | Path) -> "Collected":
        """Return the activations in a folder that `collect` wrote.

        Raises:
            InterventionError: the folder holds none.
        """
        return cls(folder)

    @property
    def _shards(self) -> ShardReader:
        if self._reader is None:
            complete = ShardFolder(self.folder).complete()
            if complete is None:
                there = len(list(self.folder.glob("[0-9]*")))
                raise InterventionError(
                    f"{self.folder} is not complete: {there} shards are there, and others are not; call collect again "
                    "with the same arguments, or wait until all processes have."
                )
            self._reader = ShardReader(self.folder, self._index["form"]["columns"], complete["vectors"])
        return self._reader

    def __len__(self) -> int:
        return sum(self._shards.counts)

    def batch(self, numbers: Any) -> dict[str, Tensor]:
        """Return the rows of these numbers in their order, {column: `[k, …]`}.

        Args:
            numbers: whole numbers from 0 to `len(self) − 1`, or from the end where negative: a range, a list or `[k]`.

        Raises:
            InterventionError: no such rows; a folder that is not complete, or damaged.
        """
        index, shards = self._numbers(numbers), self._shards
        starts = torch.tensor([0, *accumulate(shards.counts)])
        owner = torch.searchsorted(starts, index, right=True) - 1
        found: dict[str, Tensor] = {}
        for number in owner.unique().tolist():
            wanted = (owner == number).nonzero()[:, 0]
            inside = index[wanted] - starts[number]
            for name, column in shards.tensors(number).items():
                taken = column[inside]
                if len(wanted) == len(index):
                    found[name] = taken
                    continue
                if name not in found:
                    found[name] = taken.new_empty((len(index), *taken.shape[1:]))
                found[name][wanted] = taken
        if not len(index):
            found = {name: column[:0] for name, column in shards.tensors(0).items()}
        return {name: found[name] for name in self.columns}

    def batches(
        self, batch_size: int, *, order: Any = None, generator: torch.Generator | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Yield all rows, or those of `order`, in batches.

        Args:
            batch_size: rows of a batch; the last one may have fewer.
            order: the numbers of the rows; None is all of them, as they are stored.
            generator: shuffles them; None leaves the order.

        Raises:
            InterventionError: a batch size below 1; and as `batch`.
        """
        if not is_whole(batch_size) or batch_size < 1:
            raise InterventionError(f"batch_size={shown(batch_size)} holds no row; write batch_size=4096.")
        index = torch.arange(len(self)) if order is None else self._numbers(order)
        if generator is not None:
            index = index[torch.randperm(len(index), generator=generator, device=generator.device).cpu()]
        for part in index.split(batch_size) if len(index) else ():
            yield self.batch(part)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if not is_whole(number):
            raise InterventionError(f"activations[{shown(number)}] names no row; write activations.batch([0, 1]).")
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        return {name: column[0] for name, column in self.batch([int(number)]).items()}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[number] for number in range(len(self)))

    def _numbers(self, numbers: Any) -> Tensor:
        """Return numbers of rows, from 0 on."""
        try:
            index = torch.as_tensor(numbers if isinstance(numbers, Tensor) else list(numbers), device="cpu")
        except (TypeError, ValueError, RuntimeError):
            index = torch.empty(0, 0)
        if index.ndim == 1 and not len(index):
            index = index.long()
        if index.ndim != 1 or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise InterventionError(f"rows are chosen by whole numbers and not by {shown(numbers)}; write [0, 1].")
        index, count = index.long(), len(self)
        wrong = index[(index < -count) | (index >= count)]
        if len(wrong):
            raise InterventionError(
                f"row {int(wrong[0])} is not among the {count} that were collected: 0 to {count - 1}."
            )
        return index % max(1, count)

    def to_dict(self) -> dict[str, Any]:
        """Return what is in the folder as plain data: the number of rows, the columns and the settings."""
        complete = ShardFolder(self.folder).complete()
        return {
            "folder": str(self.folder),
            "rows": None if complete is None else sum(complete["vectors"]),
            "data_rows": None if complete is None else complete["rows"],
            "columns": {name: dict(column) for name, column in self._index["form"]["columns"].items()},
            "settings": dict(self._index["settings"]),
        }

    @printed
    def __repr__(self) -> str:
        known = self.to_dict()
        rows = "not complete" if known["rows"] is None else f"{known['rows']} vectors of {known['data_rows']} rows"
        columns = (f"{name} {column['dtype']} {column['shape']}" for name, column in known["columns"].items())
        return f"Collected({str(self.folder)!r}: {rows}; {', '.join(columns)})"
