"""`sweep_paths`: path patching for each of several senders, over a batch or a data set.

Cell (s, p) of the grid is metric(r), averaged over the examples, of the run r in which only the direct paths from
sender s at position p to the receivers have changed, as `path_patch` makes it (Wang et al. 2022, arXiv:2211.00593,
section 3.1).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from interventions.analysis.fingerprints import fingerprint_of
from interventions.analysis.grids import Grid
from interventions.analysis.paths import path_patch, places_between
from interventions.analysis.progress import Steps, progress_of
from interventions.analysis.sweeping.batch_sweeps import (
    BatchGrid,
    Kept,
    SweepSettings,
    cells_in,
    check_reads_real,
    check_sizes,
    check_value,
    mask_absent,
)
from interventions.analysis.sweeping.data_sweeps import are_several, sweep_data
from interventions.analysis.sweeping.example_cuts import is_per_example
from interventions.analysis.sweeps import label_rows
from interventions.arguments import checked
from interventions.endings import without_gradients
from interventions.errors import InterventionError
from interventions.execution.examples import examples_in
from interventions.execution.run import Inputs, Run, Where, locations_of
from interventions.execution.stacking import shapes_of
from interventions.execution.stamps import unchanged
from interventions.locations import Location
from interventions.metrics import name_of
from interventions.models.architectures import architecture
from interventions.models.wrappers import Model
from interventions.operators import Swap
from interventions.positions import Positions
from interventions.runs import as_run, check_eval


@checked
def sweep_paths(
    model: Model,
    base: Inputs | Run | Iterable[Inputs],
    source: Inputs | Run | Iterable[Inputs],
    senders: object,
    receivers: Where,
    *,
    metric: Callable[[Any], Tensor],
    positions: object = None,
    receiver_positions: Positions = None,
    freeze: Where | None = None,
    batch_size: int | None = None,
    checkpoint: str | Path | None = None,
    console: Any = None,
) -> Grid:
    """Measure the direct effect of each sender on the receivers, and return the grid: path patching of many senders.

    Wang et al. 2022 (arXiv:2211.00593), section 3.1. Each cell is a call of `path_patch`; base and source run once.

    Args:
        model: a torch model, in eval mode.
        base: inputs, or a Run; or a data set, as for `sweep`: its grid is that of all of its examples in one batch.
        source: inputs, or a Run, from which the senders are taken; or a data set, as the base.
        senders: the rows of the grid: a location, a list of locations, or {label: location}.
        receivers: where the paths end, one or several, as for `path_patch`.
        metric: a function of the model's output that returns `[batch]`, as for `sweep`.
        positions: the columns of the grid, as for `sweep`: which tokens of the senders are taken from the source. None
            is one column with all of them.
        receiver_positions: which tokens of the receivers are written, the same in each example; None is all of them.
        freeze: locations that keep their value of the base run, as for `path_patch`.
        batch_size: examples of a batch, as for `sweep`.
        checkpoint: a folder that keeps each cell when it is measured, as for `sweep`.
        console: shows the progress of a long sweep; `rich.console.Console(quiet=True)` for none.

    Returns:
        A Grid with the metric of every sender, of the base and of the source.

    Raises:
        InterventionError: several locations in one row, receiver positions that are given for each example of a data
            set; and as `path_patch` and `sweep`.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)).eval()
    >>> base, source = torch.zeros(4, 2), torch.ones(4, 2)
    >>> at = ["module:0"], Location(module="2")
    >>> grid = sweep_paths(net, base, source, *at, freeze=(), metric=lambda logits: logits[:, 0])
    >>> torch.equal(grid.values[0], net(source).mean()[None])  # there is one path only, and it is direct
    True
    """
    check_eval(model)
    rows = label_rows(senders)
    several = next((label for label, locations in rows.items() if len(locations) > 1), None)
    if several is not None:
        raise InterventionError(
            f"{several} names several locations, and paths begin at one; give each a row of its own."
        )
    ends = locations_of(receivers)
    if not ends:
        raise InterventionError("no receiver was given; write receivers=Location(5, 'query', heads=3).")
    if batch_size is not None and batch_size < 1:
        raise InterventionError(f"batch_size={batch_size} holds no example; write batch_size=32, or None.")
    ops: Any = {locations[0]: Swap() for locations in rows.values()}
    settings = SweepSettings(model, rows, ops, positions, batch_size=batch_size)
    paths = _Paths(ends, receiver_positions, freeze)
    if checkpoint is None and not are_several(settings, base, source):
        with progress_of("sweep_paths", 1, console) as steps:
            return _sweep_batch(paths, settings, base, source, metric, steps=steps).grid
    if are_several(settings, base, source) and is_per_example(receiver_positions):
        raise InterventionError(
            "receiver_positions has tokens for each example, which are not cut for the batches of a data set; give one "
            "choice for all, e.g. receiver_positions=-1, or one batch."
        )
    return sweep_data(
        settings, base, source, metric, checkpoint=checkpoint, console=console, verb="sweep_paths",
        measure=partial(_sweep_batch, paths), facts=paths.facts,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Paths:
    """The ends of paths, and the places that keep their value on the way, as arguments of `sweep_paths`."""

    receivers: list[Location]
    receiver_positions: Positions
    freeze: Where | None

    @property
    def facts(self) -> dict[str, Any]:
        """The settings that a checkpoint is recognised by."""
        return {
            "receivers": list(map(str, self.receivers)),
            "subspaces of receivers": fingerprint_of([at.subspace for at in self.receivers]),
            "receiver_positions": fingerprint_of(self.receiver_positions),
            "freeze": None if self.freeze is None else list(map(str, locations_of(self.freeze))),
        }

    def frozen(self, model: Model, senders: Iterable[Location]) -> list[Location]:
        """Return all locations that are frozen for any of the senders."""
        if self.freeze is not None:
            return locations_of(self.freeze)
        found = architecture(model)
        return [at for sender in senders for end in self.receivers for at in places_between(found, sender, end)]


def _sweep_batch(
    paths: _Paths,
    settings: SweepSettings,
    base: Any,
    source: Any,
    metric: Callable[[Any], Tensor],
    *,
    steps: Steps,
    kept: Kept | None = None,
) -> BatchGrid:
    """Return the grid of one batch.

    Args:
        paths: where they end.
        settings, base, source, metric, steps, kept: as for `sweep_batch`.

    Raises:
        InterventionError: as `sweep_paths`.
    """
    model, rows = settings.model, list(settings.rows.values())
    senders = [locations[0] for locations in rows]
    wholes = [at.whole for at in senders]
    with without_gradients(), unchanged():
        before = as_run(model, base, list(dict.fromkeys([*wholes, *paths.frozen(model, senders)])))
        origin = as_run(model, source, list(dict.fromkeys(wholes)))
        examples = examples_in(before.inputs)
        check_sizes(settings.ops, examples, origin)
        check_reads_real(metric, before)
        baseline = check_value(metric(before.output), examples, "the base run")
        columns, cells = cells_in(rows, settings, base=before, source=origin, origin=None)
        values = baseline.new_full((len(rows), len(columns), len(baseline)), float("nan"))
        known = {} if kept is None else dict(kept.known)
        steps.expect(sum(map(len, cells)))
        for (row, column), value in known.items():
            values[row, column] = value
        steps(len(known))
        for row, sender in enumerate(senders):
            for cell in (each for each in cells[row] if (row, each.column) not in known):
                done = path_patch(
                    model, before, origin, sender, paths.receivers,
                    positions=None if cell.tokens is None else cell.tokens[sender],
                    receiver_positions=paths.receiver_positions, freeze=paths.freeze,
                )  # fmt: skip
                what = f"the paths from {sender}, position {columns[cell.column].label}"
                values[row, cell.column] = mask_absent(check_value(metric(done.output), examples, what), cell)
                steps()
                if kept is not None:
                    kept.keep([(row, cell.column, values[row, cell.column])])
        alike = shapes_of(origin.output) == shapes_of(before.output)
        level = check_value(metric(origin.output), examples, "the source run") if alike else None
    labels = tuple(column.label for column in columns)
    grid = Grid(values, settings.rows, labels, baseline, level, name_of(metric), getattr(metric, "is_signed", False))
    longest = len(columns) if isinstance(settings.positions, str) else 0
    return BatchGrid(grid, frozenset(cell.column for row in cells for cell in row), longest)
