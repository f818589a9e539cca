"""The batches of a training: rows of a table, or drawn anew from a data set in each epoch, with workers."""

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
    """What a process is given in one step.

    Attributes:
        rows: the numbers of the rows.
        batch: their columns.
        empty: no rows are left for this process; one stands in for them and does not count.
    """

    rows: Int[Tensor, " batch"]
    batch: dict[str, Tensor]
    empty: bool


def readings(
    rows: Rows | Feed, chosen: Iterable[Int[Tensor, " batch"]], schedule: Schedule, first: int, per_epoch: int
) -> Iterator[Reading]:
    """What is read in each step.

    Args:
        rows: what is trained on.
        chosen: the numbers of the rows of each step.
        schedule: holds the seed and the number of workers.
        first: the number of the first of these steps.
        per_epoch: how many steps an epoch has.
    """
    source = rows.source if isinstance(rows, Rows) else None
    asked = ((number // per_epoch, numbers) for number, numbers in enumerate(chosen, first))
    steps: Any = _Steps(rows, schedule.seed)
    workers = 0 if source is None else max(schedule.workers, source.workers)
    if not workers:
        yield from map(_read, map(steps.__getitem__, asked))
        return
    order, kept = cast(Any, asked), cast(Any, _as_it_is)
    # A generator of its own: else it would draw from the default one.
    loader: Any = DataLoader(
        steps, sampler=order, batch_size=None, num_workers=workers, collate_fn=kept, generator=torch.Generator()
    )
    yield from map(_read, loader)


@dataclass(frozen=True, eq=False)
class _Steps(Dataset[Any]):
    """Steps by epoch and numbers of rows; what cannot be read is the error, which workers would raise as another."""

    rows: Any
    seed: int

    def __getitem__(self, asked: tuple[int, Tensor]) -> Reading | DistillError:
        epoch, chosen = asked
        here = chosen if len(chosen) else torch.zeros(1, dtype=torch.int64)
        try:
            batch = self.rows.drawn(here, epoch, self.seed) if isinstance(self.rows, Rows) else self.rows.batch(here)
        except DistillError as error:
            return error
        return Reading(here, batch, not len(chosen))


def _read(found: Reading | DistillError) -> Reading:
    if isinstance(found, DistillError):
        raise found
    return found


def _as_it_is(reading: Any) -> Any:
    return reading
