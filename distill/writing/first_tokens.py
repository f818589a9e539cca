"""Rows of tokens whose first tokens are a prompt: their labels are −100 there, and the tokens after it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from jaxtyping import Int
from torch import Tensor

from distill.data.missing import IGNORED
from distill.data.sources.lazy_columns import Column, LazyColumn, Values, read_columns

IDS, MASK, LABELS = "input_ids", "attention_mask", "labels"


def labels_after(table: Mapping[str, Column], count: int) -> Column:
    """Return labels of rows of tokens, −100 at the first tokens of each that are no padding, and at padding.

    Args:
        table: the columns, `input_ids` and perhaps `attention_mask`; labels of rows that are read when they are used
            are read then.
        count: the number of tokens of a prompt.
    """
    ids, mask = table[IDS], table.get(MASK)
    if isinstance(ids, LazyColumn) or isinstance(mask, LazyColumn):
        return LazyColumn(_Parted({IDS: ids, **({} if mask is None else {MASK: mask})}, count), LABELS)
    return _parted(ids, mask, count)


@dataclass(frozen=True, eq=False)
class _Parted:
    """A store of the labels of rows that are read when they are used; it reads their tokens once more."""

    table: Mapping[str, Column]
    count: int

    def __len__(self) -> int:
        return len(self.table[IDS])

    def read(self, names: Sequence[str], numbers: Int[Tensor, " rows"]) -> Mapping[str, Values]:
        """Return the labels of rows."""
        read = read_columns(self.table, numbers)
        labels = _parted(read[IDS], read.get(MASK), self.count)
        return dict.fromkeys(names, labels)

    def lengths(self, name: str) -> Int[Tensor, " rows"] | None:
        """Return the number of labels in each row, as far as that of its tokens is known without them."""
        ids = self.table[IDS]
        return ids.lengths() if isinstance(ids, LazyColumn) else torch.tensor([len(each) for each in ids])


def _parted(ids: Column, mask: Column | None, count: int) -> Values:
    """Return labels of rows that were read."""
    if isinstance(ids, Tensor):
        return _after(ids, None if mask is None else torch.stack(list(mask)), count)
    masks = repeat(None) if mask is None else mask
    return [_after(row, own, count) for row, own in zip(ids, masks, strict=False)]


def _after(ids: Int[Tensor, "*batch token"], mask: Tensor | None, count: int) -> Int[Tensor, "*batch token"]:
    """Return the tokens, −100 at the first that are real, and at those that are not."""
    real = torch.ones_like(ids) if mask is None else mask.to(ids.dtype)
    return ids.where((real > 0) & (real.cumsum(-1) > count), IGNORED)
