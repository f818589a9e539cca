"""Several counterfactuals in one batch, one after the other: their rows, tokens, operators and measurements."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from interventions.errors import InterventionError
from interventions.execution.cells import Cell, Tokens
from interventions.execution.origins import Origin
from interventions.execution.parts import replace_part, select_part
from interventions.execution.recordings import map_tensors
from interventions.execution.run import Run
from interventions.locations import Location
from interventions.operators import Operator


@dataclass(frozen=True, eq=False)
class Stacked:
    """The counterfactuals of a grid, several of which run as one batch.

    Attributes:
        base: the base run of each counterfactual.
        source: the source run of each; None for operators that need none.
        ops: the operator at each location.
        generator: the generator of the operators.
        most: the most counterfactuals in one batch.
        measure: a function of the output of each counterfactual.
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
    """A measurement of each of several counterfactuals that lie one after the other in one output.

    Attributes:
        measure: a function of the output of one counterfactual.
        times: the number of counterfactuals.
        examples: the number of examples of each.
    """

    measure: Callable[[Any], Any]
    times: int
    examples: int

    def __call__(self, output: Any) -> list[Any]:
        if self.times == 1:
            return [self.measure(output)]
        starts = range(0, self.times * self.examples, self.examples)
        return [self.measure(rows_from(output, start, start + self.examples)) for start in starts]


@dataclass(frozen=True, eq=False)
class Summary:
    """The measurement of a sweep: the value of the metric and the shapes of the output.

    Attributes:
        measure: the metric, a function of the output.
        like: the shapes that an output must have to be measured; None is any.
    """

    measure: Callable[[Any], Any]
    like: list[tuple[int, ...]] | None = None

    def __call__(self, output: Any) -> dict[str, Any]:
        comparable = self.like is None or self.like == shapes_of(output)
        value = self.measure(output) if comparable else None
        return {"value": value, "output": map_tensors(lambda tensor: tensor.to("meta"), output)}


def rows_from(output: Any, start: int, stop: int) -> Any:
    """Return the rows of one of several counterfactuals that lie one after the other, as views."""
    return map_tensors(lambda tensor: tensor[start:stop] if tensor.ndim else tensor, output)


def chunks_of(
    rows: Sequence[tuple[Location, ...]], cells: Sequence[Sequence[Cell]], most: int, alone: Sequence[int] = ()
) -> Iterator[tuple[int, tuple[Location, ...], Sequence[Cell]]]:
    """Yield the cells that share a forward pass, with the number and the locations of their row.

    A row takes as few passes as possible, of equal size; in the rows `alone` each cell has its own.

    Args:
        rows: the locations of each row.
        cells: the cells of each row.
        most: the most cells in one pass.
        alone: the numbers of rows whose cells run alone.
    """
    for row, locations in enumerate(rows):
        count = math.ceil(len(cells[row]) / (1 if row in alone else most))
        size = math.ceil(len(cells[row]) / max(1, count))
        for number in range(count):
            yield row, locations, cells[row][number * size : (number + 1) * size]


@dataclass(frozen=True, eq=False)
class OneByOne:
    """An operator applied to several counterfactuals that lie one after the other, to each as if it were alone.

    Attributes:
        op: the operator.
        counts: the number of vectors written in each.
        source_counts: the number of vectors taken from the source of each.
    """

    op: Operator
    counts: list[int]
    source_counts: list[int]

    @classmethod
    def of(cls, op: Operator, cells: Sequence[Cell], location: Location) -> Operator:
        """Return an operator that applies `op` to each cell by itself."""
        if len(cells) == 1:
            return op
        counts, source_counts = (
            [sum(map(len, rows)) for rows in tokens]
            for tokens in (tokens_written(cells, location), tokens_taken(cells, location))
        )
        return cls(op, counts, source_counts)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # pickle looks these up before there is an op
            raise AttributeError(name)
        return getattr(self.op, name)  # needs_source and pools_source, where it has them

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        sources = [None] * len(self.counts) if source is None else source.split(self.source_counts)
        parts = zip(base.split(self.counts), sources, strict=True)
        return torch.cat([self.op(part, source_part, generator) for part, source_part in parts])


@dataclass(frozen=True, eq=False)
class Part:
    """An operator at a part of the vectors of a place.

    Attributes:
        op: the operator.
        written: the location that is written, as errors name it.
        at: the heads and dims of the vectors that it takes and replaces; None is all of them.
    """

    op: Operator
    written: Location
    at: Location | None = None

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Return the vectors `base` with what the operator makes of the part."""
        if self.at is None:
            part, taken = base, source
        else:
            part = select_part(base, self.at)
            taken = None if source is None else select_part(source, self.at)
        value = self.op(part, taken, generator)
        if not isinstance(value, Tensor) or value.shape != part.shape or value.dtype != part.dtype:
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InterventionError(
                f"operator {self.op!r} returned {got} for {part.dtype} {list(part.shape)} at {self.written}; return a "
                "tensor like its first argument, e.g. value.expand_as(base).to(base.dtype)."
            )
        return value if self.at is None else replace_part(base, value, self.at)


@dataclass(frozen=True, eq=False)
class Together:
    """The operator at a place of several counterfactuals that lie one after the other, each with parts of its own.

    Attributes:
        parts: of each counterfactual, one after the other; those without any keep their vectors.
        counts: the number of vectors of each.
        source_counts: the number of vectors taken from the source of each; None is as many of each.
    """

    parts: list[list[Part]]
    counts: list[int]
    source_counts: list[int] | None

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # pickle looks these up before there are parts
            raise AttributeError(name)
        # All are operators of one kind, so what one needs of a source all do.
        return getattr(next(part.op for parts in self.parts for part in parts), name)

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        if source is None:
            sources: Sequence[Tensor | None] = [None] * len(self.counts)
        else:
            sources = source.split(self.source_counts or len(source) // len(self.counts))
        values = []
        for parts, value, taken in zip(self.parts, base.split(self.counts), sources, strict=True):
            for part in parts:
                value = part(value, taken, generator)
            values.append(value)
        return torch.cat(values)


def positions_of(tokens: list[Tokens]) -> list[list[int]] | None:
    """Return the tokens of several cells as positions of all their examples; None where cells name none."""
    return list(chain(*tokens)) or None


def tokens_written(cells: Sequence[Cell], location: Location) -> list[Tokens]:
    """Return the tokens that each cell writes at a location; [] where cells write all tokens."""
    return [cell.tokens[location] for cell in cells if cell.tokens is not None]


def tokens_taken(cells: Sequence[Cell], location: Location) -> list[Tokens]:
    """Return the tokens that each cell takes from the source at a location; [] where they take those written."""
    return [cell.source_tokens[location] for cell in cells if cell.source_tokens is not None]


def shapes_of(value: Any) -> list[tuple[int, ...]]:
    """Return the shapes of all tensors in the inputs or the output of a model."""
    if isinstance(value, Tensor):
        return [tuple(value.shape)]
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [shape for entry in entries for shape in shapes_of(entry)]
