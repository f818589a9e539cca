"""The batches of a training: rows of a table, or rows drawn anew from a data set in each epoch, read by workers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill.causal.feed import Feed
from distill.data.rows import Rows
from distill.errors import DistillError
from distill.training.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Reading:
    """The rows that a process computes in one step.

    Attributes:
        rows: the numbers of the rows.
        batch: their columns.
        empty: True if no rows are left for this process; row 0 stands in for them and does not count.
    """

    rows: Int[Tensor, " batch"]
    batch: dict[str, Tensor]
    empty: bool


def readings(
    rows: Rows | Feed, chosen: Iterable[Int[Tensor, " batch"]], schedule: Schedule, first: int, per_epoch: int
) -> Iterator[Reading]:
    """Yield the batch of each step.

    Args:
        rows: the data, or the samples of a causal model.
        chosen: the numbers of the rows of each step.
        schedule: holds the seed and the number of workers.
        first: the number of the first of these steps.
        per_epoch: the number of steps of an epoch.
    """
    keys = ((number // per_epoch, numbers) for number, numbers in enumerate(chosen, first))
    steps: Any = _Steps(rows, schedule.seed)
    workers = _workers_for(rows, schedule)
    if not workers:
        yield from map(_raise_errors, map(steps.__getitem__, keys))
        return
    sampler, collate = cast(Any, keys), cast(Any, _return_unchanged)
    # A generator of its own, else it would draw from the default one.
    loader: Any = DataLoader(
        steps, sampler=sampler, batch_size=None, num_workers=workers, collate_fn=collate, generator=torch.Generator()
    )
    yield from map(_raise_errors, loader)


def _workers_for(rows: Rows | Feed, schedule: Schedule) -> int:
    """Return the number of processes that read: none for what a causal model samples, or for columns on a GPU."""
    if not isinstance(rows, Rows) or any(isinstance(each, Tensor) and not each.is_cpu for each in rows.table.values()):
        return 0
    return schedule.workers if rows.source is None else max(schedule.workers, rows.source.workers)


@dataclass(frozen=True, eq=False)
class _Steps(Dataset[Any]):
    """The steps as a data set, by epoch and numbers of rows.

    Errors are returned, not raised, as workers would raise them as errors of another type.
    """

    rows: Any
    seed: int

    def __getitem__(self, key: tuple[int, Tensor]) -> Reading | DistillError:
        epoch, chosen = key
        numbers = chosen if len(chosen) else torch.zeros(1, dtype=torch.int64)
        try:
            batch = (
                self.rows.drawn(numbers, epoch, self.seed) if isinstance(self.rows, Rows) else self.rows.batch(numbers)
            )
        except DistillError as error:
            return error
        return Reading(numbers, batch, not len(chosen))


def _raise_errors(found: Reading | DistillError) -> Reading:
    """Return a batch, or raise the error that stands in its place."""
    if isinstance(found, DistillError):
        raise found
    return found


def _return_unchanged(reading: Any) -> Any:
    """Return a batch as it is."""
    return reading
