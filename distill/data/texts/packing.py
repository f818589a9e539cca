"""Packing: several documents in a row of tokens, whose `position_ids` begin anew with each of them.

A model that keeps documents apart answers each as it does alone (`distill/models/token_positions.py` finds out whether
it does), and no answer is to the first token of another document.

Krell et al. 2021 (arXiv:2107.02027), section 3; Ding et al. 2024 (arXiv:2404.10830), section 3: best-fit decreasing.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from distill.data.texts.tokens import TokenRow

BEST_FIT, IN_ORDER = "best-fit", "in order"
STRATEGIES = (BEST_FIT, IN_ORDER)


def packed(table: Mapping[str, Sequence[Tensor]], block: int, packing: str | None = None) -> dict[str, list[Tensor]]:
    """Return the columns with several documents in a row, and their `position_ids`.

    Args:
        table: columns of 1-D tensors, none longer than a block.
        block: the number of tokens of a row.
        packing: "best-fit" (the default) puts the longest documents first into the row that they fill best; "in order"
            keeps documents beside each other that are so in the data.
    """
    lengths = [len(row) for row in next(iter(table.values()))]
    places = _in_order(lengths, block) if packing == IN_ORDER else _best_fit(lengths, block)
    joined = {name: [torch.cat([rows[i] for i in part]) for part in places] for name, rows in table.items()}
    counts = torch.arange(block)
    joined["position_ids"] = [torch.cat([counts[: lengths[i]] for i in part]) for part in places]
    return joined


def pieces_of(row: TokenRow, size: int) -> Iterator[TokenRow]:
    """Yield the tokens of a row in pieces, each a document of its own."""
    for start in range(0, len(row.ids), size):
        yield TokenRow(row.ids[start : start + size], row.learned[start : start + size])


def _in_order(lengths: Sequence[int], block: int) -> list[list[int]]:
    """Return the documents of each row, each row filled with those that follow."""
    rows: list[list[int]] = []
    free = 0
    for number, length in enumerate(lengths):
        if not rows or length > free:
            rows.append([])
            free = block
        rows[-1].append(number)
        free -= length
    return rows


def _best_fit(lengths: Sequence[int], block: int) -> list[list[int]]:
    """Return the documents of each row by best-fit decreasing: at most 11/9 of the fewest rows and one.

    Rows stand in the order of their first document, and so do documents in a row.

    >>> _best_fit([3, 5, 2, 6], 8)
    [[0, 1], [2, 3]]
    """
    rows: list[list[int]] = []
    by_free: defaultdict[int, list[int]] = defaultdict(list)
    known: list[int] = []  # the amounts of free tokens that any row has, ascending
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[number]
        if (place := bisect_left(known, length)) < len(known):
            free = known[place]
            row = by_free[free].pop()
            if not by_free[free]:
                known.pop(place)
        else:
            free, row = block, len(rows)
            rows.append([])
        rows[row].append(number)
        if (remaining := free - length) > 0:
            if not by_free[remaining]:
                insort(known, remaining)
            by_free[remaining].append(row)
    return sorted(map(sorted, rows))
