"""The figures of a measurement of interchange accuracy, with their table and their picture."""

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.errors import DistillError
from distill.evaluation.intervals import Share, bootstrap
from distill.evaluation.tables import table_of
from interventions import Picture, Result, label, plain_data, printed

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

SUMS = ("total", "agree", "effect", "agree_on_effect", "do_nothing", "replace_all", "divergence", "error", "as_source")


@dataclass(frozen=True, eq=False)
class Tally:
    """Sums over the predictions of each pair of examples and entry of the mapping, by the names in `SUMS`.

    A total of 0 stands for a counterfactual that is left out. The last sum exists under causal models alone.

    Attributes:
        sums: in the order of `SUMS`.
        regression: whether the answers are real-valued, so that only the error is summed.
    """

    sums: Float[Tensor, "pairs entries sums"]
    regression: bool = False

    def __getitem__(self, name: str) -> Float[Tensor, "pairs entries"]:
        return self.sums[:, :, SUMS.index(name)]

    @property
    def kept(self) -> Bool[Tensor, "pairs entries"]:
        """The counterfactuals that are not left out."""
        return self["total"] > 0

    def of(self, *entries: int) -> "Tally":
        """Return the sums of some of the entries."""
        return replace(self, sums=self.sums[:, list(entries)])


@dataclass(frozen=True)
class Outcome:
    """The figures of one entry of the mapping, or of all entries together.

    Attributes:
        iia: the share of counterfactuals on which the student answers as the teacher does, with its 95 % interval from
            a bootstrap over base examples. None for regression.
        effect_rate: the share on which the teacher's answer is another than on the base.
        effective_iia: `iia` on those alone; None if there are none.
        do_nothing: the `iia` of the student's answers to the base: of a student that ignores interchanges.
        replace_all: the `iia` of the student's answers to the source: of a student that runs the source instead.
        kl: KL(teacher ‖ student) of the counterfactual answers [nats]; None for regression.
        error: for regression, the mean absolute difference of the counterfactual predictions.
        count: how many counterfactuals were counted.
        left_out: how many were not: they replace everything that the output depends on, or nothing of it.
        as_source: under a causal model, the share on which the network's logits are those that it has for the source.
    """

    iia: Share | None
    effect_rate: float | None
    effective_iia: float | None
    do_nothing: float | None
    replace_all: float | None
    kl: float | None
    error: float | None
    count: int
    left_out: int
    as_source: float | None = None


