"""`attribution_patch`: the first-order estimate of a whole sweep, from one backward pass.

Cell (l, p) of the grid is metric(f(base)) + Σ ∂ metric / ∂ hₗ[p] · (sₗ[p] − hₗ[p]), with s the activation of the
source: the linear estimate of what a sweep measures (Nanda 2023, "Attribution patching"; Syed, Rager, Conmy 2023,
arXiv:2310.10348). With `steps` the gradient is the mean of those at points between base and source (Hanna, Pezzelle,
Belinkov 2024, arXiv:2403.17806, section 3).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from interventions.analysis.grids import Grid
from interventions.analysis.sweeping.batch_sweeps import (
    SweepSettings,
    cells_in,
    check_reads_real,
    check_sizes,
    check_value,
    mask_absent,
)
from interventions.analysis.sweeps import label_rows, operators_of
from interventions.arguments import checked
from interventions.attribution.derivatives import (
    Directions,
    Towards,
    along_of,
    check_derivable,
    derivatives,
    integrated,
)
from interventions.endings import without_gradients
from interventions.errors import InterventionError
from interventions.execution.cells import Cell, Tokens
from interventions.execution.examples import examples_in
from interventions.execution.run import Inputs, Run
from interventions.execution.stacking import shapes_of
from interventions.execution.stamps import unchanged
from interventions.locations import Location
from interventions.metrics import name_of
from interventions.models.wrappers import Model, module_of
from interventions.operators import Operator
from interventions.runs import as_run


@checked
def attribution_patch(
    model: Model,
    base: Inputs | Run,
    source: Inputs | Run | None,
    at: object,
    metric: Callable[[Any], Tensor],
    *,
    positions: object = "each",
    source_positions: object = None,
    op: Operator | None = None,
    steps: int | None = None,
    along: object = None,
    generator: torch.Generator | None = None,
) -> Grid:
    """Estimate a whole sweep to first order, from one backward pass: attribution patching.

    Nanda 2023, "Attribution patching"; Syed et al. 2023 (arXiv:2310.10348). Each cell is the metric of the base plus
    gradient × difference, so that the grid is on the scale of that of `sweep` with the same arguments, and its
    `effects` are the attributions. It is exact where the metric is a linear function of the activation, and close where
    the difference is small; check the largest cells by `sweep`. A metric that is flat at the base has no first-order
    effect: KL from the base run is such a one.

    Args:
        model: a torch model in eval mode.
        base: inputs, or a Run.
        source: inputs, or a Run, with as many examples; None for operators that need none.
        at: the rows of the grid, as for `sweep`.
        metric: a function of the model's output that returns `[batch]`, or one number for all examples, and has a
            derivative. The examples of a batch must not depend on each other, as in eval mode.
        positions: the columns of the grid, as for `sweep`.
        source_positions: which tokens of the source to take, as for `sweep`.
        op: the operator whose change is estimated, `Swap()` by default; `Zero()` estimates a zero ablation.
        steps: average the gradient over so many points between base and source, the middles of equal parts of the
            way: integrated gradients (EAP-IG, Hanna et al. 2024, arXiv:2403.17806). None takes the gradient at the
            base. Each step is one forward and one backward.
        along: where base and source are joined for `steps`: a location or several, at all tokens. None is the
            embedding of each stack.
        generator: for operators that draw.

    Returns:
        A Grid as `sweep` returns it, with estimates in place of measurements.

    Raises:
        InterventionError: as `sweep`; a metric without a derivative; steps below 1, or without a source.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)).eval()
    >>> base, source = torch.zeros(4, 2), torch.ones(4, 2)
    >>> grid = attribution_patch(net, base, source, "module:0", lambda logits: logits[:, 0], positions=None)
    >>> torch.allclose(grid.values, net(source).mean())  # the network is linear, so the estimate is exact
    True
    """
    check_derivable(model, "attribution_patch")
    model = module_of(model)
    check_steps(steps, source, along)
    rows = label_rows(at)
    ops = operators_of(op, dict.fromkeys(location for locations in rows.values() for location in locations), source)
    settings = SweepSettings(model, rows, ops, positions, source_positions, generator=generator)
    ways = [] if steps is None else along_of(model, along)
    with unchanged():
        with without_gradients():
            before, after = runs_of(model, base, source, [*ops, *ways])
            level = _level(before, after, metric)
        examples = examples_in(before.inputs)
        check_sizes(ops, examples, after)
        check_reads_real(metric, before)
        baseline = check_value(metric(before.output), examples, "the base run")
        columns, cells = cells_in(list(rows.values()), settings, base=before, source=after, origin=None)
        sheets = _sheets(list(rows.values()), cells, ops, examples)
        directions = [sheet.directions() for sheet in sheets]
        found = derivatives(before, after, directions, metric, generator=generator)
        if steps is not None and after is not None:
            found = integrated(before, after, directions, metric, generator=generator, steps=steps, along=ways)
    effects = baseline.double().new_full((len(rows), len(columns), len(baseline)), math.nan)
    for (row, column), effect in _by_cell(sheets, found).items():
        effects[row, column] = effect if len(baseline) == examples else effect.sum()
    for row, each in enumerate(cells):
        for cell in each:
            effects[row, cell.column] = mask_absent(effects[row, cell.column], cell)
    labels, name = tuple(column.label for column in columns), f"estimated {name_of(metric)}"
    values = (baseline + effects).to(baseline.dtype)
    return Grid(values, rows, labels, baseline, level, name, getattr(metric, "is_signed", False))


def check_steps(steps: int | None, source: object, along: object) -> None:
    """Raise InterventionError for a number of points that is none, or without a way from base to source."""
    if steps is None:
        if along is not None:
            raise InterventionError("along=… is where base and source are joined for steps=…; write steps=8 too.")
        return
    if steps < 1:
        raise InterventionError(f"steps={steps} is no number of points; write steps=8, or None for one gradient.")
    if source is None:
        raise InterventionError(
            "steps=… joins base and source, and no source was given; pass source=…, or leave it out."
        )


def runs_of(
    model: Model, base: Inputs | Run, source: Inputs | Run | None, at: Sequence[Location]
) -> tuple[Run, Run | None]:
    """Return the base run and the source run without their graphs, the source with the activations at the locations.

    Raises:
        InterventionError: a base that stopped early or is a counterfactual; and as `run`.
    """
    wholes = list(dict.fromkeys(location.whole for location in at))
    before = as_run(model, base, wholes).detach()
    if before.output is None or before.is_counterfactual:
        raise InterventionError(
            "the base stopped early or is itself a counterfactual run; pass a run of the model itself, or inputs."
        )
    return before, None if source is None else as_run(model, source, wholes, resumable=False).detach()


def _level(before: Run, after: Run | None, metric: Callable[[Any], Tensor]) -> Tensor | None:
    """Return the metric of the source run; None without one, or where its output has another shape than the base's."""
    if after is None or after.output is None or shapes_of(after.output) != shapes_of(before.output):
        return None
    return check_value(metric(after.output), examples_in(after.inputs), "the source run")


