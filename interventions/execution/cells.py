"""The cells of a grid of counterfactuals: the tokens of each example that are written, and those of its source."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from interventions.arguments import is_whole
from interventions.errors import InterventionError
from interventions.locations import Location
from interventions.positions import Positions, check_positions, select

Tokens = list[list[int]]
"""The tokens of each example, counted over real tokens; [] for an example without the requested ones."""


@dataclass(frozen=True, eq=False)
class Column:
    """A column of the grid: the positions as the user gives them, not yet counted in any example.

    Attributes:
        label: its name in the grid.
        positions: the positions to write.
        source_positions: the positions to take from the source; None is those written.
    """

    label: int | str
    positions: Any
    source_positions: Any


@dataclass(frozen=True, eq=False)
class Cell:
    """One counterfactual of the grid.

    Attributes:
        column: the number of its column.
        tokens: the tokens written at each location; None is all tokens.
        source_tokens: the tokens taken from the source at each location; None is those written.
        present: which examples have the tokens; None is all of them.
    """

    column: int
    tokens: Mapping[Location, Tokens] | None = None
    source_tokens: Mapping[Location, Tokens] | None = None
    present: Bool[Tensor, " examples"] | None = None


def columns_of(positions: Any, source_positions: Any, longest: int) -> list[Column]:
    """Return the columns for the positions that the user gives.

    Args:
        positions: "each", None for all tokens at once, or one entry for each column.
        source_positions: None, one int for all columns, or one entry for each column.
        longest: the number of columns for "each".

    Raises:
        InterventionError: positions that are not understood; two columns of one name; other source positions than
            columns.
    """
    if positions is None:
        if source_positions is not None:
            raise InterventionError("source_positions was given with positions=None, all tokens; say where to write.")
        return [Column("all", None, None)]
    each = isinstance(positions, str) and positions == "each"
    entries = list(range(longest)) if each else _entries(positions, "positions")
    labels = list(positions) if isinstance(positions, Mapping) else [_label(entry) for entry in entries]
    if len(set(labels)) < len(labels):
        raise InterventionError("two columns of positions have the same name; label them: positions={'a label': …}.")
    if source_positions is None or is_whole(source_positions):
        sources = [source_positions] * len(entries)
    else:
        sources = _entries(source_positions, "source_positions")
    if len(sources) != len(entries):
        raise InterventionError(
            f"source_positions has {len(sources)} entries for {len(entries)} columns; give one for each."
        )
    return [Column(*column) for column in zip(labels, entries, sources, strict=True)]


def cells_of(
    columns: Sequence[Column],
    real: Mapping[Location, Bool[Tensor, "batch token"]],
    source_real: Mapping[Location, Bool[Tensor, "source_batch source_token"]] | None,
    *,
    aligned: bool,
) -> list[Cell]:
    """Return the cells of a row, without those whose tokens no example has.

    Args:
        columns: the columns of the grid.
        real: which tokens of the base are real at each location of the row.
        source_real: which tokens of the source are real, where there is a source.
        aligned: whether each example takes from the source example of the same number, not from a bag of all of them.
    """
    cells, lengths, source_lengths = [], _lengths(real), _lengths(source_real or {})
    for number, column in enumerate(columns):
        if column.positions is None:
            cells.append(Cell(number))
            continue
        source_positions = column.positions if column.source_positions is None else column.source_positions
        written = {at: _tokens(column.positions, mask, lengths[at]) for at, mask in real.items()}
        taken = {at: _tokens(source_positions, mask, source_lengths[at]) for at, mask in (source_real or {}).items()}
        needed = [*written.values(), *(taken.values() if aligned else ())]
        present = [all(rows) for rows in zip(*needed, strict=True)]
        if any(present) and all(map(any, taken.values())):
            taken = _keep_examples(present, taken) if aligned else taken
            cells.append(Cell(number, _keep_examples(present, written), taken or None, torch.tensor(present)))
    return cells


def _lengths(real: Mapping[Location, Bool[Tensor, "batch token"]]) -> dict[Location, list[int]]:
    """Return the numbers of real tokens of each example at each location."""
    return {location: mask.sum(1).tolist() for location, mask in real.items()}


def _tokens(positions: Positions, real: Bool[Tensor, "batch token"], lengths: list[int]) -> Tokens:
    """Return the tokens that `positions` names in each example: [] for an int beyond its length."""
    if isinstance(positions, int):
        return [[positions % length] if -length <= positions < length else [] for length in lengths]
    chosen = select(positions, real)
    numbers = (real.long().cumsum(1) - 1)[chosen.rows, chosen.columns]
    return [numbers[chosen.rows == row].tolist() for row in range(len(real))]


def _keep_examples(present: list[bool], tokens: Mapping[Location, Tokens]) -> dict[Location, Tokens]:
    """Return the tokens of the present examples, and [] for the others."""
    return {
        location: [row if has else [] for row, has in zip(rows, present, strict=True)]
        for location, rows in tokens.items()
    }


def _entries(positions: Any, name: str) -> list[Any]:
    """Return the positions of each column.

    Raises:
        InterventionError: no list or dict of positions.
    """
    entries = positions.values() if isinstance(positions, Mapping) else positions
    if isinstance(positions, slice):
        check_positions(positions)
    if isinstance(positions, Set):
        raise InterventionError(f"{name}={positions!r} has no order; write {name}=sorted(…).")
    if isinstance(positions, Tensor | np.ndarray):
        entries = positions.tolist() if positions.ndim == 1 else []  # [batch, k] would be taken for columns
    entries = list(entries) if isinstance(entries, Iterable) else [entries]
    entries = [index(entry) if is_whole(entry) else entry for entry in entries]
    if not entries or any(entry is None or isinstance(entry, str | bool | float | type) for entry in entries):
        raise InterventionError(
            f"{name}={positions!r} is not understood; write 'each', None for all at once, or a list with one entry "
            "for each column, such as [0, 3, -1]."
        )
    return entries


def _label(entry: Any) -> int | str:
    if isinstance(entry, int):
        return entry
    text = f"tensor{list(entry.shape)}" if isinstance(entry, Tensor) else str(entry)
    return text if len(text) <= 24 else f"{text[:23]}…"
