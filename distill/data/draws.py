"""Data sets whose rows are drawn anew in each epoch, as with random transforms.

The generators of Python, NumPy and torch (on the CPU) are seeded for each row, by the seed, the epoch and the number of
the row. So a resumed run sees the same rows, with any number of workers.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from distill.data.seeds import decided, seed_from
from distill.errors import DistillError

FIRST_READING = -1
"""The number of the epoch before training, in which all rows are read in order, for checks and measurements."""
DRAWN_TWICE = 4
"""The number of rows that are drawn twice, to check that the seed decides them."""


@dataclass(frozen=True, eq=False)
class DataSource:
    """A map-style data set and the way to make batches of its rows.

    Attributes:
        dataset: has `__getitem__` and `__len__`.
        numbers: the numbers of the rows to use, `[rows]`.
        collate: makes a batch of rows; None stacks and pads as `Rows` does.
        size: the number of rows that `collate` gets at a time when all are read.
        workers: the number of processes that read.
        classes: the number of the class for each label of the data set, if its classes have names.
    """

    dataset: Any
    numbers: Tensor
    collate: Callable[[list[Any]], Any] | None = None
    size: int = 32
    workers: int = 0
    classes: Mapping[Any, int] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, index: Tensor) -> "DataSource":
        """Return a source of some of the rows."""
        return replace(self, numbers=self.numbers[index])

    def draw(self, rows: Sequence[int], epoch: int, seed: int) -> list[Any]:
        """Draw these rows, as they are in an epoch.

        Raises:
            DistillError: the data set fails on one of them.
        """
        found = []
        for number in self.numbers[torch.as_tensor(rows, dtype=torch.int64)].tolist():
            with seeded(seed, epoch, number):
                try:
                    found.append(self.dataset[number])
                except Exception as error:
                    raise DistillError(self._explain(number, error)) from error
        return found

    def collated(self, rows: Sequence[int], epoch: int, seed: int) -> dict[str, Tensor]:
        """Return a batch of these rows, made by `collate`.

        Raises:
            DistillError: `collate` fails, or makes more or fewer rows.
        """
        assert self.collate is not None
        items = self.draw(rows, epoch, seed)
        with seeded(seed, epoch, int(self.numbers[rows[0]]), 1):  # a collation may also draw, e.g. a random mask
            try:
                made = self.collate(items)
            except Exception as error:
                raise DistillError(f"collate_fn fails on {len(rows)} rows: {_describe(error)}; correct it.") from error
        batch = tensors(named(made))
        odd = next((name for name, column in batch.items() if len(column) != len(rows)), None)
        if odd is not None:
            raise DistillError(
                f"collate_fn made {len(batch[odd])} rows of {len(rows)} (column {odd!r}), and rows are identified by "
                "their numbers; make one of each, or read the batches once: data=[row for batch in loader for row in "
                "distill.Rows.of(batch)]."
            )
        return batch

    def keeps_labels(self) -> bool:
        """Return whether `collate` leaves the labels of the first rows unchanged."""
        if self.collate is None:
            return True
        rows = range(min(self.size, len(self)))
        labels = [named(item).get("labels") for item in self.draw(rows, FIRST_READING, 0)]
        return alike(labels, list(self.collated(rows, FIRST_READING, 0).get("labels", ())))

    def _explain(self, number: int, error: Exception) -> str:
        """Return the message for a row that cannot be read."""
        whole = f"{type(self.dataset).__name__} with {len(self.dataset)} rows"
        rest = f"[i for i in range({len(self.dataset)}) if i != {number}]"
        return (
            f"row {number} of the data (a {whole}) cannot be read: {_describe(error)}; see data[{number}], or leave it "
            f"out: torch.utils.data.Subset(data, {rest})."
        )


def source_of(data: Any) -> DataSource | None:
    """Return the source of data that is drawn anew; None for data that is read once: its rows cannot change."""
    if isinstance(data, DataLoader):
        return _source_of_loader(data)
    if isinstance(data, Mapping | list | tuple | str | TensorDataset | IterableDataset | np.ndarray | Tensor):
        return None
    if is_frame(data) or (is_hugging_face(data) and data.format["type"] != "custom"):
        return None  # a Hugging Face data set without a transform
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return DataSource(data, torch.arange(len(data)))
    return None


def is_hugging_face(data: Any) -> bool:
    """Return whether data is a map-style data set of Hugging Face."""
    return not isinstance(data, IterableDataset) and hasattr(data, "with_format") and hasattr(data, "column_names")


def is_frame(data: Any) -> bool:
    """Return whether data is a frame of pandas or polars, which is indexed by columns instead of rows."""
    return hasattr(data, "columns") and hasattr(data, "to_dict")


def batch_size_of(loader: Any) -> int | None:
    """Return the number of rows in a batch of a DataLoader; None if it has its own sampler of batches."""
    batches = loader.batch_sampler
    return batches.batch_size if type(batches) is BatchSampler else loader.batch_size


def _source_of_loader(loader: Any) -> DataSource | None:
    dataset, batches = loader.dataset, loader.batch_sampler
    if batches is None:
        raise DistillError(
            "a DataLoader with batch_size=None does not say whether its items are rows or batches; if they are rows "
            "give its data set, data=loader.dataset, if batches their rows: data=[row for batch in loader for row in "
            "distill.Rows.of(batch)]."
        )
    if isinstance(dataset, IterableDataset) or type(batches) is not BatchSampler:
        return None
    sampler: Any = batches.sampler
    whole = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(dataset)
    )
    if not whole:
        return None
    size, count = batches.batch_size, len(dataset)
    if batches.drop_last and count % size:
        warnings.warn(
            f"drop_last=True of a DataLoader is not used: each epoch sees all {count} rows, its last step "
            f"{count % size} of them; leave them out: torch.utils.data.Subset(data, range({count // size * size})).",
            stacklevel=2,
        )
    collate = None if loader.collate_fn is default_collate else loader.collate_fn
    return DataSource(dataset, torch.arange(count), collate, size, loader.num_workers)


def warn_if_unseeded(source: DataSource, found: Sequence[Any]) -> None:
    """Warn if the first rows of a source differ when they are drawn again under the same seed.

    Args:
        source: the source.
        found: its rows in the first reading.
    """
    few = found[:DRAWN_TWICE]
    if not alike(few, source.draw(range(len(few)), FIRST_READING, 0)):
        warnings.warn(
            f"rows of {type(source.dataset).__name__} differ when they are drawn twice under one seed, as by "
            "their own generator: a run that is resumed, or has other workers, sees other rows; draw by torch.rand(), "
            "random.random() or numpy.random.rand(), which are seeded for each row.",
            stacklevel=2,
        )


def named(batch: Any) -> dict[str, Any]:
    """Return the columns of a batch by name; a pair (x, y) has "inputs" and "labels".

    Raises:
        DistillError: neither a dict nor a pair.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        batch = {"inputs": batch[0], "labels": batch[1]}
    if not isinstance(batch, Mapping):
        found = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
        raise DistillError(
            f"a batch or row of the data is a {found}; make it a dict of columns, or a pair (x, y), e.g. "
            "collate_fn=lambda rows: {'inputs': …, 'labels': …}."
        )
    columns = dict(batch)
    if "label" in columns and "labels" not in columns:
        columns = {"labels" if name == "label" else name: column for name, column in columns.items()}
    return columns


def tensors(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the columns of a batch, after a check that all are tensors.

    Raises:
        DistillError: one is not.
    """
    odd = next((name for name, column in batch.items() if not isinstance(column, Tensor) or not column.ndim), None)
    if odd is not None:
        raise DistillError(
            f"column {odd!r} of a batch is a {type(batch[odd]).__name__} and no tensor of a value a row; leave it out "
            "in collate_fn."
        )
    return dict(batch)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.;')}"


def alike(one: Any, other: Any) -> bool:
    """Return whether two values are equal, where NaN equals NaN."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(alike(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if getattr(one, "shape", ()) != getattr(other, "shape", ()):  # a number has no shape
        return False
    same = (one == other) | (one != one) if isinstance(one, Tensor | np.ndarray | float) else one == other
    return bool(same.all() if isinstance(same, Tensor | np.ndarray) else same)


def seeded(*numbers: int) -> AbstractContextManager[None]:
    """Seed the default generators of Python, NumPy and torch by these numbers for a block."""
    return decided(seed_from(*numbers))
