"""What a sweep measured: a grid of numbers that prints, draws itself and becomes a data frame."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from interventions.analysis.result import Result, data_frame, plain
from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.locations import Location
from interventions.names import printed

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

MOST_ROWS, MOST_COLUMNS = 30, 12  # of a printed table


@dataclass(frozen=True, eq=False)
class Grid(Result):
    """The metric of every counterfactual of a sweep. It prints as a table and is drawn as a heat map.

    Attributes:
        per_example: the metric of every counterfactual, NaN for examples that have no such token. One entry instead of
            `examples` where the metric gives one number for all of them.
        locations: the rows: label → the locations written together.
        positions: the columns: numbers of tokens, or labels.
        baseline: the metric of the base run.
        source: the metric of the source run; None without one, or if its output has another shape.
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

    @checked
    def largest(self, k: int = 5) -> list[tuple[str, int | str, float]]:
        """The `k` cells with the largest change against the base run: (location, position, value), largest first."""
        if k < 1:
            raise InterventionError(f"largest(k={k}) asks for no cell; write k=5.")
        changes = self.effects.abs()
        cells = [divmod(int(cell), len(self.positions)) for cell in changes.flatten().argsort(descending=True)]
        labels, values = list(self.locations), self.values
        measured = [(row, column) for row, column in cells if not changes[row, column].isnan()]
        return [(labels[row], self.positions[column], float(values[row, column])) for row, column in measured[:k]]

    @checked
    def plot(self, tokens: Sequence[str] | None = None) -> Any:
        """A heat map, as a matplotlib figure: locations down, positions across.

        Args:
            tokens: texts of the tokens, one for each column.

        Raises:
            InterventionError: another number of tokens than of columns.
        """
        if tokens is not None and len(tokens) != len(self.positions):
            raise InterventionError(
                f"{len(tokens)} tokens were given for {len(self.positions)} columns ({self.positions[0]} to "
                f"{self.positions[-1]}); pass one text for each column."
            )
        texts = [""] * len(self.positions) if tokens is None else tokens
        columns = [f"{at} {text}".strip() for at, text in zip(self.positions, texts, strict=True)]
        center = 0.0 if self.is_signed or (self.values.nan_to_num() < 0).any() else None
        from interventions.analysis.plots import heat_map  # matplotlib takes half a second

        return heat_map(
            self.values, list(self.locations), columns, label=self.metric, column_label="position", center=center
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the values as a table: one row for each location, one column for each position.

        Raises:
            InterventionError: pandas is not installed.
        """
        values = zip(self.locations, self.values.tolist(), strict=True)
        rows = ({"location": label, **dict(zip(self.positions, row, strict=True))} for label, row in values)
        table = data_frame(rows, "location")
        table.columns.name = "position"
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return the grid as plain data, for JSON; None where no example has the token."""
        return {
            "metric": self.metric,
            "is_signed": self.is_signed,
            "locations": {label: list(map(str, written)) for label, written in self.locations.items()},
            "positions": plain(self.positions),
            "values": plain(self.values),
            "effects": plain(self.effects),
            "per_example": plain(self.per_example),
            "baseline": plain(self.baseline),
            "source": plain(self.source),
        }

    @printed
    def __repr__(self) -> str:
        return f"{self._headline()}\n{_table(self)}"

    @printed
    def _headline(self) -> str:
        rows, columns, examples = self.per_example.shape
        source = "" if self.source is None else f", of the source run {_text(self.source)}"
        return (
            f"{self.metric}: {_count(rows, 'location')} × {_count(columns, 'position')}, mean of "
            f"{_count(examples, 'example')}; of the base run {_text(self.baseline)}{source}"
        )


def _text(values: Tensor) -> str:
    """The mean in four digits; what is 0 but for rounding is 0."""
    mean, largest = float(values.mean()), float(values.abs().max())
    return f"{0.0 if abs(mean) < 1e-6 * max(1.0, largest) else mean:.4g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _table(grid: Grid) -> str:
    """The values as aligned text, the middle left out where there are many; empty where no example has the token."""
    values, labels = grid.values, list(grid.locations)
    largest = float(values.abs().nan_to_num().max())
    digits = min(6, max(0, 2 - math.floor(math.log10(largest)))) if largest > 0 else 1
    lines = [["", *map(str, grid.positions)]]
    for label, row in zip(labels, values.tolist(), strict=True):
        lines.append(
            [label, *("" if math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}" for value in row)]
        )
    lines = [_shortened(line, MOST_COLUMNS, "…") for line in lines]
    lines = _shortened(lines, MOST_ROWS, ["…"] * len(lines[0]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def _shortened(entries: list, most: int, gap: object) -> list:
    """The heading and the entries, with a gap in place of the middle where there are more than `most`."""
    if len(entries) - 1 <= most:
        return entries
    return [*entries[: 1 + most // 2], gap, *entries[-(most // 2) :]]