Key = tuple[int, int]
"""The numbers of a row and a column."""


@dataclass(eq=False)
class _Sheet:
    """Writes that are made in one block: at each location, tokens of several cells, each token once.

    Attributes:
        ops: the operator at each location.
        examples: the number of examples.
        cells: at each location, the cells with the number of their row.
    """

    ops: Mapping[Location, Operator]
    examples: int
    cells: dict[Location, list[tuple[int, Cell]]] = field(default_factory=dict)

    def takes(self, location: Location, cell: Cell) -> bool:
        """Return whether the tokens of a cell can be written here, as no other cell writes one of them."""
        written = self.cells.get(location, [])
        if not written:
            return True
        if cell.tokens is None or getattr(self.ops[location], "pools_source", False):
            return False
        return all(
            set(mine).isdisjoint(others)
            for name in ("tokens", "source_tokens")
            for _, other in written
            for mine, others in zip(_tokens(cell, name, location), _tokens(other, name, location), strict=True)
        )

    def directions(self) -> Directions:
        """Return the writes."""
        ops = {at: Towards.of(self.ops[at], at, len(self.owners(at))) for at in self.cells}
        if any(cell.tokens is None for written in self.cells.values() for _, cell in written):
            return Directions(ops)
        return Directions(ops, self._joined("tokens"), self._joined("source_tokens"))

    def owners(self, location: Location) -> list[tuple[int, Key]]:
        """Return the example and the cell of each share of a location, in the order in which they are written."""
        written = self.cells[location]
        if written[0][1].tokens is None:
            row, cell = written[0]
            return [(example, (row, cell.column)) for example in range(self.examples)]
        return [
            (example, (row, cell.column))
            for example in range(self.examples)
            for row, cell in written
            for _ in (cell.tokens or {})[location][example]
        ]

    def _joined(self, name: str) -> dict[Location, list[list[int]]] | None:
        """Return the tokens of each location, one list for each example."""
        found: dict[Location, list[list[int]]] = {}
        for at, written in self.cells.items():
            tokens = [_tokens(cell, name, at) for _, cell in written]
            if all(tokens):
                found[at] = [list(chain(*rows)) for rows in zip(*tokens, strict=True)]
        return found or None


def _tokens(cell: Cell, name: str, location: Location) -> Tokens:
    """Return the written tokens of a cell at a location, or those of its source; [] where it names none."""
    return (getattr(cell, name) or {}).get(location, [])


def _sheets(
    rows: Sequence[tuple[Location, ...]], cells: Sequence[Sequence[Cell]], ops: Mapping[Location, Operator], count: int
) -> list[_Sheet]:
    """Return the writes of all cells, in as few blocks as possible."""
    sheets: list[_Sheet] = []
    for number, (row, each) in enumerate(zip(rows, cells, strict=True)):
        for cell in each:
            for location in row:
                sheet = next((each for each in sheets if each.takes(location, cell)), None)
                if sheet is None:
                    sheets.append(sheet := _Sheet(ops, count))
                sheet.cells.setdefault(location, []).append((number, cell))
    return sheets


def _by_cell(sheets: Sequence[_Sheet], found: Sequence[Mapping[Location, Tensor]]) -> dict[Key, Tensor]:
    """Return the first-order effect of each cell, `[examples]`, from the derivatives by the shares of all writes."""
    effects: dict[Key, Tensor] = {}
    for sheet, derivative in zip(sheets, found, strict=True):
        for at, each in derivative.items():
            for value, (example, key) in zip(each, sheet.owners(at), strict=True):
                effects.setdefault(key, torch.zeros(sheet.examples, dtype=torch.double))[example] += value
    return effects
