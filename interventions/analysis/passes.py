"""Several counterfactuals in one forward pass: the examples are repeated, and each cell writes into its own copies."""

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
    tokens_taken,
    tokens_written,
)
from interventions.interchanges import interchange
from interventions.locations import Location
from interventions.models.architectures import architecture
from interventions.models.axes import axis
from interventions.runs import run

MOST_ROWS = 64  # rows of a pass, if the caller names no number
MOST_NUMBERS = 2**28  # numbers that such a pass keeps in memory: the output, and what every block returns


@dataclass(eq=False)
class Passes:
    """Forward passes of the counterfactuals of a grid, several of one row in each pass.

    Attributes:
        stacked: the base, the source, the operators and the metric.
        parts: True gives each counterfactual its own pass where the answers for an example depend on the others;
            False raises an error there.
    """

    stacked: Stacked
    parts: bool = False
    _repeated: dict[int, Run] = field(default_factory=dict)

    def __call__(
        self, rows: Sequence[tuple[Location, ...]], cells: Sequence[Sequence[Cell]]
    ) -> Iterator[tuple[int, Cell, Any]]:
        """Yield each cell with the number of its row and the metric of its counterfactual."""
        most = self.stacked.most
        alone = [row for row, locations in enumerate(rows) if not self._has_row_for_each(locations)]
        for row, locations, chunk in chunks_of(rows, cells, most, alone):
            if self.parts and most > 1 and not self._keeps_shapes(len(chunk)):
                most = 1
            for part in [chunk] if most > 1 else [[cell] for cell in chunk]:
                keep = Each(self.stacked.measure, len(part), examples_in(self.stacked.base.inputs))
                for cell, value in zip(part, keep(self._run_together(locations, part)), strict=True):
                    yield row, cell, value

    def _keeps_shapes(self, times: int) -> bool:
        """Return whether the output for one example keeps its shape when the examples are repeated."""
        try:
            self._base(times)
        except InterventionError:
            return False
        return True

    def _has_row_for_each(self, locations: tuple[Location, ...]) -> bool:
        """Return whether the source's activations at the locations have one row for each example, not for windows."""
        if not isinstance(self.stacked.source, Run):
            return True
        found, examples, states = (
            architecture(self.stacked.source.model),
            examples_in(self.stacked.source.inputs),
            self.stacked.source.activations,
        )
        places = [at if self.stacked.origin is None else self.stacked.origin.location(at) for at in locations]
        states_at = ((found.place(at.whole), states[at.whole]) for at in places if at.whole in states)
        return all(state.shape[axis(place.axes_of(state), "b")] == examples for place, state in states_at)

    def _run_together(self, locations: tuple[Location, ...], cells: Sequence[Cell]) -> object:
        """Return the output of one pass that computes the counterfactuals of all `cells`."""
        source = self.stacked.source
        if source is not None and len(cells) > 1:
            source = source.take(torch.arange(examples_in(source.inputs)).repeat(len(cells)))
        return interchange(
            self.stacked.base.model,
            self._base(len(cells)),
            source,
            {location: OneByOne.of(self.stacked.ops[location], cells, location) for location in locations},
            positions={location: positions_of(tokens_written(cells, location)) for location in locations},
            source_positions={location: positions_of(tokens_taken(cells, location)) for location in locations},
            source_model=None if self.stacked.origin is None else self.stacked.origin.model,
            source_at=None
            if self.stacked.origin is None
            else {at: self.stacked.origin.location(at) for at in locations},
            generator=self.stacked.generator,
        ).output

    def _base(self, times: int) -> Run:
        """Return the base run with all of its examples repeated, run once for each number of times."""
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
    """Return how many counterfactuals share a pass.

    Raises:
        InterventionError: `batch_size` is smaller than the number of examples.
    """
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
