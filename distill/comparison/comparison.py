"""The result of a comparison of students, which prints and plots itself, and says in a sentence what it found."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from distill.comparison import picture, sentence
from distill.comparison.compared_figure import LABELS, MEANS, OVERALL, WITHOUT, ComparedFigure
from distill.errors import DistillError
from distill.evaluation.interchange_accuracy import MAPPED
from distill.statistics.intervals import Estimate, signed
from distill.statistics.mcnemar import Discordance
from distill.statistics.tables import table_of
from interventions import Picture, Result, plain_data, printed

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

WIDTH = 24
"""Of a column with a figure and its interval."""


@dataclass(frozen=True)
class Comparison(Result):
    """Students of one teacher compared over the same rows and pairs; the others are compared with the first one.

    Attributes:
        figures: of every student, kind and entry, with their differences to the first student.
        runs: how many runs each student has, by its name, in order.
        discordance: McNemar's test of the accuracies, of every student but the first: for each run, as they are paired.
        settings: the number of pairs, the seed, what pairs share, how many were counted of each kind.
    """

    figures: tuple[ComparedFigure, ...]
    runs: dict[str, int]
    discordance: dict[str, tuple[Discordance, ...]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def students(self) -> tuple[str, ...]:
        """The names of the students; the first one is what the others are compared with."""
        return tuple(self.runs)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of interchange that were compared, the mapped one first."""
        found = dict.fromkeys(each.kind for each in self.figures)
        return tuple(kind for kind in found if kind not in (WITHOUT, *MEANS))

    def find(self, figure: str, student: str, kind: str = MAPPED, entry: str = OVERALL) -> ComparedFigure | None:
        """Return a figure of a student with its difference to the first; None where it is not defined.

        Args:
            figure: "effective", "iia", "normalized", "kl", "correlation", "error", or of the rows as they are
                "accuracy", "agreement", "base_kl".
            student: its name.
            kind: the kind of interchange.
            entry: the entry of the mapping, as text.

        Raises:
            DistillError: a name of a figure or of a student that is none.
        """
        if figure not in LABELS or student not in self.runs:
            raise DistillError(
                f"the comparison has no {figure!r} of {student!r}; its figures are {', '.join(LABELS)} and its "
                f"students {', '.join(self.students)}: comparison.find('effective', {self.students[-1]!r})."
            )
        kind = WITHOUT if figure in ("accuracy", "agreement", "base_kl") else kind
        wanted = (figure, kind, entry, student)
        return next((e for e in self.figures if (e.figure, e.kind, e.entry, e.student) == wanted), None)

    @property
    def sentences(self) -> dict[str, str]:
        """Sentences of what was found, for every student but the first, made from the figures."""
        first, *others = self.students
        seeds = {name: sentence.seeds_of(self.runs[first], self.runs[name]) for name in others}
        return {name: sentence.sentence_of(self.figures, first, name, seeds[name]) for name in others}

    @property
    def sentence(self) -> str:
        """The sentences of what was found, for every student but the first."""
        return " ".join(self.sentences.values())

    @property
    def notes(self) -> tuple[str, ...]:
        """The remarks that a reader of the figures needs."""
        first, *others = self.students
        notes = []
        single = [name for name in self.students if self.runs[name] == 1]
        if single:
            whose = "each student" if len(single) == len(self.students) else " and ".join(single)
            notes.append(
                f"One training of {whose}: its intervals are about other rows and pairs, not about other seeds; of "
                "several, give a list."
            )
        unpaired = [name for name in others if self.runs[name] != self.runs[first]]
        notes += [
            f"{name} has {self.runs[name]} runs and {first} has {self.runs[first]}: they are compared by their means "
            "(Welch), not run by run."
            for name in unpaired
        ]
        notes += [
            f"McNemar's test of {name} (rows as if independent): {'; '.join(map(str, found))}."
            for name, found in self.discordance.items()
            if found
        ]
        notes += [
            f"{kind}: no interchange changed the teacher's answer."
            for kind in self.kinds
            if self.find("effective", first, kind) is None and self.find("iia", first, kind) is not None
        ]
        why = "every interchange is left out for one student or another"
        if self.settings.get("effective_only"):
            why = "no pair was found that changes the teacher's answer"
            notes.append(
                "Agreement and KL to the teacher are over the bases of effective pairs alone, and not of all rows."
            )
        counted = self.settings.get("counted", {})
        notes += [f"{kind}: no figures: {why}." for kind, count in counted.items() if not count]
        notes += [f"{kind}: not measured: {why}" for kind, why in self.settings.get("missing", {}).items()]
        return tuple(notes)

    def to_dict(self) -> dict[str, Any]:
        """Return the sentences, all figures, McNemar's tests, the settings and the notes as plain data, for JSON."""
        figures = [asdict(each) | {"sd": each.value.sd, "difference_sd": _sd(each)} for each in self.figures]
        return plain_data(
            {
                "sentences": self.sentences,
                "runs": self.runs,
                "figures": figures,
                "discordance": {name: [asdict(each) for each in found] for name, found in self.discordance.items()},
                "settings": self.settings,
                "notes": list(self.notes),
            }
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """Return all figures as a table: a row for each figure, kind, entry and student.

        `low` and `high` are the interval of the value, `difference`, `difference low` and `difference high` that of the
        difference to the first student; `sd` and `difference sd` are over runs.

        Raises:
            DistillError: pandas is not installed.
        """
        return table_of(map(_row, self.figures), "figure", "kind", "entry", "student")

    def plot(self) -> Picture:
        """Draw a dot plot: the kinds of interchange and the students, with their intervals, and their differences.

        Raises:
            DistillError: no figure is defined.
        """
        return picture.dot_plot(self.figures, self.students)

    @printed
    def __str__(self) -> str:
        return "\n\n".join([*self.sentences.values(), *_tables(self), *_of_sample(self), *self.notes])


def _tables(comparison: Comparison) -> list[str]:
    """Return the table of differences and that of the figures; none where nothing was compared."""
    first, *others = comparison.students
    rows = list(_table_rows(comparison))
    if not rows:
        return []
    label = max(len(heading) for heading, _, _ in rows) + 1
    differences = [("", [f"{name} − {first}" for name in others])]
    values = [("", list(comparison.students))]
    for heading, figure, kind in rows:
        found = {name: comparison.find(figure, name, kind) for name in comparison.students} if figure else {}
        differences.append((heading, [_difference_cell(found.get(name)) for name in others]))
        if kind not in MEANS:
            values.append((heading, [_cell(found.get(name)) for name in comparison.students]))

    def line(heading: str, cells: list[str]) -> str:
        return (f"{heading:{label}}" + "".join(f"{cell:{WIDTH}}" for cell in cells)).rstrip()

    return ["\n".join(line(*row) for row in table) for table in (differences, values)]


def _table_rows(comparison: Comparison) -> Iterator[tuple[str, str, str]]:
    """Yield the rows of the printed table: what they are called, the figure and the kind; headings have no figure."""
    first, last = comparison.students[0], comparison.students[-1]
    for figure in ("accuracy", "agreement", "base_kl"):
        if comparison.find(figure, first) is not None:
            yield LABELS[figure], figure, WITHOUT
    for figure in ("effective", "error"):
        kinds = [kind for kind in comparison.kinds if comparison.find(figure, first, kind) is not None]
        if kinds:
            yield LABELS[figure], "", ""
            yield from ((f"  {kind}", figure, kind) for kind in kinds)
            if len(kinds) > 1:
                means = (kind for kind in MEANS if comparison.find(figure, last, kind) is not None)
                yield from ((f"  {kind}", figure, kind) for kind in means)


def _cell(found: ComparedFigure | None) -> str:
    """Return a figure as text, with a star where the student was trained on the kind."""
    if found is None:
        return ""
    value, low, high = (f"{each:.3f}".replace("-0.000", "0.000") for each in vars(found.value.estimate).values())
    return f"{value} [{low}, {high}]{' *' if found.trained else ''}"


def _difference_cell(found: ComparedFigure | None) -> str:
    """Return a difference as text."""
    return "" if found is None or found.difference is None else signed(found.difference.estimate)


def _of_sample(comparison: Comparison) -> list[str]:
    """Return what the figures are over, as a sentence."""
    shared = comparison.settings.get("shared")
    if not shared:
        return []
    *most, last = (f"{count:,} {name}" for name, count in shared.items())
    effective = " whose interchange changes the teacher's answer" if comparison.settings["effective_only"] else ""
    star = " * trained on this kind." if any(each.trained for each in comparison.figures) else ""
    return [
        f"{comparison.settings['pairs']:,} pairs{effective}, of {', '.join(most)} and {last}, the same for all "
        "students. Intervals are at 95 %, and pairs that share one of these do not count as independent."
        f"{star} IIA, normalized IIA, KL, correlations and single entries: to_pandas()."
    ]


def _sd(found: ComparedFigure) -> float | None:
    return None if found.difference is None else found.difference.sd


def _row(found: ComparedFigure) -> dict[str, Any]:
    """Return a figure as a row of a table."""
    difference = found.difference
    return {
        **{name: getattr(found, name) for name in ("figure", "kind", "entry", "student")},
        **_named(found.value.estimate, "value", "low", "high"),
        "sd": found.value.sd,
        **_named(
            None if difference is None else difference.estimate, "difference", "difference low", "difference high"
        ),
        "difference sd": _sd(found),
    }


def _named(estimate: Estimate | None, value: str, low: str, high: str) -> dict[str, float | None]:
    """Return an estimate as columns of these names."""
    found = (None,) * 3 if estimate is None else (estimate.value, estimate.low, estimate.high)
    return dict(zip((value, low, high), found, strict=True))
