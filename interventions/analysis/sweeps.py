"""`sweep`: activation patching, i.e. one counterfactual for each location and position, in few forward passes.

Cell (l, p) of the grid is metric(f(base; hₗ[p] ← source)), averaged over the examples (Meng et al. 2022,
arXiv:2202.05262, section 2.1; Heimersheim and Nanda 2024, arXiv:2404.15255).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from interventions.analysis.batches import cells_a_pass
from interventions.analysis.grids import Grid
from interventions.analysis.passes import Passes
from interventions.arguments import checked
from interventions.endings import without_gradients
from interventions.errors import InterventionError
from interventions.execution.cells import Cell, Column, cells_of, columns_of
from interventions.execution.examples import examples_in
from interventions.execution.origins import Origin, Stored, check_source_inputs, origin_of
from interventions.execution.run import Inputs, Run
from interventions.execution.stacking import Stacked, Summary, shapes_of
from interventions.execution.stamps import unchanged
from interventions.locations import Location, as_location
from interventions.metrics import Metric, Normalized, name_of
from interventions.models.architectures import architecture
from interventions.models.calls import arguments_of
from interventions.models.wrappers import Model, is_traced
from interventions.operators import Operator, Swap
from interventions.positions import select
from interventions.precision import widen
from interventions.runs import as_run, check_eval, run, traced
from interventions.steps import window_of


@checked
def sweep(
    model: Model,
    base: Inputs | Run,
    source: Inputs | Run | Stored | None,
    at: object,
    *,
    metric: Callable[[Any], Tensor],
    positions: object = "each",
    source_positions: object = None,
    source_model: Any = None,
    source_at: Location | str | Mapping[Location, Location] | None = None,
    op: Operator | Mapping[Location, Operator] | None = None,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    remote: bool | str = False,
) -> Grid:
    """Measure one counterfactual for each location and position, and return the grid: activation patching.

    Meng et al. 2022 (arXiv:2202.05262), section 2.1; Heimersheim and Nanda 2024 (arXiv:2404.15255).

    The source and the base run once, without gradients. Every counterfactual resumes from the base run. Those that
    resume from one block share forward passes, as far as they fit in memory: positions of one location, heads and sites
    of one layer; and neighbouring layers where a pass fewer saves more than the blocks that are run again. Of a
    language model the logits are computed of those tokens alone that a metric of `interventions.metrics` reads.

    Args:
        model: a torch model, or one of nnsight, in eval mode.
        base: inputs, or a Run.
        source: inputs, or a Run, with as many examples; None for operators that need none.
        at: the rows of the grid: a location, a list of locations or of tuples of locations written together, or
            {label: location or list of locations written together}.
        metric: a function of the model's output that returns `[batch]`, or one number for all examples. It is called
            for one counterfactual at a time, with the examples of the base. A function of your own is given the whole
            output.
        positions: the columns of the grid. "each" is every real token of the longest example (every pixel of a feature
            map); None is one column with all tokens. Or a list of entries, each an int or anything else that
            `interventions.select` takes; or {label: such an entry}. In "each" and int columns, examples without that
            token count as NaN.
        source_positions: which tokens of the source to take. None takes those of the column, an int the same one for
            all columns; or a list with one entry for each column.
        source_model: the model on which the source runs, as in `intervene`.
        source_at: where the source is read, as in `intervene`.
        op: the operator, `Swap()` by default, or {Location: operator}, e.g. from `mean_of`. It is called for one
            counterfactual at a time. Where it may draw, and so for any function of your own, counterfactuals run in the
            order of the rows, and share passes only at one place.
        batch_size: the largest number of rows in one pass, at least the number of examples. By default as many as a
            bounded share of the memory holds. Every counterfactual has its own pass if inputs or output hold something
            without one entry for each example, such as a loss; by default also if the output for one example changes
            its shape among more of them, as in CLIP, which compares all images with all texts.
        generator: for operators that draw.
        remote: for a model of nnsight, where it runs (see `run`): base, source, and then all counterfactuals as one
            job, from which the metric alone is sent back.

    Returns:
        A Grid with the metric of every counterfactual, of the base and of the source.

    Raises:
        InterventionError: a model in train mode; nothing to write; locations or positions that do not exist; base and
            source of different sizes; a metric of another shape, that is not finite or reads padding; and as
            `interchange`.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)).eval()
    >>> base, source = torch.zeros(4, 2), torch.ones(4, 2)
    >>> grid = sweep(net, base, source, ["module:0", "module:2"], positions=None, metric=lambda logits: logits[:, 0])
    >>> torch.equal(grid.values, net(source).mean().expand(2, 1))
    True
    """
    check_eval(model, remote)
    rows = _label_rows(at)
    ops = _operators(op, dict.fromkeys(location for locations in rows.values() for location in locations), source)
    wholes = list(dict.fromkeys(location.whole for locations in rows.values() for location in locations))
    origin = origin_of(model, source, source_model, source_at, ops)
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
        _check_sizes(ops, examples, source_run)
        _check_reads_real(metric, base_run)
        baseline = _check_value(base_value, examples, "the base run")
        columns, cells = _cells(
            list(rows.values()), positions, source_positions, base=base_run, source=source_run, ops=ops, origin=origin
        )
        values = baseline.new_full((len(rows), len(columns), len(baseline)), math.nan)
        most = cells_a_pass(base_run, batch_size)
        stacked = Stacked(base_run, source_run, ops, generator, most, metric, origin)
        tracing = traced(model, remote)
        passes = Passes(stacked, batch_size)
        measure = passes if tracing is None else partial(tracing.measured, stacked, remote)
        for row, cell, value in measure(list(rows.values()), cells):
            at_row = " + ".join(map(str, list(rows.values())[row]))
            what = f"the counterfactual at {at_row}, position {columns[cell.column].label}"
            values[row, cell.column] = _mask_absent(_check_value(value, examples, what), cell)
        level = None if source_value is None else _check_value(source_value, examples, "the source run")
    labels = tuple(column.label for column in columns)
    return Grid(values, rows, labels, baseline, level, name_of(metric), getattr(metric, "is_signed", False))


def _label_rows(at: Any) -> dict[str, tuple[Location, ...]]:
    """Return the rows of the grid: {label: locations written together}."""
    if isinstance(at, Mapping) and not all(isinstance(label, str) for label in at):
        raise InterventionError(
            "the keys of at= are the labels of a sweep; write {'a label': Location(3)}, and the operator as op=…."
        )
    if isinstance(at, Mapping):
        rows = [(label, _locations(place)) for label, place in at.items()]
    else:
        places = [at] if isinstance(at, str | Tensor) or not isinstance(at, Iterable) else at
        rows = [(" + ".join(map(str, locations)), locations) for locations in map(_locations, places)]
    labels = [label for label, _ in rows]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise InterventionError(f"two rows are called {twice}; name each once, or label them: at={{'a label': …}}.")
    if not rows or not all(locations for _, locations in rows):
        raise InterventionError("no location was given, or none in one of the rows; write at=[Location(3)].")
    return dict(rows)


def _locations(place: Any) -> tuple[Location, ...]:
    """Return the distinct locations of one row."""
    several = isinstance(place, tuple | list)
    return tuple(dict.fromkeys(map(as_location, place if several else [place])))


def _operators(op: Any, locations: Iterable[Location], source: object) -> dict[Location, Operator]:
    """Return the operator of each location."""
    if op is None and source is None:
        raise InterventionError("no operator was given; write op=Zero(), or source=… to swap.")
    named = {as_location(at): each for at, each in op.items()} if isinstance(op, Mapping) else None
    ops: dict[Location, Operator] = {}
    for at in locations:
        each = op if named is None else named.get(at)
        if each is None and named is not None:
            raise InterventionError(f"no operator was given for {at}; add it to op={{Location: operator}}.")
        ops[at] = Swap() if each is None else each
        _check_operator(ops[at], source)
    return ops


def _check_operator(op: Any, source: object) -> None:
    """Raise InterventionError if `op` is no operator, or lacks a source, or has one that it does not take."""
    if not callable(op) or isinstance(op, type):
        raise InterventionError(f"{op!r} is not an operator; write Swap(), Zero(), or a function.")
    if getattr(op, "needs_source", source is not None) and source is None:
        raise InterventionError(f"{type(op).__name__} takes from a source and none was given; pass source=….")
    if source is not None and not getattr(op, "needs_source", True):
        raise InterventionError(f"a source was given and {type(op).__name__} takes none; leave it out: source=None.")


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


def _check_sizes(ops: Mapping[Location, Operator], examples: int, source: Run | None) -> None:
    pools = all(getattr(op, "pools_source", False) for op in ops.values())
    if source is None or pools or examples_in(source.inputs) == examples:
        return
    raise InterventionError(
        f"the base has {examples} examples and the source {examples_in(source.inputs)}; give one source an example."
    )


def _cells(
    rows: list[tuple[Location, ...]],
    positions: Any,
    source_positions: Any,
    *,
    base: Run,
    source: Run | None,
    ops: Mapping[Location, Operator],
    origin: Origin | None,
) -> tuple[list[Column], list[list[Cell]]]:
    """Return the columns, and the cells of each row."""
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
    empty = set(range(len(columns))) - {cell.column for row in cells for cell in row}
    if empty and not isinstance(positions, str):
        raise InterventionError(
            f"positions={columns[min(empty)].label} is a token of no example at any location, in base and source; the "
            f"longest has {longest}."
        )
    return columns, cells


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


def _check_value(value: Any, examples: int, what: str) -> Tensor:
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


def _mask_absent(values: Tensor, cell: Cell) -> Tensor:
    """Return the values with NaN for examples that lack the token, or for all if one number stands for all."""
    if cell.present is None:
        return values
    present = cell.present if len(values) == len(cell.present) else cell.present.all()
    return values.masked_fill(~present, math.nan)


def _check_reads_real(metric: object, base: Run) -> None:
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
