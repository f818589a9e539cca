"""Several counterfactuals in one forward pass: the examples are repeated, and each cell writes into its own copies."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from interventions.analysis.batches import (
    Batches,
    Counterfactual,
    cells_a_pass,
    cost_of,
    draw_nothing,
    keep_freed_memory,
)
from interventions.analysis.readings import Reading, reading_of
from interventions.analysis.repeated_base import RepeatedBase
from interventions.errors import InterventionError
from interventions.execution.cells import Cell, Tokens
from interventions.execution.examples import examples_in
from interventions.execution.run import Run
from interventions.execution.stacking import Each, Part, Stacked, Together, shapes_of
from interventions.hooks.installation import user_hooks
from interventions.hooks.scopes import open_scopes
from interventions.interchanges import interchange
from interventions.locations import Location
from interventions.models.answers import UnknownAnswer, logits_of
from interventions.models.architectures import architecture
from interventions.models.axes import axis
from interventions.models.calls import parameters_of
from interventions.models.places import Place
from interventions.models.wrappers import module_of, unwrapped

KEPT = "logits_to_keep"
"""The argument of models of transformers that says of which tokens the logits are computed."""


@dataclass(eq=False)
class Passes:
    """Forward passes of the counterfactuals of a grid, several in each pass.

    Attributes:
        stacked: the base, the source, the operators and the metric.
        batch_size: the most rows of a pass; None is as many as fit. Then each counterfactual has its own pass where the
            answers for an example depend on the others; with a number that is an error.
        alone: whether each counterfactual has its own pass.
        keeps_all: whether the logits of all tokens are computed.
    """

    stacked: Stacked
    batch_size: int | None = None
    alone: bool = False
    keeps_all: bool = False
    _bases: dict[bool, RepeatedBase] = field(default_factory=dict)
    _rows: dict[Location, bool] = field(default_factory=dict)

    def __call__(
        self, rows: Sequence[tuple[Location, ...]], cells: Sequence[Sequence[Cell]]
    ) -> Iterator[tuple[int, Cell, Any]]:
        """Yield each cell with the number of its row and the metric of its counterfactual."""
        for part in self.each(rows, cells):
            yield from part

    def each(
        self,
        rows: Sequence[tuple[Location, ...]],
        cells: Sequence[Sequence[Cell]],
        known: Collection[tuple[int, int]] = (),
    ) -> Iterator[list[tuple[int, Cell, Any]]]:
        """Yield the cells of each pass with the numbers of their rows and the metrics of their counterfactuals.

        Args:
            rows: the locations of each row.
            cells: the cells of each row.
            known: numbers of rows and columns; a pass all of whose cells are among them is left out.
        """
        self.keeps_all = self.keeps_all or not all(map(self._comes_before_the_logits, rows))
        reading = self.reading
        share = 1.0 if reading is None else len(reading.columns) / self.stacked.base.logits.shape[1]
        batches = Batches(
            cells_a_pass(self.stacked.base, self.batch_size, share),
            self._first,
            self._joins,
            lambda row: all(map(self._has_a_row_for_each, row)),
            draw_nothing(self.stacked.ops),
            cost_of(self.stacked.base),
        )
        keep_freed_memory(self.stacked.base)
        for batch in batches.of(rows, cells):
            if not known or any((each.row, each.cell.column) not in known for each in batch):
                yield list(self._measured(batch))

    @cached_property
    def _reading(self) -> Reading | None:
        """The tokens that the metric reads, where the model can compute the logits of these alone."""
        base = self.stacked.base
        model, given = module_of(base.model), base.inputs
        if KEPT not in parameters_of(unwrapped(model)[-1]) or not isinstance(given, Mapping):
            return None
        if given.get(KEPT) is not None or given.get("labels") is not None:
            return None
        if open_scopes(model) or user_hooks(model):
            return None  # they may count on all tokens
        try:
            logits = logits_of(base.output)
        except UnknownAnswer:
            return None
        reading = reading_of(self.stacked.measure, *logits.shape[:2]) if logits.ndim == 3 else None
        return reading if reading is not None and len(reading.columns) < logits.shape[1] else None

    @property
    def reading(self) -> Reading | None:
        """The tokens whose logits alone are computed, with the metric; None computes those of all tokens."""
        return None if self.keeps_all else self._reading

    @cached_property
    def _places(self) -> dict[Location, Place]:
        """The places that are written, by their whole locations."""
        found = architecture(self.stacked.base.model)
        return {whole: found.place(whole) for whole in dict.fromkeys(at.whole for at in self.stacked.ops)}

    def _comes_before_the_logits(self, locations: tuple[Location, ...]) -> bool:
        """Return whether all locations of a row are in a block or before all of them, where all tokens are computed."""
        return all(at.site == "embedding" or self._places[at.whole].block is not None for at in locations)

    def _measured(self, batch: list[Counterfactual]) -> Iterator[tuple[int, Cell, Any]]:
        """Yield the cells of a batch with the numbers of their rows and their metrics."""
        if self.alone and len(batch) > 1:
            for each in batch:
                yield from self._measured([each])
            return
        output, reading = self._run_together(batch), self.reading
        if shapes_of(output) != self._shapes(len(batch)):
            if reading is not None:
                self.keeps_all = True
            elif self.batch_size is None and len(batch) > 1:
                self.alone = True
            elif len(batch) > 1:
                raise InterventionError(
                    "what the model returns for one example has another shape among more of them, so counterfactuals "
                    f"cannot share a pass; pass batch_size={examples_in(self.stacked.base.inputs)}, one counterfactual "
                    "a pass."
                )
            if reading is not None or len(batch) > 1:
                yield from self._measured(batch)
                return
        if reading is None:
            values = Each(self.stacked.measure, len(batch), examples_in(self.stacked.base.inputs))(output)
        else:
            values = reading.each(output, len(batch))
        for each, value in zip(batch, _on_cpu(values), strict=True):
            yield each.row, each.cell, value

    def _shapes(self, times: int) -> list[tuple[int, ...]]:
        """Return the shapes of the output of a pass where each example is answered by itself."""
        shapes, reading = shapes_of(self.stacked.base.output), self.reading
        if reading is not None:
            whole = tuple(self.stacked.base.logits.shape)
            shapes = [(whole[0], len(reading.columns), whole[2]) if shape == whole else shape for shape in shapes]
        return shapes if times == 1 else [(shape[0] * times, *shape[1:]) for shape in shapes]

    def _joins(self, locations: tuple[Location, ...]) -> bool:
        """Return whether the counterfactuals of a row may share a pass with those of other rows."""
        return self._takes_parts and all(at.subspace is None for at in locations)

    @cached_property
    def _takes_parts(self) -> bool:
        """True where operators may work on whole vectors, of which each takes its part.

        Not so where sources are read elsewhere, or where some operators pool their sources and some do not.
        """
        pools = {bool(getattr(op, "pools_source", False)) for op in self.stacked.ops.values()}
        return self.stacked.origin is None and len(pools) == 1

    def _has_a_row_for_each(self, location: Location) -> bool:
        """Return whether the source's activation at a location has one row for each example, not for windows."""
        origin, source = self.stacked.origin, self.stacked.source
        read = (location if origin is None else origin.location(location)).whole
        if read not in self._rows:
            self._rows[read] = True
            if isinstance(source, Run) and read in source.activations:
                state = source.activations[read]
                place = self._places[read] if origin is None else origin.place(location)
                self._rows[read] = state.shape[axis(place.axes_of(state), "b")] == examples_in(source.inputs)
        return self._rows[read]

    def _first(self, locations: tuple[Location, ...]) -> int:
        """Return how many calls of blocks come before what is written at the locations, and are not run again."""
        return min(self._reusable[at.whole] for at in locations)

    @cached_property
    def _reusable(self) -> dict[Location, int]:
        """The number of calls of blocks before each whole location."""
        recording = self.stacked.base.recording
        return {at: 0 if recording is None else recording.reusable([place]) for at, place in self._places.items()}

    def _run_together(self, batch: list[Counterfactual]) -> object:
        """Return the output of one pass that computes the counterfactuals of a batch."""
        stacked, times = self.stacked, len(batch)
        source = stacked.source
        if source is not None and times > 1:
            source = source.take(torch.arange(examples_in(source.inputs)).repeat(times))
        writes = {key: self._written(key, batch) for key in self._keys(batch)}
        origin = stacked.origin
        return interchange(
            stacked.base.model,
            self._base.times(times, min(self._first(each.locations) for each in batch)),
            source,
            {key: op for key, (op, _, _) in writes.items()},
            positions={key: to for key, (_, to, _) in writes.items()},
            source_positions={key: of for key, (_, _, of) in writes.items()},
            source_model=None if origin is None else origin.model,
            source_at=None if origin is None else {at: origin.location(at) for at in writes},
            generator=stacked.generator,
        ).output

    def _keys(self, batch: list[Counterfactual]) -> list[Location]:
        """Return the locations that a batch is written at: whole ones, of which each counterfactual writes a part."""
        return list(dict.fromkeys(self._key(at) for each in batch for at in each.locations))

    def _key(self, location: Location) -> Location:
        return location.whole if self._takes_parts and location.subspace is None else location

    def _written(self, key: Location, batch: list[Counterfactual]) -> tuple[Together, Any, Any]:
        """Return the operator of a batch at one location, the tokens that it writes and those it takes."""
        mine = [[at for at in each.locations if self._key(at) == key] for each in batch]
        parts = [[Part(self.stacked.ops[at], at, None if at == key else at) for at in own] for own in mine]
        examples = examples_in(self.stacked.base.inputs)
        if batch[0].cell.tokens is None:
            return Together(parts, [examples] * len(batch), None), None, None
        to = [_tokens(each.cell.tokens, own, examples) for each, own in zip(batch, mine, strict=True)]
        of = None
        if self.stacked.source is not None:
            others = examples_in(self.stacked.source.inputs)
            of = [_tokens(each.cell.source_tokens, own, others) for each, own in zip(batch, mine, strict=True)]
        counts, source_counts = ([sum(map(len, rows)) for rows in tokens] for tokens in (to, of or []))
        chosen = Together(parts, counts, source_counts or None)
        return chosen, _joined(to), None if of is None else _joined(of)

    @property
    def _base(self) -> RepeatedBase:
        """The base run, repeated, with the tokens whose logits are computed."""
        narrow = self.reading is not None
        if narrow not in self._bases:
            self._bases[narrow] = RepeatedBase(self.stacked.base, self._options())
        return self._bases[narrow]

    def _options(self) -> dict[str, object]:
        """Return the arguments that the model is called with besides the inputs."""
        if self.reading is None:
            return {}
        columns, tokens = self.reading.columns, self.stacked.base.logits.shape[1]
        count = len(columns)
        at_end = torch.equal(columns, torch.arange(tokens - count, tokens))
        return {KEPT: count if at_end else columns.to(self.stacked.base.logits.device)}


def _tokens(tokens: Mapping[Location, Tokens] | None, own: list[Location], examples: int) -> Tokens:
    """Return the tokens of a counterfactual at one of its own locations; none for each example without a location."""
    return tokens[own[0]] if tokens is not None and own else [[] for _ in range(examples)]


def _joined(tokens: list[Tokens]) -> Tokens:
    return [row for rows in tokens for row in rows]


def _on_cpu(values: list[Any]) -> list[Any]:
    """Return values of a metric on the CPU, moved at once where they are tensors of one kind."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    kinds = {(value.shape, value.dtype, value.device) for value in tensors}
    if len(tensors) < len(values) or len(kinds) != 1 or tensors[0].device.type == "cpu":
        return values
    return list(torch.stack(tensors).cpu().unbind())
