"""`sweep`: activation patching, i.e. one counterfactual for each location and position, in few forward passes.

Cell (l, p) of the grid is metric(f(base; hₗ[p] ← source)), averaged over the examples (Meng et al. 2022,
arXiv:2202.05262, section 2.1; Heimersheim and Nanda 2024, arXiv:2404.15255).
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interventions.analysis.grids import Grid
from interventions.analysis.progress import progress_of
from interventions.analysis.sweeping.batch_sweeps import SweepSettings, sweep_batch
from interventions.analysis.sweeping.data_sweeps import are_several, sweep_data
from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.execution.origins import Stored
from interventions.execution.run import Inputs, Run
from interventions.locations import Location, as_location
from interventions.models.wrappers import Model
from interventions.operators import Operator, Swap
from interventions.runs import check_eval


@checked
def sweep(
    model: Model,
    base: Inputs | Run | Iterable[Inputs],
    source: Inputs | Run | Stored | Iterable[Inputs] | None,
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
    checkpoint: str | Path | None = None,
    console: Any = None,
) -> Grid:
    """Measure one counterfactual for each location and position, and return the grid: activation patching.

    Meng et al. 2022 (arXiv:2202.05262), section 2.1; Heimersheim and Nanda 2024 (arXiv:2404.15255).

    The source and the base run once, without gradients. Every counterfactual resumes from the base run. Those that
    resume from one block share forward passes, as far as they fit in memory: positions of one location, heads and sites
    of one layer; and neighbouring layers where a pass fewer saves more than the blocks that are run again. Of a
    language model the logits are computed of those tokens alone that a metric of `interventions.metrics` reads.

    Args:
        model: a torch model, or one of nnsight, in eval mode.
        base: inputs, or a Run; or a data set: batches of inputs, an iterable, or rows that are read by their numbers,
            with `len(rows)` and `rows.batch(numbers)`, such as `distill.Rows`. The grid of a data set is that of all of
            its examples in one batch, and memory holds one batch.
        source: inputs, or a Run, with as many examples; None for operators that need none; or a data set, as the base.
        at: the rows of the grid: a location, a list of locations or of tuples of locations written together, or
            {label: location or list of locations written together}.
        metric: a function of the model's output that returns `[batch]`, or one number for all examples. It is called
            for one counterfactual at a time, with the examples of the base. A function of your own is given the whole
            output. For several batches it returns `[batch]`; one of `interventions.metrics` holds targets, and a mask,
            for all examples, of which each batch takes its own (a mask that it lacks, from the batch), and a function
            that holds such values has a method `take(rows)`, which returns that of the examples with these numbers.
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
        batch_size: the largest number of rows in one pass, by default as many as a bounded share of the memory holds. A
            base of more examples is swept in batches of this size, and so are rows, by default in batches of 32. Every
            counterfactual has its own pass if inputs or output hold something without one entry for each example, such
            as a loss; by default also if the output for one example changes its shape among more of them, as in CLIP,
            which compares all images with all texts.
        generator: for operators that draw.
        remote: for a model of nnsight, where it runs (see `run`): base, source, and then all counterfactuals as one
            job, from which the metric alone is sent back.
        checkpoint: a folder that keeps each cell when it is measured. The same call continues there after it was
            stopped or killed, and returns the same grid, bit for bit; for another model, other data or settings the
            folder is refused. An operator that draws needs a `generator`, at the same state as in the first call.
        console: shows the progress of a long sweep; `rich.console.Console(quiet=True)` for none.

    Returns:
        A Grid with the metric of every counterfactual, of the base and of the source.

    Raises:
        InterventionError: a model in train mode; nothing to write; locations or positions that do not exist; base and
            source of different sizes; a metric of another shape, that is not finite or reads padding; over several
            batches an operator that pools all examples or holds a value for each; a checkpoint of another sweep; and as
            `interchange`.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)).eval()
    >>> base, source = torch.zeros(4, 2), torch.ones(4, 2)
    >>> grid = sweep(net, base, source, ["module:0", "module:2"], positions=None, metric=lambda logits: logits[:, 0])
    >>> torch.equal(grid.values, net(source).mean().expand(2, 1))
    True
    """
    check_eval(model, remote)
    rows = label_rows(at)
    ops = operators_of(op, dict.fromkeys(location for locations in rows.values() for location in locations), source)
    settings = SweepSettings(
        model, rows, ops, positions, source_positions, source_model, source_at, batch_size, generator, remote
    )
    if checkpoint is not None or are_several(settings, base, source):
        return sweep_data(settings, base, source, metric, checkpoint=checkpoint, console=console)
    with progress_of("sweep", 1, console) as steps:
        return sweep_batch(settings, base, source, metric, steps=steps).grid


def label_rows(at: Any) -> dict[str, tuple[Location, ...]]:
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


def operators_of(op: Any, locations: Iterable[Location], source: object) -> dict[Location, Operator]:
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
