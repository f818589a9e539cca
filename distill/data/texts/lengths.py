"""The order of rows of several lengths: batches of rows of similar length, so that little of a batch is padding.

The rows of an epoch, in random order, are cut into windows of at most 50 batches. Each window is sorted by length and
cut into batches, and the batches of all windows are put in random order. So a row meets other rows in each epoch, and
the length of a step says nothing about its place in the epoch.
"""

from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from distill.data.rows import batches
from distill.data.sources.lazy_columns import lengths_of as counts
from distill.errors import DistillError

WINDOW = 50
"""The most batches that are sorted by length together."""
TOKENS = "input_ids"
WINDOWS = 2
"""The fewest windows of an epoch; with one, each epoch would have the same batches."""


def lengths_of(rows: Any) -> Int[Tensor, " rows"] | None:
    """Return the number of values of each row in the columns whose rows differ in length; None if there is none.

    Args:
        rows: a `Rows`, or anything with a `table` of columns; without one there is nothing to count. Columns that only
            a reading of all rows would measure are not counted.
    """
    table = getattr(rows, "table", None)
    if not isinstance(table, Mapping):
        return None
    ragged = [counts(column) for column in table.values() if not isinstance(column, Tensor)]
    known = [each for each in ragged if each is not None]
    if not known:
        return None
    counted = torch.stack(known)
    return counted.sum(0) if bool((counted != counted[:, :1]).any()) else None


def similar_batches(
    rows: Any, size: int, chosen: Int[Tensor, " rows"] | None = None
) -> Iterator[Int[Tensor, " batch"]]:
    """Yield the numbers of rows, `size` at a time, the longest first, so that rows of a batch have similar lengths.

    Rows of one length, or of lengths that are not known, come in order.

    Args:
        rows: a `Rows`.
        size: the rows of a batch.
        chosen: the numbers of the rows to take; None takes all.

    >>> from distill import Rows
    >>> rows = Rows.of({"input_ids": [[1], [1, 2], [1, 2, 3]], "attention_mask": [[1], [1, 1], [1, 1, 1]]})
    >>> [batch.tolist() for batch in similar_batches(rows, 2)]
    [[2, 1], [0]]
    """
    lengths = lengths_of(rows)
    numbers = torch.arange(len(rows)) if chosen is None else chosen
    if lengths is not None and len(numbers):
        numbers = numbers[lengths[numbers].argsort(stable=True, descending=True)]
    for part in batches(len(numbers), size) if len(numbers) else ():
        yield numbers[part]


def refuse_empty_rows(rows: Any) -> None:
    """Raise DistillError for a row of tokens that has none, as a tokenizer without special tokens makes of ""."""
    tokens = rows.table.get(TOKENS)
    found = None if tokens is None or isinstance(tokens, Tensor) else counts(tokens)
    if found is None or bool(found.all()):
        return
    empty = int((found == 0).sum())
    raise DistillError(
        f"{empty} of {len(found)} rows have no token (first: row {int(found.argmin())}), and a model answers nothing "
        "to them; leave them out: data.filter(lambda row: row['input_ids']) of a Hugging Face Dataset."
    )


def grouped(
    shuffled: Int[Tensor, " rows"], lengths: Int[Tensor, " rows"], size: int, generator: torch.Generator
) -> Int[Tensor, " rows"]:
    """Return the rows of an epoch so that each `size` of them in a row, a batch, have similar lengths.

    Args:
        shuffled: the numbers of all rows, in random order.
        lengths: the length of each row, by its number.
        size: the rows of a batch; the last batch has what remains.
        generator: draws the order of the batches, and which of the lengths the last one has.

    >>> lengths = torch.tensor([1, 9, 1, 9, 1, 9, 1, 9])
    >>> batches = grouped(torch.arange(8), lengths, 2, torch.Generator().manual_seed(0)).split(2)
    >>> sorted(lengths[batch].tolist() for batch in batches)
    [[1, 1], [1, 1], [9, 9], [9, 9]]
    """
    full, rest = divmod(len(shuffled), size)
    windows = max(WINDOWS, ceil(full / WINDOW))
    if full < 2 * windows:
        return shuffled
    starts = [full * number // windows * size for number in range(1, windows)]
    parts = [part[lengths[part].argsort(stable=True)] for part in shuffled.tensor_split(starts)]
    ragged = parts[-1]
    place = size * int(torch.randint(len(ragged) // size + 1, (1,), generator=generator))
    last = ragged[place : place + rest]
    parts[-1] = torch.cat([ragged[:place], ragged[place + rest :]])
    batches = torch.cat(parts).unflatten(0, (-1, size))
    return torch.cat([batches[torch.randperm(len(batches), generator=generator)].flatten(), last])
