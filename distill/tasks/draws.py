"""A data set whose rows are drawn anew each time, as random transforms need: every draw is decided by seed and number.

What Python, NumPy and torch draw on the CPU while a row is made is decided by the seed, the epoch and the row; so a run
that is resumed sees the same rows, whatever the number of workers.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

FIRST_READING = -1
"""The epoch, so to say, in which all rows are read in order: for what is measured, and checked before training."""


@dataclass(frozen=True, eq=False)
class Source:
    """A map-style data set and what makes a batch of its rows.

    Attributes:
        dataset: with `__getitem__` and `__len__`.
        numbers: of the rows that are used, `[rows]`.
        collate: makes a batch of rows; None stacks and pads as `Rows` does.
        size: how many rows it is given at a time when all are read.
        workers: processes that read.
    """

    dataset: Any
    numbers: Tensor
    collate: Callable[[list[Any]], Any] | None = None
    size: int = 32
    workers: int = 0

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, index: Tensor) -> "Source":
        """Some of the rows."""
        return replace(self, numbers=self.numbers[index])

    def draw(self, rows: Sequence[int], epoch: int, seed: int) -> list[Any]:
        """These rows, as they are in an epoch."""
        found = []
        for number in self.numbers[torch.as_tensor(rows)].tolist():
            with seeded(seed, epoch, number):
                found.append(self.dataset[number])
        return found

    def collated(self, rows: Sequence[int], epoch: int, seed: int) -> dict[str, Tensor]:
        """A batch of these rows, made by `collate`."""
        assert self.collate is not None
        items = self.draw(rows, epoch, seed)
        with seeded(seed, epoch, int(self.numbers[rows[0]]), 1):  # what pads may mask at random, too
            return named(self.collate(items))


def source_of(data: Any) -> Source | None:
    """The source that `data` is; None for what is read once, as its rows cannot differ or cannot be asked for again."""
    if isinstance(data, DataLoader):
        return _source_of_loader(data)
    if isinstance(data, Mapping | list | tuple | str | TensorDataset | np.ndarray | Tensor):
        return None
    if hasattr(data, "with_format") and hasattr(data, "column_names") and data.format["type"] != "custom":
        return None  # a Hugging Face data set without a transform
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return Source(data, torch.arange(len(data)))
    return None


def _source_of_loader(loader: Any) -> Source | None:
    dataset, sampler = loader.dataset, loader.sampler
    whole = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(dataset)
    )
    batches = loader.batch_sampler is None or type(loader.batch_sampler) is torch.utils.data.BatchSampler
    if isinstance(dataset, IterableDataset) or not whole or not batches:
        return None
    collate = None if loader.collate_fn is default_collate or loader.batch_size is None else loader.collate_fn
    return Source(dataset, torch.arange(len(dataset)), collate, loader.batch_size or 32, loader.num_workers)


def named(batch: Any) -> dict[str, Any]:
    """The columns of a batch by name; of a pair (x, y) as "inputs" and "labels"."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        batch = {"inputs": batch[0], "labels": batch[1]}
    columns = dict(batch)
    if "label" in columns and "labels" not in columns:
        columns = {"labels" if name == "label" else name: column for name, column in columns.items()}
    return columns


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Inside the block the default generators of Python, NumPy and torch are decided by these numbers."""
    seed = hash(numbers) % 2**63
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
