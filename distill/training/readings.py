"""The batches of a training: rows of a table, of a stream, or drawn anew from a data set in each epoch, by workers."""

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
from distill.training.schedule import Schedule, lengths_to_group, order


@dataclass(frozen=True, eq=False)
class Reading:
    """The rows that a process computes in one step.

    Attributes:
        rows: the numbers of the rows; None where they have none, as those of a stream.
        batch: their columns.
        empty: True if no rows are left for this process; row 0 stands in for them and does not count.
    """

    rows: Int[Tensor, " batch"] | None
    batch: dict[str, Tensor]
    empty: bool


def duration(rows: Rows | Feed, schedule: Schedule) -> tuple[int, int]:
    """Return the number of steps of a training and of one epoch; a stream of unknown length counts as one epoch."""
    if not isinstance(rows, Rows) or rows.stream is None:
        return schedule.total(len(rows)), schedule.per_epoch(len(rows))
    if rows.stream.length is None:
        assert schedule.steps is not None
        return schedule.steps, schedule.steps
    return schedule.total(rows.stream.length), schedule.per_epoch(rows.stream.length)


def refuse_unfit_for_stream(rows: Rows | Feed, schedule: Schedule) -> None:
    """Raise DistillError if a schedule needs more of a stream than its next rows.

    Raises:
        DistillError: no number of steps where the length is unknown, or workers, or groups of length.
    """
    if not isinstance(rows, Rows) or rows.stream is None:
        return
    name, steps = rows.stream.name, schedule.steps
    if steps is None and rows.stream.length is None:
        raise DistillError(
            f"epochs={schedule.epochs:g} of a {name} have no known number of steps, as it has no length and is read "
            "step by step; give the number of steps: steps=1000."
        )
    if schedule.group_by_length:
        raise DistillError(
            f"group_by_length=True chooses among all rows, and a {name} is read in order; leave group_by_length out, "
            "or give the rows: data=list(data)."
        )
    if schedule.workers:
        raise DistillError(
            f"workers={schedule.workers} read rows by their numbers, and a {name} is read in order, in this process; "
            "leave workers out."
        )


def readings(
    rows: Rows | Feed, schedule: Schedule, numbers: range, per_epoch: int, share: tuple[int, int] = (0, 1)
) -> Iterator[Reading]:
    """Yield the rows of each step for a process.

    Args:
        rows: the data, or the samples of a causal model.
        schedule: holds the seed and the number of workers.
        numbers: the numbers of these steps.
        per_epoch: the number of steps of an epoch.
        share: the number of this process, and the number of processes.
    """
    if isinstance(rows, Rows) and rows.stream is not None:
        for _ in numbers:
            batch, empty = rows.next_of_stream(schedule.batch_size, *share)
            yield Reading(None, batch, empty)
        return
    lengths = lengths_to_group(rows, schedule)
    chosen = order(len(rows), schedule, numbers, *share, lengths=lengths)
    yield from _by_number(rows, schedule, chosen, numbers.start, per_epoch)


def _by_number(
    rows: Rows | Feed, schedule: Schedule, chosen: Iterable[Int[Tensor, " batch"]], first: int, per_epoch: int
) -> Iterator[Reading]:
    """Yield the batch of each step, whose numbers are chosen; the first step has the number `first`."""
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
        return Reading(numbers if isinstance(self.rows, Rows) else None, batch, not len(chosen))


def _raise_errors(found: Reading | DistillError) -> Reading:
    """Return a batch, or raise the error that stands in its place."""
    if isinstance(found, DistillError):
        raise found
    return found


def _return_unchanged(reading: Any) -> Any:
    """Return a batch as it is."""
    return reading
