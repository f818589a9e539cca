"""Several counterfactuals in one batch: which rows are whose, and what each is given."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from interventions.execution.cells import Cell, Tokens
from interventions.execution.origins import Origin
from interventions.execution.recordings import mapped
from interventions.execution.run import Run, rows_of
from interventions.locations import Location
from interventions.operators import Operator


@dataclass(frozen=True, eq=False)
class Stacked:
    """The counterfactuals of a grid, several of which are run as one batch.

    Attributes:
        base, source: the runs that each of them is of; no source for operators that need none.
        ops: the operator at each location.
        generator: of operators that draw.
        most: how many are run together.
        measure: what is kept of the output of each.
        origin: where sources are read; None is where they are written.
    """

    base: Run
    source: Run | None
    ops: Mapping[Location, Operator]
    generator: torch.Generator | None
    most: int
    measure: Callable[[Any], Any]
    origin: Origin | None = None


@dataclass(frozen=True, eq=False)
class Each:
    """What is kept of each of several counterfactuals in one output, one after the other.

    Attributes:
        times: how many they are.
        examples: of each.
    """

    measure: Callable[[Any], Any]
    times: int
    examples: int

    def __call__(self, output: Any) -> list[Any]:
        if self.times == 1:
            return [self.measure(output)]
        return [self.measure(rows_of(output, rows_at(number, self.examples))) for number in range(self.times)]


@dataclass(frozen=True, eq=False)
class Summary:
    """What a sweep needs of the output of a run: what the metric says, and the shapes.

    Attributes:
        like: measure it only if it has these shapes.
    """

    measure: Callable[[Any], Any]
    like: list[tuple[int, ...]] | None = None

    def __call__(self, output: Any) -> dict[str, Any]:
        comparable = self.like is None or self.like == shapes_of(output)
        value = self.measure(output) if comparable else None
        return {"value": value, "output": mapped(lambda tensor: tensor.to("meta"), output)}


def rows_at(number: int, examples: int) -> Tensor:
    """The rows of one of several counterfactuals that lie one after the other."""
    return torch.arange(number * examples, (number + 1) * examples)


def chunks_of(
    rows: Sequence[tuple[Location, ...]], cells: Sequence[Sequence[Cell]], most: int, alone: Sequence[int] = ()
) -> Iterator[tuple[int, tuple[Location, ...], Sequence[Cell]]]:
    """The cells of each row that share a pass: of one size, where that is as few passes; in rows `alone`, each one."""
    for row, locations in enumerate(rows):
        count = math.ceil(len(cells[row]) / (1 if row in alone else most))
        size = math.ceil(len(cells[row]) / max(1, count))
        for number in range(count):
            yield row, locations, cells[row][number * size : (number + 1) * size]


@dataclass(frozen=True, eq=False)
class OneByOne:
    """An operator on several counterfactuals that lie one after the other: it sees each as if it were alone.

    Attributes:
        counts: how many vectors of each are written.
        source_counts: how many of its source each is given.
    """

    op: Operator
    counts: list[int]
    source_counts: list[int]

    @classmethod
    def of(cls, op: Operator, cells: Sequence[Cell], location: Location) -> Operator:
        """`op` itself for one cell."""
        if len(cells) == 1:
            return op
        counts = [[sum(map(len, rows)) for rows in each] for each in (written(cells, location), taken(cells, location))]
        return cls(op, counts[0], counts[1])

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # asked for before there is an op, when it is unpickled
            raise AttributeError(name)
        return getattr(self.op, name)  # needs_source and pools_source, where it has them

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        sources = [None] * len(self.counts) if source is None else source.split(self.source_counts)
        parts = zip(base.split(self.counts), sources, strict=True)
        return torch.cat([self.op(mine, its, generator) for mine, its in parts])


def positions_of(tokens: list[Tokens]) -> list[list[int]] | None:
    """The tokens of several cells as positions of all their examples; None where cells name none."""
    return list(chain(*tokens)) or None


def written(cells: Sequence[Cell], location: Location) -> list[Tokens]:
    """What each cell writes at a location; nothing where cells write all tokens."""
    return [cell.tokens[location] for cell in cells if cell.tokens is not None]


def taken(cells: Sequence[Cell], location: Location) -> list[Tokens]:
    """What each cell takes from the source at a location."""
    return [cell.source_tokens[location] for cell in cells if cell.source_tokens is not None]


def shapes_of(value: Any) -> list[tuple[int, ...]]:
    """The shapes of all tensors in what a model is called with or returns."""
    if isinstance(value, Tensor):
        return [tuple(value.shape)]
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [shape for entry in entries for shape in shapes_of(entry)]
