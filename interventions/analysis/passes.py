"""Several counterfactuals in one pass of the model: the examples repeated, each cell with its own tokens written."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from interventions.errors import InterventionError
from interventions.execution.cells import Cell
from interventions.execution.examples import examples_in
from interventions.execution.run import Run, rows_of
from interventions.execution.stacking import (
    Each,
    OneByOne,
    Stacked,
    chunks_of,
    positions_of,
    rows_at,
    shapes_of,
    taken,
    written,
)
from interventions.interchanges import interchange
from interventions.locations import Location
from interventions.models.architectures import architecture
from interventions.models.axes import axis
from interventions.runs import run

MOST_ROWS = 64  # rows of a pass, where the caller names no number
MOST_NUMBERS = 2**28  # numbers that such a pass keeps: the output, and what every block returned


@dataclass(eq=False)
class Passes:
    """Runs the counterfactuals of a grid, those of one row several in one pass.

    Attributes:
        parts: whether those that cannot share a pass, as the answers for an example depend on the others, have their
            own; else it is an error.
    """

    stacked: Stacked
    parts: bool = False
    _repeated: dict[int, Run] = field(default_factory=dict)

    def __call__(
        self, rows: Sequence[tuple[Location, ...]], cells: Sequence[Sequence[Cell]]
    ) -> Iterator[tuple[int, Cell, Any]]:
        """Each cell of each row, with what is kept of its counterfactual."""
        most = self.stacked.most
        alone = [row for row, locations in enumerate(rows) if not self._have_rows(locations)]
        for row, locations, chunk in chunks_of(rows, cells, most, alone):
            if self.parts and most > 1 and not self._is_alike(len(chunk)):
                most = 1
            for part in [chunk] if most > 1 else [[cell] for cell in chunk]:
                keep = Each(self.stacked.measure, len(part), examples_in(self.stacked.base.inputs))
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
        if not isinstance(self.stacked.source, Run):
            return True
        found, examples, states = (
            architecture(self.stacked.source.model),
            examples_in(self.stacked.source.inputs),
            self.stacked.source.activations,
        )
        places = [at if self.stacked.origin is None else self.stacked.origin.location(at) for at in locations]
        held = ((found.place(at.whole), states[at.whole]) for at in places if at.whole in states)
        return all(state.shape[axis(place.axes_of(state), "b")] == examples for place, state in held)

    def _together(self, locations: tuple[Location, ...], cells: Sequence[Cell]) -> object:
        source = self.stacked.source
        if source is not None and len(cells) > 1:
            source = source.take(torch.arange(examples_in(source.inputs)).repeat(len(cells)))
        return interchange(
            self.stacked.base.model,
            self._base(len(cells)),
            source,
            {location: OneByOne.of(self.stacked.ops[location], cells, location) for location in locations},
            positions={location: positions_of(written(cells, location)) for location in locations},
            source_positions={location: positions_of(taken(cells, location)) for location in locations},
            source_model=None if self.stacked.origin is None else self.stacked.origin.model,
            source_at=None
            if self.stacked.origin is None
            else {at: self.stacked.origin.location(at) for at in locations},
            generator=self.stacked.generator,
        ).output

    def _base(self, times: int) -> Run:
        """The base run with all its examples so many times, one after the other."""
        if times == 1:
            return self.stacked.base
        if times not in self._repeated:
            again = run(self.stacked.base.model, rows_of(self.stacked.base.inputs, self._rows(0).repeat(times)))
            if shapes_of(rows_of(again.output, self._rows(0))) != shapes_of(self.stacked.base.output):
                raise InterventionError(
                    "what the model returns for one example has another shape among more of them, so counterfactuals "
                    f"cannot share a pass; pass batch_size={examples_in(self.stacked.base.inputs)}, one counterfactual "
                    "a pass."
                )
            self._repeated[times] = replace(again, output=None)
        return self._repeated[times]

    def _rows(self, number: int) -> Tensor:
        return rows_at(number, examples_in(self.stacked.base.inputs))


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
