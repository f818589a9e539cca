"""`Grid`: the result of a sweep, which prints as a table, is drawn as a heat map and becomes a data frame."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from interventions.analysis.result import Result, data_frame, plain_data
from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.locations import Location
from interventions.names import printed, token_label

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

MOST_ROWS, MOST_COLUMNS = 30, 12  # of a printed table


@dataclass(frozen=True, eq=False)
class Grid(Result):
    """The metric of every counterfactual of a sweep. It prints as a table and is drawn as a heat map.

    Attributes:
        per_example: `[locations, positions, examples]`, the metric of every counterfactual, NaN for examples that lack
            the token. The last axis has one entry if the metric returns one number for all examples.
        locations: the rows, {label: the locations written together}.
        positions: the columns, numbers of tokens or labels; of a grid `by_head`, numbers of heads.
        baseline: `[examples]`, the metric of the base run.
        source: `[examples]`, the metric of the source run; None without a source, or if its output has another shape.
        metric: the name of the metric.
        is_signed: True if 0 is the middle of its scale, as for differences.
        column: what the columns are: "position" or "head".

    >>> import torch
    >>> rows = {str(location): (location,) for location in map(Location, range(2))}
    >>> values = torch.tensor([[0.25, 0.5], [0.75, 1.0]])
    >>> grid = Grid(values[..., None], rows, (0, 1), baseline=torch.zeros(1), metric="probability")
    >>> grid
    probability: 2 locations × 2 positions, mean of 1 example; of the base run 0
                       0     1
    block_output.0  0.25  0.50
    block_output.1  0.75  1.00
    >>> grid.largest(1)
    [('block_output.1', 1, 1.0)]
    """

    per_example: Float[Tensor, "locations positions examples"]
    locations: Mapping[str, tuple[Location, ...]]
    positions: tuple[int | str, ...]
    baseline: Float[Tensor, " examples"]
    source: Float[Tensor, " examples"] | None = None
    metric: str = "metric"
    is_signed: bool = False
    column: str = "position"

    @property
    def values(self) -> Float[Tensor, "locations positions"]:
        """The mean metric over the examples that have the token; NaN where none has it."""
        return self.per_example.nanmean(-1)

    @property
    def effects(self) -> Float[Tensor, "locations positions"]:
        """The mean change of the metric against the base run, over the examples that have the token."""
        return (self.per_example - self.baseline).nanmean(-1)

    @checked
    def largest(self, k: int = 5) -> list[tuple[str, int | str, float]]:
        """Return the `k` cells with the largest change against the base run, largest first.

        Args:
            k: the number of cells, 1 or more; cells without a value are left out.

        Returns:
            (label of the row, position, mean metric) for each cell.

        Raises:
            InterventionError: `k` is below 1.
        """
        if k < 1:
            raise InterventionError(f"largest(k={k}) asks for no cell; write k=5.")
        changes = self.effects.abs()
        cells = [divmod(int(cell), len(self.positions)) for cell in changes.flatten().argsort(descending=True)]
        labels, values = list(self.locations), self.values
        measured = [(row, column) for row, column in cells if not changes[row, column].isnan()]
        return [(labels[row], self.positions[column], float(values[row, column])) for row, column in measured[:k]]

    @checked
    def plot(self, tokens: Sequence[str] | None = None) -> Any:
        """Draw the values as a heat map, a matplotlib figure: locations down, positions across.

        The color of a cell is its change against the base run, whose mean is white, so a cell without effect is white.

        Args:
            tokens: the texts of the tokens, one for each column; None writes the positions alone.

        Raises:
            InterventionError: another number of tokens than of columns.
        """
        if tokens is not None and len(tokens) != len(self.positions):
            raise InterventionError(
                f"{len(tokens)} tokens were given for {len(self.positions)} columns ({self.positions[0]} to "
                f"{self.positions[-1]}); pass one text for each column."
            )
        texts = [""] * len(self.positions) if tokens is None else list(map(token_label, tokens))
        columns = [f"{at} {text.strip()}".strip() for at, text in zip(self.positions, texts, strict=True)]
        from interventions.analysis.plots import heat_map  # matplotlib takes half a second

        return heat_map(
            self.values, list(self.locations), columns, label=self.metric, column_label=self.column,
            center=float(self.baseline.mean()),
        )  # fmt: skip

    @checked
    def by_head(self, position: int | str | None = None) -> "Grid":
        """Return the grid as layers × heads, of a grid whose rows are single heads, as `heads(model)` names them.

        Args:
            position: the column to show; None is the only one.

        Raises:
            InterventionError: a row that is more or less than one head; a column that does not exist, or none named
                where there are several.

        >>> rows = {str(at): (at,) for at in (Location(0, "attention_heads", heads=head) for head in range(2))}
        >>> import torch
        >>> Grid(torch.tensor([[[0.5]], [[1.0]]]), rows, ("all",), baseline=torch.zeros(1)).by_head()
        metric: 1 location × 2 heads, mean of 1 example; of the base run 0
                              0     1
        attention_heads.0  0.50  1.00
        """
        where = self._column(position)
        rows: dict[str, dict[int, int]] = {}
        for number, (label, written) in enumerate(self.locations.items()):
            if len(written) != 1 or written[0].heads is None or len(written[0].heads) != 1:
                raise InterventionError(
                    f"the row {label} is not one head; sweep the heads one by one: at=heads(model)."
                )
            rows.setdefault(str(written[0].whole), {})[written[0].heads[0]] = number
        columns = tuple(sorted({head for found in rows.values() for head in found}))
        examples = self.per_example.shape[-1]
        values = self.per_example.new_full((len(rows), len(columns), examples), math.nan)
        for row, found in enumerate(rows.values()):
            for head, number in found.items():
                values[row, columns.index(head)] = self.per_example[number, where]
        every = list(self.locations.values())
        places = {label: tuple(every[number][0] for number in found.values()) for label, found in rows.items()}
        return replace(self, per_example=values, locations=places, positions=columns, column="head")

    def _column(self, position: int | str | None) -> int:
        """Return the number of a column."""
        if position is None and len(self.positions) == 1:
            return 0
        if position not in self.positions:
            raise InterventionError(
                f"position={position!r} is no column of this grid, which has {', '.join(map(str, self.positions))}; "
                f"write position={self.positions[0]!r}."
            )
        return self.positions.index(position)

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the values as a table: one row for each location, one column for each position.

        Raises:
            InterventionError: pandas is not installed.
        """
        values = zip(self.locations, self.values.tolist(), strict=True)
        rows = ({"location": label, **dict(zip(self.positions, row, strict=True))} for label, row in values)
        table = data_frame(rows, "location")
        table.columns.name = self.column
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return the grid as plain data, for JSON; None where no example has the token."""
        return {
            "metric": self.metric,
            "is_signed": self.is_signed,
            "locations": {label: list(map(str, written)) for label, written in self.locations.items()},
            "positions": plain_data(self.positions),
            "column": self.column,
            "values": plain_data(self.values),
            "effects": plain_data(self.effects),
            "per_example": plain_data(self.per_example),
            "baseline": plain_data(self.baseline),
            "source": plain_data(self.source),
        }

    @printed
    def __repr__(self) -> str:
        return f"{self._headline()}\n{_table(self)}"

    @printed
    def _headline(self) -> str:
        rows, columns, examples = self.per_example.shape
        source = "" if self.source is None else f", of the source run {_format_mean(self.source)}"
        return (
            f"{self.metric}: {_count(rows, 'location')} × {_count(columns, self.column)}, mean of "
            f"{_count(examples, 'example')}; of the base run {_format_mean(self.baseline)}{source}"
        )


def _format_mean(values: Tensor) -> str:
    """Format the mean in four digits; one that differs from 0 by rounding alone is 0."""
    mean, largest = float(values.mean()), float(values.abs().max())
    return f"{0.0 if abs(mean) < 1e-6 * max(1.0, largest) else mean:.4g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _table(grid: Grid) -> str:
    """Format the values as aligned text: the middle of a long table is left out, cells without a value are empty."""
    values, labels = grid.values, list(grid.locations)
    largest = float(values.abs().nan_to_num().max())
    digits = min(6, max(0, 2 - math.floor(math.log10(largest)))) if largest > 0 else 1
    lines = [["", *map(str, grid.positions)]]
    for label, row in zip(labels, values.tolist(), strict=True):
        lines.append(
            [label, *("" if math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}" for value in row)]
        )
    lines = [_shorten(line, MOST_COLUMNS, "…") for line in lines]
    lines = _shorten(lines, MOST_ROWS, ["…"] * len(lines[0]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def _shorten(entries: list, most: int, gap: object) -> list:
    """Return the heading and the entries, with a gap in place of the middle if there are more than `most`."""
    if len(entries) - 1 <= most:
        return entries
    return [*entries[: 1 + most // 2], gap, *entries[-(most // 2) :]]
