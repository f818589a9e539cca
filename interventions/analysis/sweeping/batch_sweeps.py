"""One batch of a sweep: the base and the source run once, and then the counterfactuals, several in each pass."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from interventions.analysis.batches import cells_a_pass
from interventions.analysis.grids import Grid
from interventions.analysis.passes import Passes
from interventions.analysis.progress import Steps
from interventions.endings import without_gradients
from interventions.errors import InterventionError
from interventions.execution.cells import Cell, Column, cells_of, columns_of
from interventions.execution.examples import examples_in
from interventions.execution.origins import Origin, Stored, check_source_inputs, origin_of
from interventions.execution.run import Inputs, Run
from interventions.execution.stacking import Stacked, Summary, shapes_of
from interventions.execution.stamps import unchanged
from interventions.locations import Location
from interventions.metrics import Metric, Normalized, name_of
from interventions.models.architectures import architecture
from interventions.models.calls import arguments_of
from interventions.models.wrappers import Model, is_traced
from interventions.operators import Operator
from interventions.positions import select
from interventions.precision import widen
from interventions.runs import as_run, check_eval, run, traced
from interventions.steps import window_of


@dataclass(frozen=True, eq=False)
class SweepSettings:
    """The settings of a sweep, which are those of each of its batches.

    Attributes:
        model: the model.
        rows: the rows of the grid, {label: the locations written together}.
        ops: the operator at each location.
        positions, source_positions, source_model, source_at, batch_size, generator, remote: as for `sweep`.
        is_part: whether other batches may have the tokens of a column that this one lacks.
    """

    model: Model
    rows: Mapping[str, tuple[Location, ...]]
    ops: Mapping[Location, Operator]
    positions: Any = "each"
    source_positions: Any = None
    source_model: Any = None
    source_at: Any = None
    batch_size: int | None = None
    generator: torch.Generator | None = None
    remote: bool | str = False
    is_part: bool = False


Measured = tuple[int, int, Tensor]
"""A cell that was measured: the numbers of its row and its column, and the metric of each example."""


@runtime_checkable
class Kept(Protocol):
    """The cells that were measured before, and where new ones are kept."""

    @property
    def known(self) -> Mapping[tuple[int, int], Tensor]: ...

    def keep(self, cells: Sequence[Measured]) -> None:
        """Keep the cells of one pass."""


@dataclass(frozen=True, eq=False)
class BatchGrid:
    """The grid of one batch.

    Attributes:
        grid: the grid.
        filled: the numbers of the columns that some example has tokens for.
        longest: the number of tokens of the longest example; 0 where positions are not counted.
    """

    grid: Grid
    filled: frozenset[int]
    longest: int


def sweep_batch(
    settings: SweepSettings,
    base: Inputs | Run,
    source: Inputs | Run | Stored | None,
    metric: Callable[[Any], Tensor],
    *,
    steps: Steps,
    kept: Kept | None = None,
) -> BatchGrid:
    """Return the grid of one batch.

    Args:
        settings: the settings of the sweep.
        base, source, metric: as for `sweep`.
        steps: counts the cells.
        kept: cells that were measured before, and where new ones are kept.

    Raises:
        InterventionError: as `sweep`.
    """
    model, ops, remote = settings.model, settings.ops, settings.remote
    rows = list(settings.rows.values())
    wholes = list(dict.fromkeys(location.whole for locations in rows for location in locations))
    origin = origin_of(model, source, settings.source_model, settings.source_at, ops)
    sender = model if origin is None else origin.model
    if origin is not None:
        check_eval(sender)
    read = wholes if origin is None else list(dict.fromkeys(origin.location(location).whole for location in ops))
    with without_gradients(), unchanged():
        base_run, base_value = _run_base(model, base, wholes, metric, remote)
        summary = Summary(metric, shapes_of(base_run.output))
        source_run, source_value = _run_source(sender, source, read, summary, remote)
        examples = examples_in(base_run.inputs)
        if examples == 0:
            raise InterventionError("the base has 0 examples, so there is nothing to measure; give at least one row.")
        check_sizes(ops, examples, source_run)
        check_reads_real(metric, base_run)
        baseline = check_value(base_value, examples, "the base run")
        columns, cells = cells_in(rows, settings, base=base_run, source=source_run, origin=origin)
        values = baseline.new_full((len(rows), len(columns), len(baseline)), math.nan)
        most = cells_a_pass(base_run, settings.batch_size)
        stacked = Stacked(base_run, source_run, ops, settings.generator, most, metric, origin)
        steps.expect(sum(map(len, cells)))
        known = {} if kept is None else dict(kept.known)
        for (row, column), value in known.items():
            values[row, column] = value
        steps(len(known))
        for part in _parts(settings, stacked, rows, cells, known):
            found = []
            for row, cell, value in part:
                at_row = " + ".join(map(str, rows[row]))
                what = f"the counterfactual at {at_row}, position {columns[cell.column].label}"
                values[row, cell.column] = mask_absent(check_value(value, examples, what), cell)
                found.append((row, cell.column, values[row, cell.column]))
                steps()
            if kept is not None:
                kept.keep(found)
        level = None if source_value is None else check_value(source_value, examples, "the source run")
    labels = tuple(column.label for column in columns)
    grid = Grid(values, settings.rows, labels, baseline, level, name_of(metric), getattr(metric, "is_signed", False))
    longest = len(columns) if isinstance(settings.positions, str) else 0
    return BatchGrid(grid, frozenset(cell.column for row in cells for cell in row), longest)


def _parts(
    settings: SweepSettings,
    stacked: Stacked,
    rows: list[tuple[Location, ...]],
    cells: list[list[Cell]],
    known: Collection[tuple[int, int]],
) -> Iterator[list[tuple[int, Cell, Any]]]:
    """Yield the cells of each pass with the numbers of their rows and their metrics, without passes that are known."""
    tracing = traced(settings.model, settings.remote)
    if tracing is None:
        yield from Passes(stacked, settings.batch_size).each(rows, cells, known)
    else:
        yield from ([cell] for cell in tracing.measured(stacked, settings.remote, rows, cells))


def _run_base(
    model: Model, base: Inputs | Run, at: list[Location], metric: Callable[[Any], Tensor], remote: bool | str
) -> tuple[Run, Any]:
    """Return the base run and its metric."""
    if is_traced(model) and not isinstance(base, Run):
        return _run_summary(model, base, at, Summary(metric), remote)
    done = as_run(model, base, at, remote=remote)
    if done.output is None or done.is_counterfactual:
        raise InterventionError(
            "the base stopped early or is itself a counterfactual run; pass a run of the model itself, or inputs."
        )
    return done, metric(done.output)


def _run_source(
    model: Model, source: Inputs | Run | Stored | None, at: list[Location], summary: Summary, remote: bool | str
) -> tuple[Run | None, Any]:
    """Return the source run and its metric, which is None if its output has another shape than that of the base."""
    if source is None:
        return None, None
    if is_traced(model) and not isinstance(source, Run):
        return _run_summary(model, source, at, summary, remote)
    if isinstance(source, Stored):
        raise InterventionError(
            "a sweep repeats the examples of its source, and Stored activations have no run; give inputs or a Run, or "
            "write one place at a time: interchange(model, base, source=Stored(…), at=Location(3))."
        )
    with check_source_inputs(source, model):
        done = as_run(model, source, at, resumable=False, remote=remote)
    return done, summary.measure(done.output) if shapes_of(done.output) == summary.like else None


def _run_summary(
    model: Model, inputs: Inputs, at: list[Location], summary: Summary, remote: bool | str
) -> tuple[Run, Any]:
    """Run a traced model, and return a Run with the shapes of output and activations alone, and its metric."""
    done = run(model, inputs, at, device="meta", keep=summary, remote=remote)
    kept: Any = done.output
    return replace(done, output=kept["output"]), kept["value"]


def check_sizes(ops: Mapping[Location, Operator], examples: int, source: Run | None) -> None:
    """Raise InterventionError for a source of another number of examples than the base, unless operators pool it."""
    pools = all(getattr(op, "pools_source", False) for op in ops.values())
    if source is None or pools or examples_in(source.inputs) == examples:
        return
    raise InterventionError(
        f"the base has {examples} examples and the source {examples_in(source.inputs)}; give one source an example."
    )


def cells_in(
    rows: list[tuple[Location, ...]],
    settings: SweepSettings,
    *,
    base: Run,
    source: Run | None,
    origin: Origin | None,
) -> tuple[list[Column], list[list[Cell]]]:
    """Return the columns, and the cells of each row."""
    positions, source_positions, ops = settings.positions, settings.source_positions, settings.ops
    if source_positions is not None and source is None:
        raise InterventionError("source_positions was given with no source; leave it out.")
    if positions is None:
        columns = columns_of(None, source_positions, 0)
        return columns, [cells_of(columns, {}, None, aligned=True) for _ in rows]
    written = dict.fromkeys(at.whole for row in rows for at in row)
    here = {whole: real_tokens(base, whole) for whole in written}
    real = [{at: here[at.whole] for at in row} for row in rows]
    reads = {at: (at if origin is None else origin.location(at)).whole for row in rows for at in row}
    there = {} if source is None else {whole: real_tokens(source, whole) for whole in dict.fromkeys(reads.values())}
    sources = [None if source is None else {at: there[reads[at]] for at in row} for row in rows]
    longest = max(int(mask.sum(1).max()) for row in real for mask in row.values())
    columns = columns_of(positions, source_positions, longest)
    aligned = not all(getattr(op, "pools_source", False) for op in ops.values())
    cells = [cells_of(columns, each, of_source, aligned=aligned) for each, of_source in zip(real, sources, strict=True)]
    if not settings.is_part and not isinstance(positions, str):
        check_columns([column.label for column in columns], {cell.column for row in cells for cell in row}, longest)
    return columns, cells


def check_columns(labels: Sequence[int | str], filled: Collection[int], longest: int) -> None:
    """Raise InterventionError for a column that no example has tokens for.

    Args:
        labels: of the columns that the user named.
        filled: the numbers of those that some example has tokens for.
        longest: the number of tokens of the longest example.
    """
    empty = [label for number, label in enumerate(labels) if number not in filled]
    if empty:
        raise InterventionError(
            f"positions={empty[0]} is a token of no example at any location, in base and source; the longest has "
            f"{longest}."
        )


def real_tokens(given: Run, location: Location) -> Bool[Tensor, "batch token"]:
    """Return True for each real token at a location of a run: the columns of `positions="each"`.

    Raises:
        InterventionError: a location without tokens, or one whose padding is not known.
    """
    vectors = given.vectors(location.whole)
    if vectors.ndim < 3:
        raise InterventionError(
            f"{location} has no positions: its shape is {list(vectors.shape)}, [batch, dims]; write positions=None."
        )
    place = architecture(given.model).place(location)
    return window_of(vectors, place, None, [arguments_of(given.model, given.inputs)], slice(None)).real


def check_value(value: Any, examples: int, what: str) -> Tensor:
    """Return a value of the metric as `[examples]` or `[1]` on the CPU, or raise InterventionError if it is invalid."""
    if not isinstance(value, Tensor | int | float):
        raise InterventionError(f"the metric returned {type(value).__name__} for {what}; return a tensor [batch].")
    value = torch.as_tensor(value).detach().cpu()
    if value.shape not in ((), (examples,)):
        raise InterventionError(
            f"the metric returned shape {list(value.shape)} for {what}; return [{examples}], one number for each "
            "example, or one for all."
        )
    if not value.isfinite().all():
        raise InterventionError(f"the metric is not finite for {what}; use one that is, e.g. a difference.")
    return widen(value).reshape(-1)


def mask_absent(values: Tensor, cell: Cell) -> Tensor:
    """Return the values with NaN for examples that lack the token, or for all if one number stands for all."""
    if cell.present is None:
        return values
    present = cell.present if len(values) == len(cell.present) else cell.present.all()
    return values.masked_fill(~present, math.nan)


def check_reads_real(metric: object, base: Run) -> None:
    """Raise InterventionError for a metric of `interventions.metrics` that lacks a mask and would read padding."""
    metric = metric.metric if isinstance(metric, Normalized) else metric
    name = architecture(base.model).place(Location(site="logits")).mask
    mask = arguments_of(base.model, base.inputs).get(name)
    if not isinstance(metric, Metric) or metric.mask is not None or not isinstance(mask, Tensor):
        return
    if mask.shape != base.logits.shape[:-1]:
        return
    real = mask.bool()
    wrong = select(metric.position, real).columns != select(metric.position, torch.ones_like(real)).columns
    if wrong.any():
        raise InterventionError(
            f"the metric ({metric.name}) reads position {metric.position} without a mask, which is another token than "
            f"that of the real ones in {int(wrong.sum())} of {len(mask)} examples; pass mask=inputs[{name!r}]."
        )
