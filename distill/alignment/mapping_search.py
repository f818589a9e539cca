"""What a search for a mapping between two networks found: a grid of figures, and the mapping that is read from it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from distill.alignment.monotone import choose_monotone
from distill.errors import DistillError, did_you_mean
from distill.evaluation.outcome import Outcome, figures_of
from distill.statistics.tables import table_of
from interventions import Location, Picture, Result, label, plain_data, printed

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

Sides = dict[tuple[Location, ...], tuple[Location, ...]]
FIGURES = ("effective", "iia", "normalized", "effect_rate", "do_nothing", "kl", "correlation", "error")
"""What the cells of a search show, the first one by default."""


@dataclass(frozen=True)
class Cells:
    """The figures of every place of a student with every place of its teacher, under one kind of interchange.

    Attributes:
        student, teacher: the places, in the order of rows and of columns.
        outcomes: the figures of each cell, row by row.
    """

    student: tuple[Location, ...]
    teacher: tuple[Location, ...]
    outcomes: tuple[Outcome, ...]

    def __getitem__(self, places: tuple[Location, Location]) -> Outcome:
        """Return the figures of one place of the teacher and one of the student."""
        above, below = places
        return self.outcomes[self.student.index(below) * len(self.teacher) + self.teacher.index(above)]

    def grid(self, figure: str) -> Float[Tensor, "student teacher"]:
        """Return one figure of every cell, by its name; NaN where there is none."""
        values = [value_of(outcome, figure) for outcome in self.outcomes]
        numbers = torch.tensor([float("nan") if each is None else each for each in values], dtype=torch.float64)
        return numbers.reshape(len(self.student), len(self.teacher))

    @property
    def mapping(self) -> Sides:
        """The best place of the teacher for each place of the student that has one (see `MappingSearch`)."""
        scores = [[score_of(self[above, below]) for above in self.teacher] for below in self.student]
        sides: Sides = {}
        for below, column in zip(self.student, choose_monotone(scores), strict=True):
            if column is not None:
                above = (self.teacher[column],)
                sides[above] = (*sides.get(above, ()), below)
        return sides

    def mean_at(self, mapping: Sides, figure: str) -> float | None:
        """Return the mean of a figure over the cells of a mapping; None where none of them has it."""
        cells = ((above, below) for (above,), side in mapping.items() for below in side)
        found = [value for places in cells if (value := value_of(self[places], figure)) is not None]
        return sum(found) / len(found) if found else None


def value_of(outcome: Outcome, figure: str) -> float | None:
    """Return a figure of an outcome, by a name of `FIGURES`; None where there is none."""
    if figure == "iia":
        return None if outcome.iia is None else outcome.iia.value
    if figure == "effective":
        return outcome.effective_iia
    if figure == "normalized":
        return None if outcome.normalized is None else outcome.normalized.value
    found: float | None = getattr(outcome, figure)
    return found


def score_of(outcome: Outcome) -> tuple[float, float] | None:
    """Return what the choice of a mapping compares: effective IIA, then IIA; for real-valued answers minus the error.

    None for a cell that may not be chosen: one without counterfactuals, or where none changes the teacher's answer.
    """
    if outcome.error is not None:
        return -outcome.error, 0.0
    if outcome.iia is None or outcome.effective_iia is None:
        return None
    return outcome.effective_iia, outcome.iia.value


@dataclass(frozen=True, eq=False)
class MappingSearch(Result):
    """The figures of every place of a teacher with every place of its student, and the mapping that is best by them.

    The mapping gives each place of the student one place of the teacher. The places of the teacher do not fall from one
    place of the student to the next, and the sum of the effective IIA of the chosen cells is the greatest under this
    condition, by dynamic programming; among equal sums that of the IIA decides, then the earlier place of the teacher.
    Places of the student that share a place of the teacher are interchanged together. A cell is not chosen if it is
    vacuous, as the last blocks are under a head that reads one token, or if none of its interchanges changes the
    teacher's answer; a place of the student with no other cells has no entry. Of several kinds of interchange the first
    decides; `kinds[name].mapping` is that of another.

    Attributes:
        kinds: {name of a kind of interchange: its cells}.
        controls: {control: the same}: `network` (a student with new weights) and `labels` (the teacher takes the
            sources of other pairs), where they were requested.
        settings: number of pairs, seed, and the like.
    """

    kinds: dict[str, Cells]
    controls: dict[str, dict[str, Cells]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def cells(self) -> Cells:
        """The cells of the first kind of interchange."""
        return next(iter(self.kinds.values()))

    @property
    def mapping(self) -> Sides:
        """The best mapping, {teacher side: student side}, as `fit` and `interchange_accuracy` take it."""
        return self.cells.mapping

    @property
    def notes(self) -> tuple[str, ...]:
        """The remarks that a reader of the figures needs: which places have no entry, and why."""
        notes, cells, mapped = [], self.cells, {at for side in self.mapping.values() for at in side}
        for below in (at for at in cells.student if at not in mapped):
            why = (
                "no interchange changes the teacher's answer"
                if any(cells[above, below].count for above in cells.teacher)
                else "each of its interchanges replaces all that an answer can see, or nothing that it can see"
            )
            notes.append(f"{below} of the student has no entry: {why}.")
        return tuple(notes)

    def grid(self, figure: str = FIGURES[0], kind: str | None = None, control: str | None = None) -> Tensor:
        """Return one figure of every cell, `[student, teacher]`; NaN where there is none.

        Args:
            figure: "effective", "iia", "normalized", "effect_rate", "do_nothing", "kl", "correlation" or "error".
            kind: the name of a kind of interchange; by default the first.
            control: the name of a control; None takes the figures of the student.

        Raises:
            DistillError: a figure, kind or control that does not exist.
        """
        _check_known(figure, FIGURES, "figure")
        if control is not None:
            _check_known(control, tuple(self.controls), "control")
        found = self.kinds if control is None else self.controls[control]
        name = next(iter(found)) if kind is None else kind
        _check_known(name, tuple(found), "kind")
        return found[name].grid(figure)

    def plot(self, figure: str | None = None) -> Picture:
        """Draw a heat map for each kind of interchange, and beside it one for each control.

        Places of the teacher are across, places of the student down. Cells hold the figure; those of the mapping have a
        frame, and those that are left out a cross.

        Args:
            figure: as for `grid`; by default "effective", for real-valued answers "error".

        Raises:
            DistillError: a figure that does not exist, or that no cell has.
        """
        shown = self._default if figure is None else figure
        _check_known(shown, FIGURES, "figure")
        panels = {"": self.kinds, **{f"control: {name}": kinds for name, kinds in self.controls.items()}}
        grids = torch.cat([cells.grid(shown).flatten() for kinds in panels.values() for cells in kinds.values()])
        finite = grids[grids.isfinite()]
        if not len(finite):
            raise DistillError(
                f"there is no cell to draw, as none has the figure {shown}; draw another: plot('iia'), or search with "
                "other positions."
            )
        bounds = (0.0, float(finite.max()) or 1.0 if shown in ("error", "kl") else 1.0)
        size = (1.3 + 0.62 * len(self.cells.teacher), max(2.2, 1.1 + 0.5 * len(self.cells.student)))
        down, across = len(self.kinds), len(panels)
        picture = Picture(figsize=(max(4.2, size[0]) * across, size[1] * down + 0.3), dpi=110, layout="constrained")
        all_axes = picture.subplots(down, across, squeeze=False)
        for column, (heading, kinds) in enumerate(panels.items()):
            for row, (name, cells) in enumerate(kinds.items()):
                title = heading or ("student" if self.controls else "")
                _draw(all_axes[row, column], cells, shown, bounds, cells.mapping if not heading else {})
                both = [title, name] if down > 1 else [title]
                all_axes[row, column].set_title(label(", ".join(filter(None, both))), fontsize=9)
        bar = picture.colorbar(all_axes[0, 0].images[0], ax=all_axes.ravel().tolist(), shrink=0.9, aspect=16)
        bar.set_label(NAMES[shown], fontsize=9)
        bar.outline.set_visible(False)
        return picture

    @property
    def _default(self) -> str:
        """The figure that is shown: the error where there is one, else the effective IIA."""
        outcomes = [each for cells in self.kinds.values() for each in cells.outcomes]
        return "error" if any(each.error is not None for each in outcomes) else FIGURES[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping, every figure and the settings as plain data, for JSON."""

        def plain(kinds: Mapping[str, Cells]) -> dict[str, Any]:
            return {
                name: {
                    "student": list(map(str, cells.student)),
                    "teacher": list(map(str, cells.teacher)),
                    "outcomes": [plain_data(asdict(outcome)) for outcome in cells.outcomes],
                    **{each: plain_data(cells.grid(each)) for each in FIGURES if each != "error"},
                }
                for name, cells in kinds.items()
            }

        return {
            "mapping": mapping_as_text(self.mapping),
            "kinds": plain(self.kinds),
            "controls": {name: plain(kinds) for name, kinds in self.controls.items()},
            "settings": plain_data(self.settings),
            "notes": list(self.notes),
        }

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the figures as a table: a row for each kind, control, and pair of places.

        Raises:
            DistillError: pandas is not installed.
        """
        found = {"": self.kinds, **self.controls}
        rows = (
            {"of": control or "student", "kind": name, "student": str(below), "teacher": str(above)}
            | figures_of(cells[above, below])
            for control, kinds in found.items()
            for name, cells in kinds.items()
            for below in cells.student
            for above in cells.teacher
        )
        return table_of(rows, "of", "kind", "student", "teacher")

    @printed
    def __str__(self) -> str:
        shown, mapping = self._default, self.mapping
        blocks = [_table(cells, shown, cells.mapping, name) for name, cells in self.kinds.items()]
        controls = {name: next(iter(kinds.values())) for name, kinds in self.controls.items()}
        blocks += [_table(cells, shown, {}, f"control: {name}") for name, cells in controls.items()]
        entries = ", ".join(f"{_side(above)} ↔ {_side(below)}" for above, below in mapping.items())
        means = {name: cells.mean_at(mapping, shown) for name, cells in {"student": self.cells, **controls}.items()}
        values = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items() if mean is not None)
        lines = [f"mapping: {entries or 'none'}"]
        lines += [f"{NAMES[shown]} at the mapping, mean over its cells: {values}"] if values else []
        return "\n\n".join([*blocks, "\n".join(lines), *self.notes])


NAMES = {
    "effective": "effective IIA", "iia": "IIA", "normalized": "normalized IIA", "effect_rate": "effect rate",
    "do_nothing": "do nothing", "kl": "KL of counterfactuals [nats]", "correlation": "correlation of shifts",
    "error": "mean absolute error",
}  # fmt: skip


def mapping_as_text(mapping: Mapping[tuple[Location, ...], tuple[Location, ...]]) -> str:
    """Return a mapping as the text that `--mapping` and `parse_mapping` read.

    >>> mapping_as_text({(Location(3),): (Location(1), Location(2))})
    'block_output.3~block_output.1+block_output.2'
    """
    return " ".join(f"{'+'.join(map(str, above))}~{'+'.join(map(str, below))}" for above, below in mapping.items())


def _check_known(name: Any, known: tuple[str, ...], what: str) -> None:
    """Raise DistillError for a name that is none of those known."""
    if name not in known:
        raise DistillError(
            f"{what} {name!r} was not searched{did_you_mean(str(name), known)}; choose of "
            f"{', '.join(map(repr, known)) or 'none, as there are no controls: search_mapping(…, controls=…)'}."
        )


def _draw(axes: Axes, cells: Cells, figure: str, bounds: tuple[float, float], mapping: Mapping[Any, Any]) -> None:
    """Draw one grid, with its numbers, crosses for what is left out, and frames around the cells of a mapping."""
    values = cells.grid(figure)
    image = axes.imshow(values.numpy(), vmin=bounds[0], vmax=bounds[1], aspect="auto", cmap="viridis")
    small = max(len(cells.student), len(cells.teacher)) > 12
    for (row, column), value in zip(
        ((r, c) for r in range(len(cells.student)) for c in range(len(cells.teacher))),
        values.flatten().tolist(),
        strict=True,
    ):
        if value != value:
            axes.plot(column, row, marker="x", color="0.7", markersize=3 if small else 6)
            continue
        red, green, blue, _ = image.to_rgba(value)
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        text = f"{value:.2f}".replace("-", "−")
        axes.text(column, row, text, ha="center", va="center", fontsize=5 if small else 8, color="w" if dark else "0.1")
    for above, below in mapping.items():
        for row in (cells.student.index(at) for at in below if at in cells.student and above[0] in cells.teacher):
            corner = (cells.teacher.index(above[0]) - 0.47, row - 0.47)
            axes.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, edgecolor="#ee6677", linewidth=2))
    axes.set_xticks(range(len(cells.teacher)), [_short(at) for at in cells.teacher], fontsize=8)
    axes.set_yticks(range(len(cells.student)), [_short(at) for at in cells.student], fontsize=8)
    axes.set_xlabel(label(f"teacher, {_site(cells.teacher)}"), fontsize=9)
    axes.set_ylabel(label(f"student, {_site(cells.student)}"), fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_facecolor("0.93")


def _site(places: tuple[Location, ...]) -> str:
    """Return the text that places of layers have in common, without the layer; "place" for others."""
    sites = {at.site for at in places if at.layer is not None}
    return sites.pop() if len(sites) == 1 and all(at.layer is not None for at in places) else "place"


def _short(at: Location) -> str:
    """Return the number of a layer, or the text of a place that is none."""
    return str(at) if at.layer is None else str(at.layer)


def _side(places: tuple[Location, ...]) -> str:
    return " + ".join(map(str, places))


def _table(cells: Cells, figure: str, mapping: Mapping[Any, Any], title: str) -> str:
    """Return one grid as text: IIA with the effective one in brackets, * at the cells of the mapping."""
    what = NAMES["error"] if figure == "error" else "IIA (effective)"
    rows = [[f"student, {_site(cells.student)}", *map(_short, cells.teacher)]]
    for below in cells.student:
        marks = ["*" if below in mapping.get((above,), ()) else " " for above in cells.teacher]
        figures = [_written(cells[above, below]) for above in cells.teacher]
        rows.append([_short(below), *map("".join, zip(figures, marks, strict=True))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
    return "\n".join([f"{title}: {what}; teacher, {_site(cells.teacher)}, across", *lines])


def _written(outcome: Outcome) -> str:
    """Return the figures of a cell as text: IIA and effective IIA, or the error, or a cross where it is left out."""
    if outcome.error is not None:
        return f"{outcome.error:.4g}"
    if outcome.iia is None:
        return "×"
    effective = "–" if outcome.effective_iia is None else f"{outcome.effective_iia:.2f}"
    return f"{outcome.iia.value:.3f} ({effective})"
