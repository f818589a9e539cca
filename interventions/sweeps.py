"""A grid of interchanges: one counterfactual for each location and position, in few passes of the model."""

import base64
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interventions.architectures import Place, architecture
from interventions.calls import arguments_of
from interventions.errors import InterventionError
from interventions.interchanges import interchange
from interventions.locations import Location, as_location
from interventions.metrics import Metric, logits_of, name_of
from interventions.operators import Operator, Swap
from interventions.positions import Positions, select
from interventions.recordings import Recording, _versions
from interventions.runs import Inputs, Run, _rows, run, without_past

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

    from interventions.plots import Picture

MOST_ROWS = 64  # rows of a pass, where the caller names no number
MOST_NUMBERS = 2**28  # numbers that such a pass keeps: the output, and what every block returned

Chosen = list[list[int] | None]  # for each example the tokens, counted over real ones; None: it has no such token


@dataclass(frozen=True, eq=False)
class Grid:
    """What a sweep measured. It prints as a table and shows in notebooks as a heat map.

    Attributes:
        per_example: the metric of every counterfactual, NaN for examples that have no such token. One entry instead of
            `examples` where the metric gives one number for all of them.
        locations: the rows: label → the locations written together.
        positions: the columns: numbers of tokens, or labels.
        baseline: the metric of the base run.
        source: the metric of the source run; None without one, or if its logits have another shape.
        metric: what the metric is called.
        is_signed: whether 0 is a middle and not an end of its scale.
    """

    per_example: Float[Tensor, "locations positions examples"]
    locations: Mapping[str, tuple[Location, ...]]
    positions: tuple[int | str, ...]
    baseline: Float[Tensor, " examples"]
    source: Float[Tensor, " examples"] | None = None
    metric: str = "metric"
    is_signed: bool = False

    @property
    def values(self) -> Float[Tensor, "locations positions"]:
        """The mean over the examples that have the token; NaN where none has it."""
        return self.per_example.nanmean(-1)

    @property
    def effects(self) -> Float[Tensor, "locations positions"]:
        """The mean change against the base run, over the examples that have the token."""
        return (self.per_example - self.baseline).nanmean(-1)

    def largest(self, k: int = 5) -> list[tuple[str, int | str, float]]:
        """The `k` cells with the largest change against the base run: (location, position, value), largest first."""
        change = self.effects.abs().flatten().nan_to_num(-1.0)
        cells = [int(cell) for cell in change.argsort(descending=True, stable=True)[:k] if change[cell] >= 0]
        labels, width, values = list(self.locations), len(self.positions), self.values.flatten()
        return [(labels[cell // width], self.positions[cell % width], float(values[cell])) for cell in cells]

    def plot(self, tokens: Sequence[str] | None = None) -> "Picture":
        """A heat map: locations down, positions across.

        Args:
            tokens: texts of the tokens, one for each column.

        Raises:
            InterventionError: another number of tokens than of columns.
        """
        from interventions.plots import heat_map  # importing matplotlib takes time that not every sweep needs

        if tokens is not None and len(tokens) != len(self.positions):
            raise InterventionError(
                f"{len(tokens)} tokens were given for {len(self.positions)} columns ({self.positions[0]} to "
                f"{self.positions[-1]}); pass one text for each column."
            )
        texts = [""] * len(self.positions) if tokens is None else tokens
        columns = [f"{at} {text}".strip() for at, text in zip(self.positions, texts, strict=True)]
        values = self.values
        centred = self.is_signed or bool((values < 0).any() and (values > 0).any())
        return heat_map(
            values,
            list(self.locations),
            columns,
            label=self.metric,
            column_label="position",
            centre=0.0 if centred else None,
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """The values as a table: one row for each location, one column for each position.

        Raises:
            InterventionError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise InterventionError("to_pandas needs pandas, which is not installed: pip install pandas.") from error
        labels = pandas.Index(list(self.locations), name="location")
        columns = pandas.Index(list(self.positions), name="position")
        return pandas.DataFrame(self.values.cpu().numpy(), index=labels, columns=columns)

    def __repr__(self) -> str:
        return "\n".join([self._headline(), *_table(self)])

    def _headline(self) -> str:
        rows, columns, examples = self.per_example.shape
        source = "" if self.source is None else f", of the source run {float(self.source.mean()):.4g}"
        return (
            f"{self.metric}: {rows} location{'s' * (rows != 1)} × {columns} position{'s' * (columns != 1)}, mean of "
            f"{examples} example{'s' * (examples != 1)}; of the base run {float(self.baseline.mean()):.4g}{source}"
        )

    def _repr_html_(self) -> str:
        picture = base64.b64encode(self.plot()._repr_png_()).decode()
        return f'<p>{escape(self._headline())}</p><img src="data:image/png;base64,{picture}">'


def sweep(
    model: nn.Module,
    base: Inputs | Run,
    source: Inputs | Run | None,
    at: object,
    *,
    metric: Callable[[Any], Tensor],
    positions: object = "each",
    source_positions: object = None,
    op: Operator | None = None,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Grid:
    """One counterfactual for each location and position, and what the metric says of it: activation patching.

    The source and the base run once. Every counterfactual resumes from the base run, and the positions of a location
    share passes: (rows of the grid) × ⌈columns / (batch_size // examples)⌉ passes in all. Runs without gradients.

    Args:
        base: inputs, or a Run.
        source: inputs or a Run with as many examples; None for operators that need none.
        at: the rows: a location, a list of locations or of tuples of locations written together, or
            {label: location or list of locations written together}.
        metric: a function of the model's output that gives `[batch]`, or one number for all examples. It is called for
            one counterfactual at a time, with the examples of the base.
        positions: the columns. "each" is every real token of the longest example (every pixel of a feature map); None
            is one column, all tokens at once. Or a list, each entry an int or anything else that
            `interventions.select` takes; or {label: such an entry}. Examples that lack the token of an "each" or int
            column count as NaN.
        source_positions: which tokens of the source to take: None is those of the column; an int for all columns, or
            one entry for each column, as in `positions`.
        op: the operator, `Swap()` by default. It sees one counterfactual at a time.
        batch_size: the most rows of one pass, at least those of the base, which is then one counterfactual a pass; by
            default 64, or fewer that keep 2²⁸ numbers.
        generator: for operators that draw.

    Raises:
        InterventionError: a model in train mode; nothing to write, places or positions that do not exist; base and
            source of different sizes; a metric of another shape, not finite, or that reads padding; and as
            `interchange`.

    Meng et al. 2022 (arXiv:2202.05262), section 2.1; Heimersheim and Nanda 2024 (arXiv:2404.15255).

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)).eval()
    >>> base, source = torch.zeros(4, 2), torch.ones(4, 2)
    >>> grid = sweep(net, base, source, ["module:0", "module:2"], positions=None, metric=lambda logits: logits[:, 0])
    >>> torch.equal(grid.values, net(source).mean().expand(2, 1))
    True
    """
    check_mode(model)
    found, rows = architecture(model), _labelled(at)
    places = {location: found.place(location) for locations in rows.values() for location in locations}
    wholes = list(dict.fromkeys(location.whole for location in places))
    op = _operator(op, source)
    with torch.no_grad():
        before = _base_run(model, base, wholes)
        given = None if source is None else _source_run(model, source, wholes)
        examples = _examples(before.inputs)
        _check_sizes(op, examples, given)
        _check_reads_real(metric, before)
        baseline = _measured(metric, before.output, examples, "the base run")
        columns, asked = _asked(rows.values(), positions, source_positions, before, given, op=op, places=places)
        values = baseline.new_full((len(rows), len(columns), len(baseline)), math.nan)
        passes = _Passes(before, given, op, generator, examples, _cells_a_pass(before, examples, batch_size))
        for row, (locations, cells) in enumerate(zip(rows.values(), asked, strict=True)):
            for column, cell, output in passes(locations, cells):
                what = f"the counterfactual at {' + '.join(map(str, locations))}, position {columns[column].label}"
                values[row, column] = _of_present(_measured(metric, output, examples, what), cell, baseline)
        level = _source_level(metric, before, given, examples)
    return Grid(
        values,
        rows,
        tuple(column.label for column in columns),
        baseline,
        level,
        name_of(metric),
        bool(getattr(metric, "is_signed", False)),
    )


@dataclass(frozen=True, eq=False)
class Column:
    """A column of the grid: what is asked for, not yet counted in any example."""

    label: int | str
    positions: Any
    source_positions: Any


@dataclass(frozen=True, eq=False)
class Cell:
    """The tokens that one counterfactual writes, and those that it takes, by location; None: all of them.

    Attributes:
        present: which examples have the tokens.
    """

    tokens: Mapping[Location, list[list[int]]] | None
    source_tokens: Mapping[Location, list[list[int]]] | None
    present: Bool[Tensor, " examples"] | None


@dataclass(frozen=True, eq=False)
class _PerCell:
    """An operator on several counterfactuals that lie one after the other: it sees each as if it were alone."""

    op: Operator
    counts: list[int]
    source_counts: list[int] | None

    def __getattr__(self, name: str) -> object:
        return getattr(self.op, name)  # needs_source and pools_source, where it has them

    def __repr__(self) -> str:
        return repr(self.op)

    def __call__(self, base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        parts = base.split(self.counts)
        sources = [None] * len(parts) if source is None else source.split(self.source_counts or self.counts)
        return torch.cat([self.op(mine, its, generator) for mine, its in zip(parts, sources, strict=True)])


@dataclass(eq=False)
class _Passes:
    """Runs the counterfactuals of a location, several in one pass."""

    base: Run
    source: Run | None
    op: Operator
    generator: torch.Generator | None
    examples: int
    cells_a_pass: int
    _repeats: "_Repeats" = field(init=False)

    def __post_init__(self) -> None:
        self._repeats = _Repeats(self.base, self.examples)

    def __call__(
        self, locations: tuple[Location, ...], cells: Sequence[Cell | None]
    ) -> Iterator[tuple[int, Cell, object]]:
        """`(column, cell, output of that counterfactual)`, for the cells that are there."""
        live = [(column, cell) for column, cell in enumerate(cells) if cell is not None]
        size = math.ceil(len(live) / math.ceil(len(live) / self.cells_a_pass)) if live else 1
        for start in range(0, len(live), size):
            chunk = live[start : start + size]
            done = self._together(locations, [cell for _, cell in chunk])
            for number, (column, cell) in enumerate(chunk):
                yield column, cell, _cut(done, number, len(chunk), self.examples)

    def _together(self, locations: tuple[Location, ...], cells: list[Cell]) -> object:
        count = len(cells)
        base = self._repeats.base(count)
        source = None if self.source is None else _repeated_states(self.source, count)
        written = [_joined([cell.tokens for cell in cells], location) for location in locations]
        taken = [_joined([cell.source_tokens for cell in cells], location) for location in locations]
        done = interchange(
            self.base.model,
            base,
            source,
            {location: self._operator(location, cells) for location in locations},
            positions=dict(zip(locations, written, strict=True)),
            source_positions=dict(zip(locations, taken, strict=True)),
            generator=self.generator,
        )
        self._repeats.learn(done.recording, count)
        return without_past(done.output)

    def _operator(self, location: Location, cells: list[Cell]) -> Operator:
        if len(cells) == 1 or not callable(self.op) or isinstance(self.op, type):
            return self.op
        counts, source_counts = (
            [sum(map(len, tokens[location])) for tokens in each if tokens is not None]
            for each in ([cell.tokens for cell in cells], [cell.source_tokens for cell in cells])
        )
        return _PerCell(self.op, counts, source_counts or None)


@dataclass(eq=False)
class _Repeats:
    """The base run with its examples repeated, and what its blocks returned with them.

    Which axis of what a block returned holds the examples, if any does (the position bias of T5 has one row for all
    of them), shows in the first pass with repeated examples: it is the axis that grew. That pass runs in full.
    """

    run: Run
    examples: int
    _grown: list | None = None
    _times: int = 0
    _made: dict[int, Run] = field(default_factory=dict)

    def base(self, times: int) -> Run:
        if times == 1:
            return self.run
        if times not in self._made:
            rows = torch.arange(self.examples).repeat(times)
            made = replace(
                self.run, inputs=_rows(self.run.inputs, rows), output=None, activations={}, recording=self._tiled(times)
            )
            if made.recording is None:
                return made
            self._made[times] = made
        return self._made[times]

    def learn(self, recording: Recording | None, times: int) -> None:
        """Note how what the blocks returned grew in a pass of `times` repeats."""
        if times > 1 and self._grown is None and recording is not None:
            self._grown, self._times = (
                [(call.block, _shapes(call.raw), _shapes(call.state)) for call in recording.calls],
                times,
            )

    def _tiled(self, times: int) -> Recording | None:
        recording = self.run.recording
        if recording is None or self._grown is None:
            return None
        if [call.block for call in recording.calls] != [block for block, _, _ in self._grown]:
            return None
        calls = []
        try:
            for call, (_, raw_shapes, state_shapes) in zip(recording.calls, self._grown, strict=True):
                if not call.is_intact:
                    return None
                raw = _tiled(call.raw, raw_shapes, self._times, times)
                state = raw if call.state is call.raw else _tiled(call.state, state_shapes, self._times, times)
                calls.append(replace(call, raw=raw, state=state, versions=_versions(raw, state)))
        except LookupError:
            return None
        return replace(recording, calls=calls)


def _shapes(value: Any) -> Any:
    """`value` with the shapes of its tensors in place of them."""
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, Mapping):
        return {key: _shapes(entry) for key, entry in value.items()}
    return [_shapes(entry) for entry in value] if type(value) in (tuple, list) else value


def _tiled(value: Any, grown: Any, seen: int, times: int) -> Any:
    """`value` for `times` times the examples, given the shapes that it has for `seen` times.

    Raises:
        LookupError: it cannot be told how it grows.
    """
    if isinstance(value, Tensor):
        if not isinstance(grown, torch.Size) or len(grown) != value.ndim:
            raise LookupError
        axes = [axis for axis, (old, new) in enumerate(zip(value.shape, grown, strict=True)) if old != new]
        if not axes:
            return value
        if len(axes) > 1 or grown[axes[0]] != seen * value.shape[axes[0]]:
            raise LookupError
        return torch.cat([value] * times, axes[0])
    if isinstance(value, Mapping) and isinstance(grown, Mapping) and value.keys() == grown.keys():
        entries = {key: _tiled(entry, grown[key], seen, times) for key, entry in value.items()}
        return type(value)(**entries) if hasattr(value, "to_tuple") else entries
    if type(value) in (tuple, list) and isinstance(grown, list) and len(value) == len(grown):
        return type(value)(_tiled(entry, its, seen, times) for entry, its in zip(value, grown, strict=True))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise LookupError


def _repeated_states(source: Run, times: int) -> Run:
    if times == 1:
        return source
    rows = torch.arange(_examples(source.inputs)).repeat(times)
    return replace(source, output=None, recording=None).take(rows)


def _joined(tokens: list[Mapping[Location, list[list[int]]] | None], location: Location) -> list[list[int]] | None:
    """The tokens of the rows of several cells, one after the other."""
    found = [each[location] for each in tokens if each is not None]
    return [row for rows in found for row in rows] if found else None


# --- runs -------------------------------------------------------------------------------------------------------------


def _base_run(model: nn.Module, base: Inputs | Run, wholes: list[Location]) -> Run:
    if not isinstance(base, Run):
        return run(model, base, wholes, device="meta")  # of what is written only the shape matters
    check_model(base, model, "base")
    base.check_fresh()
    if base.output is None:
        raise InterventionError("the base run stopped early and has no output to measure; pass run(model, inputs).")
    if base.is_counterfactual:
        raise InterventionError("the base is itself a counterfactual run; pass a run of the model itself, or inputs.")
    return base


def _source_run(model: nn.Module, source: Inputs | Run, wholes: list[Location]) -> Run:
    """A run that has the activations of all locations: the one given if it has them, else with one more forward."""
    if not isinstance(source, Run):
        if isinstance(source, Mapping) and any(isinstance(key, Location) for key in source):
            raise InterventionError("a sweep takes one source for all of its cells; pass inputs or a Run.")
        return run(model, source, wholes, resumable=False)
    check_model(source, model, "source")
    source.check_fresh()
    return replace(source, activations=states_of(source, wholes))


def states_of(given: Run, wholes: list[Location], device: str | None = None) -> dict[Location, Tensor]:
    """The activations of a run, those that it does not have by running it once more."""
    found = architecture(given.model)
    missing = [
        location
        for location in wholes
        if location not in given.activations
        and (given.recording is None or given.recording.state(found.place(location)) is None)
    ]
    again: Mapping[Location, Tensor] = {}
    if missing and not given.is_counterfactual:
        again = run(given.model, given.inputs, missing, resumable=False, device=device).activations
    return {location: again[location] if location in again else given.activations[location] for location in wholes}


def _examples(inputs: Any) -> int:
    """How many examples the inputs hold."""
    first = next(_tensors(inputs), None)
    if first is None:
        raise InterventionError("the inputs hold no tensor, so their examples cannot be counted; pass tensors.")
    return len(first)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.ndim:
            yield value
    elif isinstance(value, Mapping | tuple | list):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(entry)


def _cells_a_pass(base: Run, examples: int, batch_size: int | None) -> int:
    if batch_size is not None and (isinstance(batch_size, bool) or batch_size < examples):
        raise InterventionError(
            f"batch_size={batch_size!r} rows do not hold one counterfactual of {examples} examples; write "
            f"batch_size={examples} or more, or sweep fewer examples at a time."
        )
    if any(len(tensor) != examples for tensor in _tensors(base.inputs)):
        return 1  # something in the inputs is not one entry an example, so they cannot be repeated
    if batch_size is None:
        kept = [base.output, [call.raw for call in base.recording.calls] if base.recording else None]
        batch_size = min(MOST_ROWS, examples * MOST_NUMBERS // max(1, sum(t.numel() for t in _tensors(kept))))
    return max(1, batch_size // examples)


def _cut(output: Any, number: int, count: int, examples: int) -> Any:
    """The output of one of `count` counterfactuals; None for what is not one entry an example, such as a loss."""
    if count == 1:
        return output
    if isinstance(output, Tensor):
        cells = output.ndim > 0 and len(output) == count * examples
        return output[number * examples : (number + 1) * examples] if cells else None
    if isinstance(output, Mapping):
        named = {key: _cut(entry, number, count, examples) for key, entry in output.items()}
        return type(output)(**named) if hasattr(output, "to_tuple") else named
    if isinstance(output, tuple | list):
        entries = [_cut(entry, number, count, examples) for entry in output]
        return type(output)(*entries) if hasattr(output, "_fields") else type(output)(entries)
    return output


# --- rows and columns -------------------------------------------------------------------------------------------------


def _labelled(at: Any) -> dict[str, tuple[Location, ...]]:
    """The rows of the grid: label → locations written together."""
    if isinstance(at, Mapping):
        wrong = next((label for label in at if not isinstance(label, str)), None)
        if wrong is not None:
            raise InterventionError(
                f"at={{{wrong!r}: …}}: the keys of a sweep are labels; write {{'a label': Location(3)}}, and the "
                "operator as op=…."
            )
        rows = [(label, _together(place)) for label, place in at.items()]
    else:
        places = [at] if isinstance(at, Location | str) or not isinstance(at, Iterable) else list(at)
        found = [_together(place) for place in places]
        rows = [(" + ".join(map(str, locations)), locations) for locations in found]
    if not rows:
        raise InterventionError("no location was given; write at=[Location(3)].")
    labels = [label for label, _ in rows]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise InterventionError(f"two rows are called {twice}; name each once, or label them: at={{'a label': …}}.")
    return dict(rows)


def _together(place: Any) -> tuple[Location, ...]:
    several = isinstance(place, tuple | list)
    locations = tuple(dict.fromkeys(map(as_location, place if several else [place])))
    if not locations:
        raise InterventionError("a row of at= holds no location; write at=[(Location(3), Location(4)), …].")
    return locations


def _columns(positions: Any, source_positions: Any, longest: int) -> list[Column]:
    if isinstance(positions, str) and positions == "each":
        positions = range(longest)
    entries = _entries(positions, "positions")
    labels = list(positions) if isinstance(positions, Mapping) else [_label(entry) for entry in entries]
    if len(set(labels)) < len(labels):
        raise InterventionError("two columns of positions are called alike; label them: positions={'a label': …}.")
    if source_positions is None or isinstance(source_positions, int):
        return [Column(label, entry, source_positions) for label, entry in zip(labels, entries, strict=True)]
    if isinstance(source_positions, Mapping):
        if source_positions.keys() != set(labels):
            raise InterventionError(
                f"source_positions names the columns {list(source_positions)} and positions {labels}; use one set."
            )
        source_positions = [source_positions[label] for label in labels]
    taken = _entries(source_positions, "source_positions")
    if len(taken) != len(entries):
        raise InterventionError(
            f"source_positions has {len(taken)} entries for {len(entries)} columns; give one for each."
        )
    return [Column(*column) for column in zip(labels, entries, taken, strict=True)]


def _entries(positions: Any, what: str) -> list[Any]:
    """What is asked for, for each column."""
    if isinstance(positions, Tensor) and (positions.ndim != 1 or positions.dtype == torch.bool):
        raise InterventionError(
            f"{what} is a {positions.dtype} tensor of shape {list(positions.shape)}, and each entry is a column; write "
            f"{what}=[that] for one column, or a list of ints."
        )
    if isinstance(positions, Tensor | Mapping):
        positions = positions.tolist() if isinstance(positions, Tensor) else positions.values()
    alone = isinstance(positions, slice) or hasattr(positions, "__index__")
    entries = [positions] if alone else list(positions) if isinstance(positions, Iterable) else []
    entries = [index(entry) if _is_number(entry) else entry for entry in entries]
    wrong = [entry for entry in entries if entry is None or isinstance(entry, str | bool | float)]
    if wrong or not entries:
        raise InterventionError(
            f"{what}={positions!r} is not understood; write 'each', None for all at once, or a list such as [0, 3, -1]."
        )
    return entries


def _is_number(entry: object) -> bool:
    return hasattr(entry, "__index__") and not isinstance(entry, bool | Tensor)


def _label(entry: Any) -> int | str:
    if isinstance(entry, int):
        return entry
    if isinstance(entry, slice):
        step = "" if entry.step is None else f":{entry.step}"
        return f"{'' if entry.start is None else entry.start}:{'' if entry.stop is None else entry.stop}{step}"
    text = f"tensor{list(entry.shape)}" if isinstance(entry, Tensor) else str(entry)
    return text if len(text) <= 24 else text[:23] + "…"


def _asked(
    rows: Iterable[tuple[Location, ...]],
    positions: Any,
    source_positions: Any,
    base: Run,
    source: Run | None,
    *,
    op: Operator,
    places: Mapping[Location, Place],
) -> tuple[list[Column], list[list[Cell | None]]]:
    """The columns, and for each row of the grid its cells; None where no example has the tokens."""
    if source_positions is not None and (positions is None or source is None):
        without = "positions=None, all tokens; say where to write" if positions is None else "no source; leave it out"
        raise InterventionError(f"source_positions was given with {without}.")
    if positions is None:
        return [Column("all", None, None)], [[Cell(None, None, None)] for _ in rows]
    written = _real(base, places)
    taken = None if source is None else _real(source, places)
    aligned = not getattr(op, "pools_source", False)
    longest = max(int(real.sum(1).max()) for real in written.values())
    columns = _columns(positions, source_positions, longest)
    cells = [[_cell(locations, column, written, taken, aligned=aligned) for column in columns] for locations in rows]
    for number, column in enumerate(columns):
        if not isinstance(positions, str) and all(row[number] is None for row in cells):
            raise InterventionError(
                f"positions={column.label} is a token of no example at any location, in base and source; the longest "
                f"has {longest}."
            )
    return columns, cells


def _real(given: Run, places: Mapping[Location, Place]) -> dict[Location, Tensor]:
    """Which tokens are real at each location."""
    arguments = arguments_of(given.model, given.inputs)
    masks = {location: arguments.get(place.mask) for location, place in places.items()}
    wholes = [location.whole for location, mask in masks.items() if not isinstance(mask, Tensor)]
    shapes = replace(given, activations=states_of(given, list(dict.fromkeys(wholes)), device="meta"))
    real = {}
    for location, mask in masks.items():
        if isinstance(mask, Tensor):
            real[location] = mask.bool()
            continue
        shape = shapes.vectors(location.whole).shape
        if len(shape) < 3:
            raise InterventionError(
                f"{location} has no positions: its shape is {list(shape)}, [batch, dims]; write positions=None."
            )
        real[location] = torch.ones(shape[:2], dtype=torch.bool)
    return real


def _cell(
    locations: tuple[Location, ...],
    column: Column,
    written: Mapping[Location, Tensor],
    taken: Mapping[Location, Tensor] | None,
    *,
    aligned: bool,
) -> Cell | None:
    mine = {location: _counted(column.positions, written[location]) for location in locations}
    asked = column.positions if column.source_positions is None else column.source_positions
    its = None if taken is None else {location: _counted(asked, taken[location]) for location in locations}
    together = [*mine.values(), *(its.values() if its is not None and aligned else ())]
    present = [all(row is not None for row in example) for example in zip(*together, strict=True)]
    if not any(present) or (its is not None and not all(map(any, its.values()))):
        return None

    def kept(chosen: Mapping[Location, Chosen], which: Sequence[bool]) -> dict[Location, list[list[int]]]:
        return {
            location: [row if row is not None and keep else [] for row, keep in zip(rows, which, strict=True)]
            for location, rows in chosen.items()
        }

    if its is None:
        return Cell(kept(mine, present), None, torch.tensor(present))
    everywhere = [True] * len(next(iter(its.values())))
    return Cell(kept(mine, present), kept(its, present if aligned else everywhere), torch.tensor(present))


def _counted(positions: Positions, real: Bool[Tensor, "batch token"]) -> Chosen:
    """For each example the tokens that `positions` names, counted over the real ones."""
    if isinstance(positions, int):
        lengths = real.sum(1).tolist()
        return [[positions % length] if -length <= positions < length else None for length in lengths]
    chosen = select(positions, real)
    numbers = (real.long().cumsum(1) - 1)[chosen.rows, chosen.columns].tolist()
    found: Chosen = [[] for _ in range(len(real))]
    for row, number in zip(chosen.rows.tolist(), numbers, strict=True):
        found[row].append(number)
    return [row or None for row in found]


# --- measuring --------------------------------------------------------------------------------------------------------


def _measured(metric: Callable[[Any], Tensor], output: object, examples: int, what: str) -> Tensor:
    """What the metric says, `[examples]` or `[1]`, on the CPU."""
    value = metric(output)
    if not isinstance(value, Tensor | int | float):
        raise InterventionError(
            f"the metric returned {type(value).__name__} for {what}; return a tensor [batch] or one number"
            + ("" if value is not None else ", and where it reads a loss, which has no rows, pass batch_size=")
            + ("." if value is not None else f"{examples}.")
        )
    value = torch.as_tensor(value).detach().cpu()
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    if value.shape not in ((), (examples,)):
        raise InterventionError(
            f"the metric returned shape {list(value.shape)} for {what}; return [{examples}], one number for each "
            "example, or one for all."
        )
    if not value.isfinite().all():
        bad = value.flatten()[~value.flatten().isfinite()][0]
        raise InterventionError(f"the metric is {float(bad)} for {what}; use one that is finite, e.g. a difference.")
    return value.reshape(-1)


def _of_present(values: Tensor, cell: Cell, baseline: Tensor) -> Tensor:
    """NaN for examples that lack the tokens, and for a number for all examples where one lacks them."""
    if values.shape != baseline.shape:
        raise InterventionError(
            f"the metric returned {len(baseline)} numbers for the base run and {len(values)} for a counterfactual."
        )
    if cell.present is None or cell.present.all():
        return values
    return values.masked_fill(~cell.present if len(values) == len(cell.present) else torch.tensor(True), math.nan)


def _source_level(metric: Callable[[Any], Tensor], base: Run, source: Run | None, examples: int) -> Tensor | None:
    if source is None or source.output is None:
        return None
    mine, its = (_shapes(without_past(each.output)) for each in (base, source))
    return _measured(metric, source.output, examples, "the source run") if mine == its else None


def _operator(op: Operator | None, source: object) -> Operator:
    if op is None and source is None:
        raise InterventionError("no operator was given; write op=Zero(), or source=… to swap.")
    op = Swap() if op is None else op
    name = type(op).__name__
    if getattr(op, "needs_source", source is not None) != (source is not None) and not isinstance(op, type):
        raise InterventionError(
            f"{name} takes from a source and none was given; pass source=inputs or a Run."
            if source is None
            else f"a source was given and {name} takes none; leave it out: source=None."
        )
    return op


def check_mode(model: nn.Module) -> None:
    """Raise in train mode, where dropout would differ between runs that are compared."""
    if any(module.training for module in model.modules()):
        raise InterventionError(
            "the model is in train mode, where dropout differs from run to run; call model.eval() first."
        )


def check_model(given: Run, model: nn.Module, what: str) -> None:
    """Raise for a run of another model."""
    if given.model is not model:
        raise InterventionError(
            f"the {what} is a run of another model ({type(given.model).__name__}); run it on this one: run(model, "
            "inputs)."
        )


def _check_sizes(op: Operator, examples: int, source: Run | None) -> None:
    if source is None or getattr(op, "pools_source", False):
        return
    mine = _examples(source.inputs)
    if mine != examples:
        raise InterventionError(f"the base has {examples} examples and the source {mine}; give one source an example.")


def _check_reads_real(metric: object, base: Run) -> None:
    """Raise for a metric made here that would read padding, because it was not told the mask."""
    if not isinstance(metric, Metric) or metric.mask is not None:
        return
    logits = logits_of(base.output)
    two_sided = getattr(getattr(base.model, "config", None), "is_encoder_decoder", False)
    name = "decoder_attention_mask" if two_sided else "attention_mask"
    mask = arguments_of(base.model, base.inputs).get(name)
    if logits.ndim != 3 or not isinstance(mask, Tensor) or mask.shape != logits.shape[:2]:
        return
    counted = select(metric.position, mask.bool()).columns
    read = select(metric.position, torch.ones_like(mask, dtype=torch.bool)).columns
    wrong = int((counted != read).sum())
    if wrong:
        raise InterventionError(
            f"the metric ({metric.name}) reads position {metric.position} without a mask, another token than the "
            f"{metric.position} of the real ones in {wrong} of {len(mask)} examples; pass mask=inputs[{name!r}]."
        )


def _table(grid: Grid, most_rows: int = 30, most_columns: int = 12) -> list[str]:
    """The values as aligned text, the middle left out where there are many."""
    rows, columns = (
        _ends(count, most) for count, most in ((len(grid.locations), most_rows), (len(grid.positions), most_columns))
    )
    labels, values = list(grid.locations), grid.values
    largest = float(values.abs().nan_to_num(0.0).max())
    digits = min(6, max(0, 2 - math.floor(math.log10(largest)))) if largest > 0 else 1
    lines = [["", *("…" if c is None else str(grid.positions[c]) for c in columns)]]
    for r in rows:
        if r is None:
            lines.append(["…" for _ in range(len(columns) + 1)])
            continue
        cells = [
            "…" if c is None else "" if values[r, c].isnan() else f"{float(values[r, c]):.{digits}f}" for c in columns
        ]
        lines.append([labels[r], *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]


def _ends(count: int, most: int) -> list[int | None]:
    if count <= most:
        return list(range(count))
    return [*range(most // 2), None, *range(count - most // 2, count)]
