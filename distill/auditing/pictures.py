"""The picture of an audit: what each part changes alone, and how the difference grows over the depth."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from distill.auditing.parts import Depth, Part
from distill.auditing.reading import Kind
from distill.auditing.sentences import number
from distill.errors import DistillError
from interventions import Picture, label

DECADES = 1e-4
"""The least divergence that has a color of its own, over the largest."""
COLUMNS = {"attention_output": "attention\nout", "mlp_output": "mlp", "rest of block": "rest"}
LABELS = {"classes": "KL [nats]", "values": "mean difference", "embeddings": "1 − cosine"}
MOST_CELLS = 400
"""The most cells that hold a number."""


def draw_parts(parts: Sequence[Part], depths: Sequence[Depth], kind: Kind) -> Picture:
    """Draw a map of the parts, a row for each block and a column for each part of it, beside the depths.

    Raises:
        DistillError: no part was exchanged.
    """
    if not parts:
        raise DistillError(
            "there is no figure to draw: no part was exchanged; see notes, or give mapping={0: 0, 3: 1}."
        )
    rows, columns = _rows(parts), _columns(parts)
    values = np.full((len(rows), len(columns)), np.nan)
    for part in parts:
        values[rows.index(_row(part)), columns.index(_column(part))] = part.divergence
    wide, deep = max(4.0, 0.55 * len(columns) + 2.2), any(each.layer is not None for each in depths)
    beside = 3.0 if deep else 0.0
    figure = Picture(figsize=(wide + beside, max(2.2, 0.3 * len(rows) + 1.3)), dpi=110, layout="constrained")
    axes = figure.subplots(1, 1 + deep, width_ratios=[wide, beside][: 1 + deep], sharey=True, squeeze=False)[0]
    left = axes[0]
    most = float(np.nanmax(values))
    _draw_map(left, values, most, LABELS[kind])
    left.set_yticks(range(len(rows)), [label(each) for each in rows], fontsize=8)
    left.set_xticks(range(len(columns)), columns, fontsize=7)
    left.set_title("one part of the compressed model in the original", fontsize=9)
    if deep:
        _draw_depths(axes[1], depths, rows, kind)
    return figure


def _draw_map(axes: Axes, values: np.ndarray, most: float, unit: str) -> None:
    """Draw the divergences on a logarithmic scale; 0 is white, and cells without a part are grey."""
    floor = most * DECADES
    shown = np.where(values > 0, np.maximum(values, floor), np.nan)
    axes.set_facecolor("0.92")
    for row, column in np.argwhere(values == 0).tolist():
        axes.fill_between([column - 0.5, column + 0.5], row - 0.5, row + 0.5, color="white", lw=0)
    if most > 0:
        image = axes.imshow(shown, aspect="auto", cmap="YlOrRd", norm=LogNorm(floor, most), interpolation="nearest")
        bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=24)
        bar.set_label(unit, fontsize=8)
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
    height, width = values.shape
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if values.size > MOST_CELLS:
        return
    for row, column in np.argwhere(np.isfinite(values)).tolist():
        value = float(values[row, column])
        dark = most > 0 and value > most * 0.02
        text = number(value) if value == 0 or value >= 0.01 else f"{value:.0e}".replace("e-0", "e-")
        axes.text(column, row, text, ha="center", va="center", fontsize=6, color="w" if dark else "0.25")


def _draw_depths(axes: Axes, depths: Sequence[Depth], rows: list[str], kind: Kind) -> None:
    """Draw how far both models are apart after each block, and at the end."""
    for stack in dict.fromkeys(each.stack for each in depths if each.layer is not None):
        mine = [each for each in depths if each.layer is not None and each.stack == stack]
        places = [rows.index(_block(each.stack, each.layer)) for each in mine]
        axes.plot([each.divergence for each in mine], places, "o-", color="#4477aa", ms=3, lw=1)
    answers = [each.divergence for each in depths if each.layer is None]
    for value in answers:
        axes.axvline(value, color="#ee6677", ls="--", lw=1)
        axes.annotate(
            "answers", (value, 0), (-3, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
            fontsize=7, color="#ee6677", ha="right", va="bottom",
        )  # fmt: skip
    axes.set_title("apart after each block", fontsize=9)
    axes.set_xlabel(LABELS[kind], fontsize=8)
    axes.set_xlim(0, 1.08 * max(each.divergence for each in depths) or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _block(stack: str | None, layer: int | None) -> str:
    return f"{'' if stack is None else stack + ' '}block {layer}"


def _row(part: Part) -> str:
    """Return the name of the row of a part: its block, or what it is."""
    if part.layer is not None:
        return _block(part.stack, part.layer)
    return part.name.removeprefix("module:")


def _rows(parts: Sequence[Part]) -> list[str]:
    """Return the names of the rows, from the first part that runs to the last."""
    return list(dict.fromkeys(_row(part) for part in parts))


def _column(part: Part) -> str:
    if part.head is not None:
        return f"head\n{part.head}"
    return COLUMNS.get(part.site, "whole")


def _columns(parts: Sequence[Part]) -> list[str]:
    heads = sorted({part.head for part in parts if part.head is not None})
    others = [title for title in COLUMNS.values() if title in {_column(part) for part in parts}]
    return ["whole", *(f"head\n{head}" for head in heads), *others]
