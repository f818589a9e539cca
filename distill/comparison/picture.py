"""The picture of a comparison: a dot plot of the kinds of interchange and the students, with their intervals."""

from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.layout_engine import ConstrainedLayoutEngine

from distill.comparison.compared_figure import LABELS, MEANS, OVERALL, WITHOUT, ComparedFigure
from distill.errors import DistillError
from distill.statistics.over_runs import OverRuns
from interventions import Picture, label

COLORS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44", "#66ccee")
MARKS = "osD^vP"
NAMED = {"accuracy": "accuracy", "agreement": "agreement"}
Row = tuple[str, list[ComparedFigure]]


def dot_plot(figures: Sequence[ComparedFigure], students: Sequence[str]) -> Picture:
    """Draw the figures of students on the left, and their differences to the first on the right, a row for each kind.

    Args:
        figures: those of a comparison.
        students: the names, the first one that which others are compared with.

    Raises:
        DistillError: no figure is defined.
    """
    overall = [each for each in figures if each.entry == OVERALL]
    name = next((each for each in ("effective", "iia", "error") if any(f.figure == each for f in overall)), None)
    if name is None:
        raise DistillError(
            "there is no figure to draw: no counterfactual was counted; map places that lie between input and output: "
            "{Location(2): Location(1)}."
        )
    blocks = [(rows, title) for rows, title in _blocks(overall, name) if rows]
    heights = [len(rows) + 0.9 for rows, _ in blocks]
    size = (9, 1.0 + 0.36 * sum(heights) + 0.35 * len(blocks))
    figure = Picture(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    grid = figure.subplots(len(blocks), 2, squeeze=False, sharey="row", height_ratios=heights, width_ratios=(1.15, 1))
    for (left, right), (rows, title) in zip(grid, blocks, strict=True):
        _draw(left, rows, students, differences=False)
        _draw(right, rows, students, differences=True)
        left.set(xlabel=title)
        right.set(xlabel=f"{title}: difference to {label(students[0])}")
        _name_rows(left, rows)
    lines, labels = grid[-1][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=min(4, len(students)), frameon=False)
    return figure


def _blocks(figures: Sequence[ComparedFigure], name: str) -> Iterator[tuple[list[Row], str]]:
    """Yield the rows of each block with the title of its axis."""
    yield [(text, found) for each, text in NAMED.items() if (found := _of(figures, each, WITHOUT))], "share of rows"
    kinds = dict.fromkeys(each.kind for each in figures if each.figure == name)
    single = len(set(kinds) - set(MEANS)) < 2
    yield [(kind, _of(figures, name, kind)) for kind in kinds if not (single and kind in MEANS)], LABELS[name]


def _of(figures: Sequence[ComparedFigure], name: str, kind: str) -> list[ComparedFigure]:
    return [each for each in figures if each.figure == name and each.kind == kind]


def _draw(axes: Any, rows: Sequence[Row], students: Sequence[str], *, differences: bool) -> None:
    """Draw a dot with its interval for each row and student, and a small line for each of several runs."""
    first = int(differences)
    apart = 0.5 / max(2, len(students) - first)
    for number, student in enumerate(students):
        color, mark = COLORS[number % len(COLORS)], MARKS[number % len(MARKS)]
        shift = (number - first - (len(students) - first - 1) / 2) * apart
        name: str | None = label(student)
        for y, (_, found) in enumerate(rows):
            one = _drawn(found, student, differences)
            if one is None:
                continue
            at, estimate = y + shift, one.estimate
            runs = one.runs if len(one.runs) > 1 else ()
            axes.plot(runs, [at] * len(runs), "|", color=color, markersize=9, markeredgewidth=1.2, zorder=2)
            axes.plot([estimate.low, estimate.high], [at, at], color=color, linewidth=1.6, zorder=2)
            axes.plot(
                estimate.value, at, mark, color=color, markersize=6.5, zorder=3,
                markeredgecolor="white", markeredgewidth=0.6, label=name,
            )  # fmt: skip
            name = None
    if differences:
        axes.axvline(0, color="#555555", linewidth=1, zorder=1)
    for y in range(1, len(rows)):
        axes.axhline(y - 0.5, color="#bbbbbb" if rows[y][0] in MEANS else "#eeeeee", linewidth=0.8, zorder=0)
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _drawn(found: Sequence[ComparedFigure], student: str, differences: bool) -> OverRuns | None:
    """Return what is drawn of a student in a row; of the mean of kinds the difference alone."""
    one = next((each for each in found if each.student == student), None)
    if one is None or differences:
        return None if one is None else one.difference
    return None if one.kind in MEANS else one.value


def _name_rows(axes: Any, rows: Sequence[Row]) -> None:
    """Write what the rows are; kinds that a student was trained on are bold, with a star."""
    trained = [any(each.trained for each in found) for _, found in rows]
    names = [label(name) + (" *" if star else "") for (name, _), star in zip(rows, trained, strict=True)]
    axes.set_yticks(range(len(rows)), names)
    for text, star in zip(axes.get_yticklabels(), trained, strict=True):
        text.set_fontweight("bold" if star else "normal")
