"""The answers of a served teacher to all rows of data, fetched batch by batch before a training."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed

from distill.data.rows import Rows
from distill.data.texts.lengths import lengths_of
from distill.models.inputs import decoder_masked, inputs_of, teachers
from distill.processes import are_divided, processes


def fetch_each(teacher: Any, rows: Rows, batch_size: int) -> Iterator[tuple[int, int]]:
    """Fetch the answers to rows, batch by batch, and yield how many batches are done, and of how many.

    Rows of similar length are fetched together, so that little of a batch is padding. Inside a block of
    `distill.processes.dividing` each process fetches its part.

    Args:
        teacher: a `Served`; what it has is not requested again.
        rows: the data.
        batch_size: the rows of a batch.
    """
    lengths = lengths_of(rows)
    order = torch.arange(len(rows)) if lengths is None else lengths.argsort(stable=True)
    parts = list(order.split(batch_size))
    if are_divided():
        parts = parts[distributed.get_rank() :: processes()]
    for done, chosen in enumerate(parts, 1):
        columns = decoder_masked(teacher.network, teachers(rows.batch(chosen)))
        teacher.run(inputs_of(teacher.network, columns))
        yield done, len(parts)
