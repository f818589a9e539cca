"""Heat maps: figures that notebooks show, made without matplotlib's global state (pyplot)."""

import io
import math
import textwrap
from collections.abc import Sequence
from math import isfinite

import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.names import label as label_of
from interventions.names import token_label
from interventions.renames import renamed

LARGEST = 14.0  # width and height of the cells together [inch]
SMALLEST_NUMBER, SMALLEST_LABEL = 0.28, 0.16  # cells [inch] that hold a number, and that hold a line of text


class Picture(Figure):
    """A matplotlib figure that notebooks show, whether pyplot is imported or not."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=self.dpi)
        return buffer.getvalue()


@renamed(centre="center")
@checked
def heat_map(
    values: Float[Tensor, "rows columns"],
    rows: Sequence[object],
    columns: Sequence[object],
    *,
    label: str = "",
    column_label: str = "",
    center: float | None = None,
    texts: Sequence[Sequence[object]] | None = None,
    blank: Bool[Tensor, "_ _"] | None = None,
) -> Picture:
    """Draw a grid of numbers as colors, first row at the top; cells that are not finite are empty, with a cross.

    Args:
        values: `[rows, columns]`, the numbers.
        rows: the names of the rows.
        columns: the names of the columns.
        label: the quantity with its unit, written at the color bar.
        column_label: what the columns stand for, written below them.
        center: the number drawn in white, with one color above and another below it; None for one color scale.
        texts: the text of each cell, `[rows][columns]`; None writes the numbers.
        blank: `[rows, columns]`, true for cells that stay white, without a number: those beyond a causal mask.

    Returns:
        A matplotlib figure.

    Raises:
        InterventionError: another number of names, or of texts, than of rows or columns.

    >>> import torch
    >>> heat_map(torch.eye(2), ["a", "b"], [0, 1], label="probability").axes[0].get_xticks().tolist()
    [0, 1]
    """
    _check_center(center)
    names, ticks = [label_of(row) for row in rows], [label_of(column) for column in columns]
    if (len(names), len(ticks)) != tuple(values.shape):
        raise InterventionError(
            f"{len(names)} row names and {len(ticks)} column names were given for values of shape "
            f"{list(values.shape)}; give one name each."
        )
    if not values.numel():
        raise InterventionError(
            f"values of shape {list(values.shape)} have no cell to draw; give at least one row and one column: "
            "heat_map(torch.zeros(1, 1), ['a'], ['b'])."
        )
    cells = _texts_of(texts, values)
    numbers = values.detach().cpu().double()
    hidden = torch.zeros_like(numbers, dtype=torch.bool) if blank is None else _blank_of(blank, values)
    numbers = numbers.masked_fill(hidden, math.nan)
    longest = max((len(text) for row in cells or [] for text in row), default=0)
    wide, high = (_cell(len(names), most) for names, most in ((columns, max(0.42, 0.07 * longest)), (rows, 0.34)))
    upright = max(map(len, ticks)) <= 3
    below = 0.35 if upright else 0.08 * min(max(map(len, ticks)), 24) + 0.3
    width = max(wide * len(ticks), 0.9) + 0.085 * max(map(len, names)) + 1.5
    height = max(high * len(names) + below + 0.45, 1.9)
    figure = Picture(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.imshow(numbers.numpy(), aspect="auto", interpolation="nearest", **_colors(numbers, center))
    every, each = (math.ceil(SMALLEST_LABEL / size) for size in (wide, high))
    axes.set_xticks(range(0, len(ticks), every), ticks[::every])
    if not upright:
        for text in axes.get_xticklabels():
            text.set(rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(0, len(names), each), names[::each])
    axes.tick_params(length=0, labelsize=8)
    axes.set_xlabel(label_of(column_label), fontsize=9)
    axes.spines[:].set_visible(False)
    axes.set_facecolor("0.93")
    _write_cells(axes, numbers, hidden, cells, with_numbers=min(wide, high) >= SMALLEST_NUMBER)
    _color_bar(axes, numbers, label, height)
    return figure


def _cell(count: int, most: float) -> float:
    """Return the size of a cell [inch]: at most `most`, and smaller where there are many."""
    return min(most, max(LARGEST / count, 0.05))


def _check_center(center: float | None) -> None:
    if center is not None and not isfinite(center):
        raise InterventionError(f"center={center} is no place on a scale; write center=0.0, or None for no middle.")


def _colors(numbers: Tensor, center: float | None) -> dict:
    low, high = _range(numbers)
    if center is None:
        return dict(cmap="viridis", norm=Normalize(low, high) if high > low else Normalize(low - 0.5, low + 0.5))
    reach = max(abs(low - center), abs(high - center)) or 1.0
    return dict(cmap="RdBu_r", norm=CenteredNorm(center, reach))


def _color_bar(axes: Axes, numbers: Tensor, label: str, height: float) -> None:
    """Add a color bar that spans the numbers that occur, as a signed metric may lie on one side of 0 only."""
    shrink = min(1.0, 4 / height)
    bar = axes.figure.colorbar(axes.images[0], ax=axes, pad=0.02, shrink=shrink, anchor=(0.0, 1.0), aspect=16)
    # A label that is longer than the bar is high is wrapped.
    lines = textwrap.wrap(label_of(label), max(14, int(height * shrink * 11)))
    bar.set_label("\n".join(lines), fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    low, high = _range(numbers)
    if high > low:
        bar.ax.set_ylim(low, high)
    else:
        bar.set_ticks([low])


def _range(numbers: Tensor) -> tuple[float, float]:
    finite = numbers[numbers.isfinite()]
    return (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 1.0)


def _texts_of(texts: Sequence[Sequence[object]] | None, values: Tensor) -> list[list[str]] | None:
    """Return the texts of the cells as a picture shows them; None for numbers."""
    if texts is None:
        return None
    cells = [[token_label(text) for text in row] for row in texts]
    if [len(row) for row in cells] != [values.shape[1]] * len(values):
        raise InterventionError(
            f"texts has rows of {sorted({len(row) for row in cells})} texts, {len(cells)} in all, for values of shape "
            f"{list(values.shape)}; give one text for each cell."
        )
    return cells


def _blank_of(blank: Tensor, values: Tensor) -> Tensor:
    """Return which cells stay white, on the host."""
    if blank.shape != values.shape:
        raise InterventionError(
            f"blank has shape {list(blank.shape)} and the values {list(values.shape)}; give one flag for each cell."
        )
    return blank.detach().cpu()


def _write_cells(
    axes: Axes, numbers: Tensor, hidden: Tensor, cells: list[list[str]] | None, *, with_numbers: bool
) -> None:
    for row, column in (~numbers.isfinite()).nonzero().tolist():
        if hidden[row, column]:
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color="w", linewidth=0))
        else:
            axes.plot(column, row, marker="x", color="0.7", markersize=5 if with_numbers else 2)
    colors = axes.images[0].to_rgba(numbers.numpy())
    for row, column in numbers.isfinite().nonzero().tolist() if with_numbers else ():
        red, green, blue, _ = colors[row, column]
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        text = _short(float(numbers[row, column])) if cells is None else cells[row][column]
        axes.text(column, row, text, ha="center", va="center", fontsize=6, color="w" if dark else "0.15")


def _short(value: float) -> str:
    """Format a number for a cell; what is 0 in two digits has no sign."""
    text = f"{round(value, 2) + 0.0:.2f}" if abs(value) < 10 else f"{value:.3g}"
    return text.replace("-", "−")