@dataclass(frozen=True)
class InterchangeAccuracy(Result):
    """The interchange intervention accuracy of a student under a mapping: overall, and for each entry.

    Attributes:
        overall: the figures of all entries together.
        per_pair: the figures of each entry, by its text.
        settings: the number of pairs, the rules of sources and positions, and the seed.
        controls: the overall figures of `subspace` (random ones of the same size), `labels` (the teacher takes the
            sources of other pairs) and `network` (a student with new weights).
        overlap: the share of the bases that were trained on; None where it is not known.
    """

    overall: Outcome
    per_pair: dict[str, Outcome]
    settings: dict[str, Any]
    controls: dict[str, Outcome] = field(default_factory=dict)
    overlap: float | None = None

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
        """The remarks that a reader of the figures needs: counterfactuals left out, and rows that were trained on."""
        notes = []
        for name, outcome in self.per_pair.items():
            if outcome.left_out:
                total = outcome.left_out + outcome.count
                notes.append(
                    f"{name}: {outcome.left_out} of {total} counterfactuals replace all that an output can see, or "
                    "nothing that "
                    "it can see; they say nothing about computation and are left out."
                )
            if outcome.as_source == 1.0:
                notes.append(
                    f"{name}: every swap gave what the network answers to the source, so the answers depend on nothing "
                    "else there; any variable that decides the answer would fit."
                )
        if self.overlap is not None:
            notes.append(f"{self.overlap:.1%} of the bases were trained on.")
        return tuple(notes)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures of all pairs and controls, the settings and the notes as plain data, for JSON."""
        return plain_data(asdict(self) | {"notes": list(self.notes)})

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the figures as a table: a row for each pair of the mapping, for all of them, and for each control.

        Raises:
            DistillError: pandas is not installed.
        """
        return table_of(({"entry": name, **figures_of(outcome)} for name, outcome in self._rows()), "entry")

    def _rows(self) -> list[tuple[str, Outcome]]:
        """Return the figures of the entries, of all together and of the controls, by their headings."""
        controls = [(f"control: {name}", outcome) for name, outcome in self.controls.items()]
        return [*self.per_pair.items(), ("overall", self.overall), *controls]

    def plot(self) -> Picture:
        """Draw the accuracy of each entry of the mapping, and of the controls, as bars with both baselines.

        Raises:
            DistillError: no counterfactual was counted.
        """
        rows = [(name, each, each.iia) for name, each in self._rows() if each.iia is not None]
        if not rows:
            return self._errors()
        figure = Picture(figsize=(8, 1.1 + 0.4 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for y, (name, outcome, share) in enumerate(rows):
            color = "#bbbbbb" if name.startswith("control") else "#4477aa"
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
        rows = self._rows()
        if self.overall.iia is None:
            return "\n".join([*(f"{name}: {_error(o)}" for name, o in rows), *self.notes])
        width = max(len(name) for name, _ in rows)
        lines = [f"{'':{width}}  IIA                   effect  effective  do nothing  replace all  KL"]
        for name, o in rows:
            if o.iia is None:
                lines.append(f"{name:{width}}  left out")
                continue
            effective = "   –   " if o.effective_iia is None else f"{o.effective_iia:.3f}"
            lines.append(
                f"{name:{width}}  {o.iia!s:20}  {o.effect_rate:.3f}   {effective:9}  {o.do_nothing:.3f}       "
                f"{o.replace_all:.3f}        {'–' if o.kl is None else f'{o.kl:.3f}'}"
            )
        return "\n\n".join(["\n".join(lines), *self.notes])


def figures_of(outcome: Outcome) -> dict[str, float | None]:
    """Return the figures of an outcome by name: the share `iia` as its value, `low` and `high`."""
    share = outcome.iia
    interval: dict[str, float | None] = {"iia": None, "low": None, "high": None}
    if share is not None:
        interval = {"iia": share.value, "low": share.low, "high": share.high}
    return {**interval, **{name: value for name, value in vars(outcome).items() if name != "iia"}}


def _error(outcome: Outcome) -> str:
    """Return the error of real-valued answers as text."""
    if outcome.error is None:
        return "left out"
    return f"mean absolute error {outcome.error:.4g} ({outcome.count} counterfactuals)"


def outcome_of(tally: Tally, clusters: Int[Tensor, " pairs"], seed: int) -> Outcome:
    """Return the figures of a tally.

    Args:
        tally: the sums.
        clusters: the number of the base of each pair; pairs that share it are drawn together by the bootstrap.
        seed: of the interval.
    """
    total, left_out = float(tally["total"].sum()), int((~tally.kept).sum())
    count = int(tally.kept.sum())
    if not total or tally.regression:
        error = float(tally["error"].sum()) / total if total else None
        return Outcome(None, None, None, None, None, None, error, count, left_out)
    agree, effect = tally["agree"].sum(1), float(tally["effect"].sum())
    return Outcome(
        iia=bootstrap(agree, tally["total"].sum(1), clusters, seed),
        effect_rate=effect / total,
        effective_iia=float(tally["agree_on_effect"].sum()) / effect if effect else None,
        do_nothing=float(tally["do_nothing"].sum()) / total,
        replace_all=float(tally["replace_all"].sum()) / total,
        kl=float(tally["divergence"].sum()) / total,
        error=None,
        count=count,
        left_out=left_out,
        as_source=float(tally["as_source"].sum()) / total if tally.sums.shape[-1] == len(SUMS) else None,
    )
