"""Several counterfactuals in one pass of the model: the examples repeated, each cell with its own tokens written."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from interventions.errors import InterventionError
from interventions.execution.cells import Cell, Tokens
from interventions.execution.examples import examples_in
from interventions.execution.origins import Origin
from interventions.execution.recordings import mapped
from interventions.interchanges import interchange
from interventions.locations import Location
from interventions.models.architectures import architecture
from interventions.models.axes import axis
from interventions.operators import Operator
from interventions.runs import Run, rows_of, run

MOST_ROWS = 64  # rows of a pass, where the caller names no number
MOST_NUMBERS = 2**28  # numbers that such a pass keeps: the output, and what every block returned


@dataclass(eq=False)
class Passes:
    """Runs the counterfactuals of a grid, those of one row several in one pass.

    Attributes:
        most: how many.
        measure: what is kept of the output of each.
        origin: where sources are read; None is where they are written.
        parts: whether those that cannot share a pass, as the answers for an example depend on the others, have their
            own; else it is an error.
    """

    base: Run
    source: Run | None
    ops: Mapping[Location, Operator]
    generator: torch.Generator | None
    most: int
    measure: Callable[[Any], Any]
    origin: Origin | None = None
    parts: bool = False
    _repeated: dict[int, Run] = field(default_factory=dict)

    def __call__(
        self, rows: Sequence[tuple[Location, ...]], cells: Sequence[Sequence[Cell]]
    ) -> Iterator[tuple[int, Cell, Any]]:
        """Each cell of each row, with what is kept of its counterfactual."""
        most = self.most
        alone = [row for row, locations in enumerate(rows) if not self._have_rows(locations)]
        for row, locations, chunk in chunks_of(rows, cells, most, alone):
            if self.parts and most > 1 and not self._is_alike(len(chunk)):
                most = 1
            for part in [chunk] if most > 1 else [[cell] for cell in chunk]:
                keep = Each(self.measure, len(part), examples_in(self.base.inputs))
                for cell, value in zip(part, keep(self._together(locations, part)), strict=True):
                    yield row, cell, value

    def _is_alike(self, times: int) -> bool:
        """Whether the examples so many times over have the answers' shapes of the base."""
        try:
            self._base(times)
        except InterventionError:
            return False
        return True

    def _have_rows(self, locations: tuple[Location, ...]) -> bool:
        """Whether what a source has there has one row for each example, and not for each window of them."""
        if not isinstance(self.source, Run):
            return True
        found, examples, states = (
            architecture(self.source.model),
            examples_in(self.source.inputs),
            self.source.activations,
        )
        places = [at if self.origin is None else self.origin.location(at) for at in locations]
        held = ((found.place(at.whole), states[at.whole]) for at in places if at.whole in states)
        return all(state.shape[axis(place.axes_of(state), "b")] == examples for place, state in held)

    def _together(self, locations: tuple[Location, ...], cells: Sequence[Cell]) -> object:
        source = self.source
        if source is not None and len(cells) > 1:
            source = source.take(torch.arange(examples_in(source.inputs)).repeat(len(cells)))
        return interchange(
            self.base.model,
            self._base(len(cells)),
            source,
            {location: OneByOne.of(self.ops[location], cells, location) for location in locations},
            positions={location: positions_of(written(cells, location)) for location in locations},
            source_positions={location: positions_of(taken(cells, location)) for location in locations},
            source_model=None if self.origin is None else self.origin.model,
            source_at=None if self.origin is None else {at: self.origin.location(at) for at in locations},
            generator=self.generator,
        ).output

    def _base(self, times: int) -> Run:
        """The base run with all its examples so many times, one after the other."""
        if times == 1:
            return self.base
        if times not in self._repeated:
            again = run(self.base.model, rows_of(self.base.inputs, self._rows(0).repeat(times)))
            if shapes_of(rows_of(again.output, self._rows(0))) != shapes_of(self.base.output):
                raise InterventionError(
                    "what the model returns for one example has another shape among more of them, so counterfactuals "
                    f"cannot share a pass; pass batch_size={examples_in(self.base.inputs)}, one counterfactual a pass."
                )
            self._repeated[times] = replace(again, output=None)
        return self._repeated[times]

    def _rows(self, number: int) -> Tensor:
        return rows_at(number, examples_in(self.base.inputs))


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


def cells_a_pass(base: Run, batch_size: int | None) -> int:
    """How many counterfactuals share a pass."""
    examples = examples_in(base.inputs)
    if batch_size is not None and batch_size < examples:
        raise InterventionError(
            f"batch_size={batch_size} rows do not hold one counterfactual of {examples} examples; write "
            f"batch_size={examples} or more, or sweep fewer examples at a time."
        )
    given, returned = shapes_of(base.inputs), shapes_of(base.output)
    if {shape[:1] for shape in given if shape} != {(examples,)} or {shape[:1] for shape in returned} != {(examples,)}:
        return 1  # something cannot be repeated, or is one number for all of the pass
    if batch_size is None:
        kept = shapes_of([base.output, [call.raw for call in base.recording.calls] if base.recording else None])
        batch_size = min(MOST_ROWS, examples * MOST_NUMBERS // max(1, sum(map(math.prod, kept))))
    return max(1, batch_size // examples)


def shapes_of(value: Any) -> list[tuple[int, ...]]:
    """The shapes of all tensors in what a model is called with or returns."""
    if isinstance(value, Tensor):
        return [tuple(value.shape)]
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [shape for entry in entries for shape in shapes_of(entry)]
