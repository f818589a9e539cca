"""The result of a measurement of interchange accuracy, which prints, plots and saves itself."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from distill.errors import DistillError
from distill.evaluation.outcome import Outcome, figures_of
from distill.statistics.tables import table_of
from interventions import Picture, Result, label, plain_data, printed

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

Rows = list[tuple[str, Outcome]]
COLUMNS = {"IIA": 20, "effective": 20, "normalized": 10, "effect": 6, "do nothing": 10, "replace all": 11, "KL": 5}
COLUMNS |= {"shifts": 6}
"""The headings of the table, with the widths of their columns."""


@dataclass(frozen=True)
class InterchangeAccuracy(Result):
    """The interchange intervention accuracy of a student under a mapping: overall, and for each entry.

    Attributes:
        overall: the figures of all entries together.
        per_pair: the figures of each entry, by its text.
        settings: the number of pairs, the rules of sources and positions, the seed, and what pairs share: the numbers
            of different bases, sources and clusters.
        controls: the overall figures of `subspace` (random ones of the same size), `labels` (the teacher takes the
            sources of other pairs) and `network` (a student with new weights).
        overlap: the share of the bases that were trained on; None where it is not known.
        kinds: the same of other kinds of interchange, by their names.
        trained: whether the student was trained on interchanges of this kind; None where it is not known.
    """

    overall: Outcome
    per_pair: dict[str, Outcome]
    settings: dict[str, Any]
    controls: dict[str, Outcome] = field(default_factory=dict)
    overlap: float | None = None
    kinds: "dict[str, InterchangeAccuracy]" = field(default_factory=dict)
    trained: bool | None = None

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "InterchangeAccuracy":
        """Build an interchange accuracy from what `to_dict` returned, also in an earlier version."""
        return cls(
            Outcome.of(saved["overall"]),
            {name: Outcome.of(each) for name, each in saved["per_pair"].items()},
            saved["settings"],
            {name: Outcome.of(each) for name, each in saved["controls"].items()},
            saved["overlap"],
            {name: cls.of(each) for name, each in saved.get("kinds", {}).items()},
            saved.get("trained"),
        )

    def marked(self, trained: Collection[str] | None) -> "InterchangeAccuracy":
        """Return the same with each kind marked by whether it was trained on.

        Args:
            trained: the kinds as text, as `FitResult.settings["kinds"]` has them; None where they are not known.
        """
        kinds = {name: each.marked(trained) for name, each in self.kinds.items()}
        kind = self.settings.get("kind")
        was_trained = None if trained is None or kind is None else kind in trained
        return replace(self, kinds=kinds, trained=was_trained)

    @property
    def iia(self) -> float | None:
        """The interchange intervention accuracy over all entries; None for regression."""
        return None if self.overall.iia is None else self.overall.iia.value

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of `iia`."""
        share = self.overall.iia
        return None if share is None else (share.low, share.high)

    @property
    def notes(self) -> tuple[str, ...]:
        """The remarks that a reader of the figures needs: what was left out, not measured, or trained on."""
        notes = [note for name, outcome in self.per_pair.items() for note in _remarks(name, outcome)]
        lacking = {kind: each.overall for kind, each in self.kinds.items() if each.overall.left_out}
        if lacking:
            counts = (f"{kind} {each.left_out} of {each.left_out + each.count}" for kind, each in lacking.items())
            notes.append(f"Left out of other kinds, for the same reason: {', '.join(counts)}.")
        notes += [
            f"{kind}: none of {each.overall.tried} pairs that were tried changes the teacher's answer."
            if each.overall.tried
            else f"{kind}: no interchange can be seen there, so no pair was looked for."
            for kind, each in self.kinds.items()
            if each.overall.tried is not None and not each.overall.count + each.overall.left_out
        ]
        notes += [f"{kind}: not measured: {why}" for kind, why in self.settings.get("missing", {}).items()]
        if self.overlap is not None:
            notes.append(f"{self.overlap:.1%} of the bases were trained on.")
        return tuple(notes)

    @property
    def sample(self) -> str:
        """The sample of the figures and their intervals, as a sentence; empty where it is not known."""
        if "shared" not in self.settings:
            return ""
        effective = " for each entry, whose interchange changes the teacher's answer," if self.overall.tried else ""
        return (
            f"{self.settings['pairs']:,} pairs{effective} of {_shared(self.settings['shared'])}. Intervals are at "
            "95 %, and pairs that share one of these do not count as independent."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures of all pairs, controls and kinds, the settings and the notes as plain data, for JSON."""
        return plain_data(asdict(self) | {"notes": list(self.notes)})

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the figures as a table: a row for each pair of the mapping, all of them, each control, each kind.

        Raises:
            DistillError: pandas is not installed.
        """
        return table_of(({"entry": name, **figures_of(outcome)} for name, outcome in self._rows()), "entry")

    def _rows(self) -> Rows:
        """Return the figures of entries, of all together, of the controls and of other kinds, by their headings."""
        controls = [(f"control: {name}", outcome) for name, outcome in self.controls.items()]
        kinds = [(f"kind: {name}", accuracy.overall) for name, accuracy in self.kinds.items()]
        return [*self.per_pair.items(), ("overall", self.overall), *controls, *kinds]

    def plot(self) -> Picture:
        """Draw the accuracy of each entry of the mapping, of the controls and of other kinds, with both baselines.

        Raises:
            DistillError: no counterfactual was counted.
        """
        rows = [(name, each, each.iia) for name, each in self._rows() if each.iia is not None]
        if not rows:
            return self._errors()
        figure = Picture(figsize=(8, 1.1 + 0.4 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for y, (name, outcome, share) in enumerate(rows):
            color = "#bbbbbb" if name.startswith("control") else "#88aacc" if name.startswith("kind") else "#4477aa"
            axes.barh(y, share.value, color=color, height=0.6, label="IIA" if y == 0 else None)
            axes.plot([share.low, share.high], [y, y], color="black", label="95 % interval" if y == 0 else None)
            axes.plot([outcome.do_nothing or 0], [y], "o", color="#ee6677", label="do nothing" if y == 0 else None)
            axes.plot([outcome.replace_all or 0], [y], "s", color="#ccbb44", label="replace all" if y == 0 else None)
        axes.set(
            yticks=range(len(rows)),
            yticklabels=[label(name) for name, *_ in rows],
            xlim=(0, 1),
            xlabel="share of counterfactuals",
        )
        axes.invert_yaxis()
        figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="small")
        return figure

    def _errors(self) -> Picture:
        """Draw the errors of real-valued answers as bars."""
        rows = [(name, each.error) for name, each in self._rows() if each.error is not None]
        if not rows:
            raise DistillError(
                "there is no figure to draw: no counterfactual was counted; map places that lie between input and "
                "output: {Location(2): Location(1)}."
            )
        figure = Picture(figsize=(8, 1.1 + 0.4 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(rows)), [error for _, error in rows], color="#4477aa", height=0.6)
        axes.set(yticks=range(len(rows)), yticklabels=[label(name) for name, _ in rows], xlabel="mean absolute error")
        axes.invert_yaxis()
        return figure

    @printed
    def __str__(self) -> str:
        own = [*self.per_pair.items(), ("overall", self.overall)]
        own += [(f"control: {name}", outcome) for name, outcome in self.controls.items()]
        width = max(len(name) for name, _ in [*own, *((name, each.overall) for name, each in self.kinds.items())])
        parts = [*_table(own, width, self.overall), *_of_base(self.overall)]
        for heading, trained in (("kinds trained on", True), ("kinds not trained on", False), ("other kinds", None)):
            found = [(name, each.overall) for name, each in self.kinds.items() if each.trained is trained]
            parts += [f"{heading}:\n" + "\n".join(_lines(found, width))] if found else []
        return "\n\n".join([*parts, *([self.sample] if self.sample else []), *self.notes])


def _table(rows: Rows, width: int, overall: Outcome) -> Iterable[str]:
    """Return the table of several rows; of real-valued answers, lines of their errors."""
    if overall.iia is None:
        yield "\n".join(f"{name}: {_error(outcome)}" for name, outcome in rows)
        return
    heading = "  ".join([" " * width, *(f"{name:{size}}" for name, size in COLUMNS.items())]).rstrip()
    yield "\n".join([heading, *_lines(rows, width)])


def _lines(rows: Rows, width: int) -> list[str]:
    """Return a line of figures for each row."""
    return [f"{name:{width}}  {_figures(outcome)}".rstrip() for name, outcome in rows]


def _figures(outcome: Outcome) -> str:
    """Return the figures of an outcome as text, below the headings of `COLUMNS`."""
    if outcome.iia is None:
        return "left out" if outcome.error is None else _error(outcome)
    cells = (
        str(outcome.iia),
        _number(outcome.effective_iia) if outcome.effective is None else str(outcome.effective),
        _number(None if outcome.normalized is None else outcome.normalized.value),
        *map(_number, (outcome.effect_rate, outcome.do_nothing, outcome.replace_all, outcome.kl, outcome.correlation)),
    )
    return "  ".join(f"{cell:{size}}" for cell, size in zip(cells, COLUMNS.values(), strict=True))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _of_base(outcome: Outcome) -> list[str]:
    """Return the line about the answers to the bases, where no interchange is made."""
    if outcome.agreement is None:
        return []
    divergence = "" if outcome.base_kl is None else f", KL {outcome.base_kl:.3f}"
    return [f"without an interchange, both answer alike on {outcome.agreement} of the bases{divergence}."]


def _remarks(name: str, outcome: Outcome) -> Iterable[str]:
    """Return what a reader has to know about the figures of one entry."""
    if outcome.left_out:
        total = outcome.left_out + outcome.count
        yield (
            f"{name}: {outcome.left_out} of {total} counterfactuals replace all that an output can see, or "
            "nothing that it can see; they say nothing about computation and are left out."
        )
    if outcome.as_source == 1.0:
        yield (
            f"{name}: every swap gave what the network answers to the source, so the answers depend on nothing "
            "else there; any variable that decides the answer would fit."
        )
    if outcome.tried == 0:
        yield f"{name}: no interchange can be seen there, so no pair was looked for."
    elif outcome.tried is not None:
        found = outcome.count + outcome.left_out
        yield f"{name}: {found} pairs that change the teacher's answer, of {outcome.tried} tried."


def _shared(counts: Mapping[str, int]) -> str:
    """Return how many different things the pairs are made of, as text."""
    *first, last = (f"{count:,} {name}" for name, count in counts.items())
    return f"{', '.join(first)} and {last}"


def _error(outcome: Outcome) -> str:
    """Return the error of real-valued answers as text."""
    if outcome.error is None:
        return "left out"
    moved = "" if outcome.correlation is None else f", correlation of shifts {outcome.correlation:.3f}"
    return f"mean absolute error {outcome.error:.4g}{moved} ({outcome.count} counterfactuals)"
