"""Sweeps over several batches: the grid of a data set is that of all of its examples, batch by batch.

Cells of the batches are joined along the examples, v = (v₁, …, vₙ); a column that a batch has no tokens for is NaN in
its examples. What holds a value for each example, such as the targets of a metric, is cut along with the rows.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from interventions.analysis.activation_shards import writing
from interventions.analysis.batches import draw_nothing
from interventions.analysis.data_batches import DataBatch, are_batches, are_rows, batches_of, count_of
from interventions.analysis.fingerprints import fingerprint_of, fingerprint_of_model
from interventions.analysis.grids import Grid
from interventions.analysis.progress import Steps, progress_of
from interventions.analysis.sweeping.batch_sweeps import BatchGrid, SweepSettings, check_columns, sweep_batch
from interventions.analysis.sweeping.example_cuts import check_counts, check_ops, labelled, metric_of, settings_of
from interventions.analysis.sweeping.sweep_checkpoints import (
    BatchCheckpoint,
    SweepCheckpoint,
    sweep_checkpoint,
    tensor_of,
)
from interventions.errors import InterventionError
from interventions.execution.cells import columns_of
from interventions.execution.examples import check_inputs_of, examples_in
from interventions.execution.origins import Stored
from interventions.execution.run import Inputs, Run, rows_of
from interventions.execution.stacking import shapes_of
from interventions.metrics import name_of
from interventions.models.wrappers import is_traced
from interventions.operators import Mixup, Noise
from interventions.runs import run

MeasuresBatch = Callable[..., BatchGrid]
"""From settings, base, source and metric of a batch, with `steps` and `kept`, to its grid: `sweep_batch`."""


@dataclass(frozen=True, eq=False)
class _Pair:
    """A batch of bases with its sources.

    Attributes:
        number: of the batch.
        rows: the numbers of its examples.
        base, source: return its inputs, or runs.
    """

    number: int
    rows: range
    base: Callable[[], Inputs | Run]
    source: Callable[[], Inputs | Run | Stored | None]


def are_several(settings: SweepSettings, base: Any, source: Any) -> bool:
    """Return whether a sweep is over several batches: over a data set, or over more examples than a pass may have.

    Raises:
        InterventionError: a source that is a data set, of a base that is none.
    """
    if are_rows(base) or are_batches(settings.model, base):
        return True
    if are_rows(source) or (source is not None and are_batches(settings.model, source)):
        raise InterventionError(
            "the source is a data set and the base is one batch; give the base as a data set too: base=[inputs]."
        )
    size = settings.batch_size
    return size is not None and 0 < size < examples_in(base.inputs if isinstance(base, Run) else base)


def sweep_data(
    settings: SweepSettings,
    base: Any,
    source: Any,
    metric: Callable[[Any], Tensor],
    *,
    checkpoint: str | Path | None,
    console: Any,
    verb: str = "sweep",
    measure: MeasuresBatch = sweep_batch,
    facts: Mapping[str, Any] | None = None,
) -> Grid:
    """Return the grid of all examples, batch by batch.

    Args:
        settings: the settings of the sweep.
        base, source, metric, checkpoint, console: as for `sweep`.
        verb: the name of the function that the caller calls.
        measure: returns the grid of one batch.
        facts: what else its checkpoint is recognised by.

    Raises:
        InterventionError: as `sweep`.
    """
    several = are_several(settings, base, source)
    if several:
        check_ops(settings)
        settings = replace(settings, positions=labelled(settings), is_part=True)
    count = _count(settings, base) if several else 1
    keeper: Any = nullcontext()
    if checkpoint is not None:
        all_facts = {"examples": len(base) if are_rows(base) else None, **_facts(settings, metric), **(facts or {})}
        draws = settings.generator if not draw_nothing(settings.ops) else None
        keeper = sweep_checkpoint(Path(checkpoint), all_facts, draws)
    found: list[BatchGrid] = []
    stop = 0
    with writing(Path(checkpoint or "."), verb), progress_of(verb, count, console) as steps, keeper as kept:
        for pair in _pairs(settings, base, source) if several else _one(base, source):
            own = settings_of(settings, pair.rows) if several else settings
            found.append(_measured(own, pair, metric, steps, kept, is_part=several, measure=measure))
            stop = pair.rows.stop
    if not found:
        raise InterventionError(
            "the base has no batches, so there is nothing to measure; give rows, no spent iterator."
        )
    if several:
        check_counts(metric, settings, stop)
    return _joined(settings, found, metric)


def _measured(
    settings: SweepSettings,
    pair: _Pair,
    metric: Callable[[Any], Tensor],
    steps: Steps,
    kept: SweepCheckpoint | None,
    *,
    is_part: bool,
    measure: MeasuresBatch,
) -> BatchGrid:
    """Return the grid of one batch, measured now or before."""
    base, source = pair.base(), pair.source()
    known: BatchCheckpoint | None = None
    if kept is not None:
        known = kept.batch(pair.number, fingerprint_of([base, source]))
        if known.end is not None:
            steps.expect(len(known.known))
            steps(len(known.known))
            return _restored(settings, known, metric)
    own = metric_of(settings, metric, pair.rows, base) if is_part else metric
    measured = measure(settings, base, source, own, steps=steps, kept=known)
    if known is not None:
        grid = measured.grid
        known.close(
            {
                "dtype": str(grid.baseline.dtype).removeprefix("torch."),
                "columns": len(grid.positions),
                "baseline": grid.baseline.tolist(),
                "source": None if grid.source is None else grid.source.tolist(),
                "filled": sorted(measured.filled),
                "longest": measured.longest,
            }
        )
    return measured


def _restored(settings: SweepSettings, known: BatchCheckpoint, metric: object) -> BatchGrid:
    """Return the grid of a batch that was measured before."""
    end = cast(dict[str, Any], known.end)
    dtype = getattr(torch, end["dtype"])
    baseline, level = tensor_of(end["baseline"]).to(dtype), end["source"]
    values = baseline.new_full((len(settings.rows), end["columns"], len(baseline)), float("nan"))
    for (row, column), each in known.known.items():
        values[row, column] = each.to(dtype)
    labels = tuple(each.label for each in columns_of(settings.positions, settings.source_positions, end["columns"]))
    level = None if level is None else tensor_of(level).to(dtype)
    grid = Grid(values, settings.rows, labels, baseline, level, name_of(metric), getattr(metric, "is_signed", False))
    return BatchGrid(grid, frozenset(end["filled"]), end["longest"])


def _joined(settings: SweepSettings, found: list[BatchGrid], metric: object) -> Grid:
    """Return the grid of all batches together."""
    grids = [each.grid for each in found]
    if len(grids) == 1 and not settings.is_part:
        return grids[0]
    longest = max(grids, key=lambda grid: len(grid.positions))
    if not isinstance(settings.positions, str) and settings.positions is not None:
        filled = frozenset().union(*(each.filled for each in found))
        check_columns(longest.positions, filled, max(each.longest for each in found))
    dtype = grids[0].baseline.dtype
    values = [
        torch.nn.functional.pad(
            grid.per_example, (0, 0, 0, len(longest.positions) - len(grid.positions)), value=float("nan")
        )
        for grid in grids
    ]
    levels = [grid.source for grid in grids]
    level = None if any(each is None for each in levels) else torch.cat(cast(list[Tensor], levels)).to(dtype)
    return Grid(
        torch.cat(values, 2).to(dtype),
        settings.rows,
        longest.positions,
        torch.cat([grid.baseline for grid in grids]).to(dtype),
        level,
        name_of(metric),
        getattr(metric, "is_signed", False),
    )


def _one(base: Any, source: Any) -> Iterator[_Pair]:
    """Yield the one batch of a base that is no data set."""
    yield _Pair(0, range(examples_in(base.inputs if isinstance(base, Run) else base)), lambda: base, lambda: source)


def _pairs(settings: SweepSettings, base: Any, source: Any) -> Iterator[_Pair]:
    """Yield the batches of bases with their sources.

    Raises:
        InterventionError: other batches of sources than of bases.
    """
    if not (are_rows(base) or are_batches(settings.model, base)):
        yield from _chunks(settings, base, source)
        return
    if source is not None and not (are_rows(source) or are_batches(settings.model, source)):
        raise InterventionError(
            f"the base is a data set and the source is one {type(source).__name__}; give a source for each base: as "
            "rows, or as batches."
        )
    if source is not None and are_rows(source) != are_rows(base):
        raise InterventionError(
            f"the base is a data set and the source {type(source).__name__}; give both as rows, or both as batches of "
            "as many examples."
        )
    if are_rows(base) and source is not None and len(base) != len(source):
        raise InterventionError(
            f"the base has {len(base)} rows and the source {len(source)}; give one source for each base."
        )
    sender = settings.source_model or settings.model
    others = iter(()) if source is None else batches_of(sender, source, settings.batch_size, "source")
    for batch in batches_of(settings.model, base, settings.batch_size, "base"):
        if source is None:
            yield _Pair(batch.number, batch.rows, batch.inputs, lambda: None)
            continue
        other: DataBatch | None = next(others, None)
        if other is None or other.rows != batch.rows:
            count = 0 if other is None else len(other.rows)
            raise InterventionError(
                f"batch {batch.number} of the base has {len(batch.rows)} examples and that of the source {count}; give "
                "one source for each base."
            )
        yield _Pair(batch.number, batch.rows, batch.inputs, other.inputs)
    if source is not None and (rest := next(others, None)) is not None:
        raise InterventionError(
            f"the base ends after {rest.number} batches and the source has more; give one source for each base."
        )


def _chunks(settings: SweepSettings, base: Any, source: Any) -> Iterator[_Pair]:
    """Yield the batches of one batch of more examples than a pass may have.

    Raises:
        InterventionError: examples that cannot be separated, or whose answers depend on the others.
    """
    if isinstance(base, Run):
        if base.output is None or base.is_counterfactual:
            raise InterventionError(
                "the base stopped early or is itself a counterfactual run; pass a run of the model itself, or inputs."
            )
        base.check_fresh()
        base = base.inputs
    if isinstance(source, Stored):
        raise InterventionError(
            "a sweep repeats the examples of its source, and Stored activations have no run; give inputs or a Run."
        )
    examples, size = examples_in(base), cast(int, settings.batch_size)
    check_inputs_of(base, examples)
    if source is not None:
        given = source.inputs if isinstance(source, Run) else source
        check_inputs_of(given, examples_in(given))
        if examples_in(given) != examples:
            raise InterventionError(
                f"the base has {examples} examples and the source {examples_in(given)}; give one source an example."
            )
    _check_apart(settings, base, examples, size)
    for number, first in enumerate(range(0, examples, size)):
        rows = range(first, min(first + size, examples))
        yield _Pair(
            number,
            rows,
            lambda rows=rows: rows_of(base, torch.tensor(rows), examples),  # type: ignore[misc]
            lambda rows=rows: _rows_of_source(source, rows),  # type: ignore[misc]
        )


def _rows_of_source(source: Any, rows: range) -> Any:
    if source is None or isinstance(source, Run):
        return None if source is None else source.take(list(rows))
    return rows_of(source, torch.tensor(rows), examples_in(source))


def _check_apart(settings: SweepSettings, base: Inputs, examples: int, size: int) -> None:
    """Raise InterventionError if what the model returns for an example changes its shape with their number."""
    if is_traced(settings.model):
        return
    with torch.no_grad():
        shapes = []
        for count in (size, size + 1):
            chunk = rows_of(base, torch.arange(count) % examples, examples)
            shapes.append(
                [shape[1:] for shape in shapes_of(run(settings.model, chunk, resumable=False).output) if shape]
            )
    if shapes[0] != shapes[1]:
        raise InterventionError(
            f"batch_size={size} rows do not hold the {examples} examples, and what the model returns for one has "
            f"another shape among more of them, so they cannot be cut; pass batch_size={examples} or more."
        )


def _count(settings: SweepSettings, base: Any) -> int | None:
    """Return the number of batches, where it is known."""
    if are_rows(base) or are_batches(settings.model, base):
        return count_of(base, settings.batch_size)
    examples = examples_in(base.inputs if isinstance(base, Run) else base)
    return -(-examples // cast(int, settings.batch_size))


def _facts(settings: SweepSettings, metric: object) -> dict[str, Any]:
    """Return what the checkpoint of a sweep is recognised by.

    Raises:
        InterventionError: an operator that draws from torch's own generator.
    """
    if settings.generator is None and any(
        isinstance(op, Noise | Mixup) and op.normal is None for op in settings.ops.values()
    ):
        raise InterventionError(
            "a checkpoint keeps the state of the generator, and an operator draws from torch's own; pass "
            "generator=torch.Generator().manual_seed(0)."
        )
    generator = None if draw_nothing(settings.ops) or settings.generator is None else settings.generator.get_state()
    return {
        "locations": {label: list(map(str, written)) for label, written in settings.rows.items()},
        "subspaces": fingerprint_of([at.subspace for written in settings.rows.values() for at in written]),
        "operators": fingerprint_of(list(settings.ops.values())),
        "positions": fingerprint_of([settings.positions, settings.source_positions]),
        "metric": fingerprint_of(metric),
        "batch_size": settings.batch_size,
        "generator": fingerprint_of(generator),
        "source_at": fingerprint_of(None if settings.source_at is None else str(settings.source_at)),
        "source_model": None if settings.source_model is None else fingerprint_of_model(settings.source_model),
        "model": fingerprint_of_model(settings.model),
    }
