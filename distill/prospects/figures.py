"""The figures of `headroom`, with their table, their picture and the sentence that says what they mean."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite, nan, sqrt
from typing import TYPE_CHECKING, Any

from distill.errors import DistillError
from distill.statistics.tables import table_of
from interventions import Picture, Result, label, plain_data, printed

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

SAME = 0.5
"""From this cosine on, the gradient of the counterfactual loss points, in words, mostly where that of the base does."""
ACROSS = 0.2
"""Below this cosine, up to its negative, the two gradients are called nearly orthogonal."""
TIMES = 10.0
"""From this ratio on, the counterfactual loss is called much more than what is left of the base loss."""
VOID = 0.95
"""From this share of void rows on, an entry is called one at which no interchange can be seen."""


@dataclass(frozen=True)
class Spread:
    """A mean over batches, with its standard error; None where there is no number, or only one batch.

    >>> print(Spread.of([1.0, 3.0]))
    2.00 ± 1.00
    """

    mean: float | None
    error: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the mean and standard error of the values that are numbers."""
        numbers = [each for each in values if isfinite(each)]
        if not numbers:
            return cls(None)
        mean = sum(numbers) / len(numbers)
        return cls(mean, _standard_error([each - mean for each in numbers]))

    @classmethod
    def of_ratio(cls, above: Sequence[float], below: Sequence[float]) -> "Spread":
        """Return the ratio of two means over the same batches, with its standard error by the delta method.

        The standard error is that of the mean of above − ratio · below, divided by the mean of below (Cochran 1977,
        Sampling Techniques, section 6.4). The ratio is infinite where the mean below is 0 alone, None where both are.
        """
        first, second = sum(above) / len(above), sum(below) / len(below)
        if second == 0:
            return cls(None if first == 0 else inf)
        ratio = first / second
        error = _standard_error([a - ratio * b for a, b in zip(above, below, strict=True)])
        return cls(ratio, None if error is None else error / abs(second))

    def __str__(self) -> str:
        if self.mean is None or self.error is None or abs(self.mean) == inf:
            return _short(self.mean)
        places = 2 if abs(self.mean) < 10 else 1 if abs(self.mean) < 100 else 0
        return f"{self.mean:.{places}f} ± {self.error:.{places}f}"


def _standard_error(deviations: Sequence[float]) -> float | None:
    """Return the standard error of a mean from the deviations from it; None of fewer than two."""
    count = len(deviations)
    return None if count < 2 else sqrt(sum(each**2 for each in deviations) / (count - 1) / count)


@dataclass(frozen=True)
class EntryHeadroom:
    """The headroom that an entry of the mapping leaves for the causal term, under one kind of interchange.

    Attributes:
        kind: the kind of interchange.
        entry: the entry, as text.
        effect_rate: the share of the teacher's predictions that the interchange changes; None for regression.
        void: the share of rows whose interchange changes nothing that an output depends on, in teacher or student, or
            replaces everything that it depends on, as `interchange_accuracy` leaves out.
        nearly_void: the share of the other rows of which no logit of the teacher moves by the tolerance.
        base: the loss without interchange, e.g. kd.
        counterfactual: the loss after the interchange, e.g. kd_cf.
        ratio: `counterfactual` / `base`.
        base_norm, counterfactual_norm: lengths of the gradients of the two by the student's parameters.
        cosine: the cosine of the angle between them, in the same batch.
        rows: how many rows were interchanged.
    """

    kind: str
    entry: str
    effect_rate: float | None
    void: float
    nearly_void: float
    base: float
    counterfactual: float
    ratio: Spread
    base_norm: float
    counterfactual_norm: float
    cosine: Spread
    rows: int

    @property
    def is_void(self) -> bool:
        """True where (nearly) no interchange of the entry can be seen."""
        return self.void >= VOID

    @property
    def aside(self) -> float:
        """The part of the counterfactual gradient across the base gradient, in lengths of the latter."""
        cosine = self.cosine.mean
        if cosine is None or not self.base_norm:
            return inf if self.counterfactual_norm > 0 else 0.0
        return self.counterfactual_norm / self.base_norm * sqrt(max(0.0, 1 - cosine**2))

    @property
    def figures(self) -> dict[str, Any]:
        """The figures by name, for a table."""
        rest = {name: value for name, value in vars(self).items() if name not in ("ratio", "cosine")}
        spreads = {"ratio": self.ratio, "cosine": self.cosine}
        return rest | {
            name: value
            for key, each in spreads.items()
            for name, value in ((key, each.mean), (f"{key}_error", each.error))
        }


@dataclass(frozen=True)
class Headroom(Result):
    """The room that a causal term has beside the base loss, for each entry of a mapping and each kind.

    Attributes:
        entries: the figures, of each kind each entry.
        across: for each kind, the cosine of the gradients of the base loss on two batches: what two batches of one
            loss have in common. A cosine of an entry near it says no more than "another batch".
        loss: the compared losses, e.g. "kd".
        trained_by: the objectives that the student was trained by before.
        steps: the number of those steps.
        settings: batches, rows of a batch, tolerance and seed.
    """

    entries: tuple[EntryHeadroom, ...]
    across: dict[str, Spread]
    loss: str
    trained_by: str
    steps: int
    settings: dict[str, Any]

    @property
    def advice(self) -> str:
        """The sentence that the figures give.

        That a large ratio and a small cosine foretell a gain is a hypothesis, from two tasks.
        """
        seen = [each for each in self.entries if not each.is_void]
        void = [each for each in self.entries if each.is_void]
        named = ", ".join(self._grouped(void))
        if not seen:
            return f"No interchange of {named} can be seen: map a block below the last, or other positions."
        best = max(seen, key=lambda each: each.aside)
        unseen = f"; no interchange of {named} can be seen: map a block below the last there" if void else ""
        return f"{self._when} {self._say(best)}{unseen}."

    @property
    def _when(self) -> str:
        return f"After {self.steps} steps of {self.trained_by}" if self.steps else "As the student is,"

    def _say(self, best: EntryHeadroom) -> str:
        """Return what an entry that can be seen leaves for the causal term."""
        name, ratio = self._name(best), best.ratio.mean
        if ratio is None:
            return (
                f"both losses of {name} are 0, with the interchange and without: the student computes like its teacher "
                "there already, and a causal term has nothing to teach"
            )
        if ratio == inf:
            return (
                f"the base loss is 0 and the counterfactual loss of {name} {_short(best.counterfactual)}: "
                "what is left to learn is in the causal term alone"
            )
        losses = (
            f"the counterfactual loss of {name} is {_short(ratio)} times the base loss ({_short(best.counterfactual)} "
            f"against {_short(best.base)})"
        )
        if best.cosine.mean is None:
            return f"{losses} and one of the two has no gradient: no angle between them can be named"
        longer = best.counterfactual_norm / best.base_norm
        angle = f"its gradient {_short(longer)} times as long and {_direction(best.cosine.mean)}"
        other = self.across[best.kind].mean
        cosines = f"cosine {best.cosine.mean:+.2f}"
        cosines += "" if other is None else f"; of the base loss on two batches {other:+.2f}"
        return f"{losses} and {angle} ({cosines}): {_conclusion(ratio, best.cosine.mean)}"

    def _name(self, each: EntryHeadroom) -> str:
        return each.entry if len(self.across) == 1 else f"{each.entry} ({each.kind})"

    def _grouped(self, entries: Sequence[EntryHeadroom]) -> Iterator[str]:
        """Yield each entry once, with its kinds where there are several."""
        for name in dict.fromkeys(each.entry for each in entries):
            kinds = ", ".join(each.kind for each in entries if each.entry == name)
            yield name if len(self.across) == 1 else f"{name} ({kinds})"

    def plot(self) -> Picture:
        """Draw an entry as a dot: the ratio of the losses (logarithmic) and the cosine of their gradients.

        Raises:
            DistillError: no entry has a ratio and a cosine.
        """
        drawn = [each for each in self.entries if _is_drawn(each)]
        if not drawn:
            raise DistillError(
                "there is no figure to draw: no entry has two losses above 0 and two gradients; take another mapping, "
                "or a student that differs from its teacher: headroom(…, steps=0)."
            )
        figure = Picture(figsize=(6.4, 4.4 + 0.17 * len(drawn)), dpi=110, layout="constrained")
        axes = figure.subplots()
        colors = {kind: f"C{number % 10}" for number, kind in enumerate(self.across)}
        numbers = {name: number for number, name in enumerate(dict.fromkeys(each.entry for each in drawn), 1)}
        for each in drawn:
            _draw_dot(axes, each, numbers[each.entry], colors[each.kind])
        _name_regions(axes, drawn)
        axes.set_xlabel(f"counterfactual loss / base loss ({label(self.loss)})")
        axes.set_ylabel("cosine of their gradients")
        axes.set_title(label(f"{self._when.rstrip(',')}"), fontsize=9)
        dots = [axes.plot([], [], "o", color=color, label=label(kind))[0] for kind, color in colors.items()]
        entries = [axes.plot([], [], " ", label=f"{number}: {label(name)}")[0] for name, number in numbers.items()]
        hollow = axes.plot([], [], "o", color="0.4", mfc="white", label="cannot be seen")
        shown = [*entries, *(dots if len(dots) > 1 else []), *(hollow if any(each.is_void for each in drawn) else [])]
        figure.legend(handles=shown, loc="outside lower left", frameon=False, fontsize=7.5)
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Return the figures, the settings and the advice as plain data, for JSON."""
        return plain_data(asdict(self) | {"advice": self.advice})

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the figures as a table: a row for each kind of interchange and each entry of the mapping.

        Raises:
            DistillError: pandas is not installed.
        """
        return table_of((each.figures for each in self.entries), "kind", "entry")

    @printed
    def __str__(self) -> str:
        head = f"{self._when.rstrip(',')}, dropout off, {self.settings['batches']} batches of "
        head += f"{self.settings['batch_size']} rows; ± one standard error over batches"
        width = max(len("entry"), *(len(each.entry) for each in self.entries))
        titles = ("effect", "void", "nearly", self.loss, f"{self.loss}_cf", "ratio", "|∇|", "|∇_cf|", "cosine")
        columns = [(title, max(len(title), least)) for title, least in zip(titles, WIDTHS, strict=True)]
        lines = [head]
        for kind, across in self.across.items():
            heading = "  ".join(title.rjust(wide) for title, wide in columns)
            lines += ["", f"{kind}; cosine of two batches of {self.loss}: {across}", f"{'entry':{width}}  {heading}"]
            for each in self.entries:
                if each.kind == kind:
                    cells = zip(_cells(each), columns, strict=True)
                    lines.append(f"{each.entry:{width}}  " + "  ".join(cell.rjust(wide) for cell, (_, wide) in cells))
        return "\n".join([*lines, "", self.advice])


WIDTHS = (6, 5, 6, 7, 7, 12, 7, 7, 13)


def _cells(each: EntryHeadroom) -> list[str]:
    """Return the figures of an entry as the cells of a table."""
    effect = "–" if each.effect_rate is None else f"{each.effect_rate:.3f}"
    losses, norms = (each.base, each.counterfactual), (each.base_norm, each.counterfactual_norm)
    cosine = each.cosine
    angle = "–" if cosine.mean is None else f"{cosine.mean:+.2f}"
    angle += "" if cosine.error is None else f" ± {cosine.error:.2f}"
    shares = (effect, f"{each.void:.3f}", f"{each.nearly_void:.3f}")
    return [*shares, *map(_short, losses), str(each.ratio), *map(_short, norms), angle]


def _short(value: float | None) -> str:
    """Return a number in three digits."""
    if value is None:
        return "–"
    if value == inf:
        return "∞"
    return f"{value:#.3g}" if abs(value) < 100 else f"{value:.0f}"


def _direction(cosine: float) -> str:
    """Return where a gradient points, in words."""
    if cosine >= SAME:
        return "mostly in the same direction"
    if abs(cosine) < ACROSS:
        return "nearly orthogonal"
    return "partly in the same direction" if cosine > 0 else "against it"


def _conclusion(ratio: float, cosine: float) -> str:
    """Return what the two figures are taken for."""
    if cosine >= SAME:
        return "the causal term is mostly a second helping of the base loss on changed inputs"
    if ratio >= TIMES:
        return "the causal term asks for something else than the base loss, and may matter"
    return "the causal term asks for something else than the base loss, but little of it"


def _is_drawn(each: EntryHeadroom) -> bool:
    ratio, cosine = each.ratio.mean, each.cosine.mean
    return ratio is not None and 0 < ratio < inf and cosine is not None


def _whiskers(ratio: Spread) -> list[list[float]] | float:
    """Return how far the whiskers of a ratio reach; to the left never to 0, which has no place on the axis."""
    mean, error = ratio.mean or nan, ratio.error or 0.0
    return [[min(error, 0.9 * mean)], [error]]


def _draw_dot(axes: Any, each: EntryHeadroom, number: int, color: str) -> None:
    """Draw an entry as a dot with its number, hollow where its interchanges cannot be seen."""
    x, y = each.ratio.mean or nan, nan if each.cosine.mean is None else each.cosine.mean
    axes.errorbar(
        x, y, xerr=_whiskers(each.ratio), yerr=each.cosine.error or 0, fmt="o", color=color,
        mfc="white" if each.is_void else color, ms=11, lw=1,
    )  # fmt: skip
    axes.text(
        x, y, str(number), color=color if each.is_void else "white", ha="center", va="center_baseline", fontsize=7.5,
        zorder=5,
    )  # fmt: skip


def _name_regions(axes: Any, drawn: Sequence[EntryHeadroom]) -> None:
    """Draw the borders of the regions of the picture, and write into each what it stands for."""
    ratios = [each.ratio.mean or 1.0 for each in drawn]
    low, high = min(0.5, *ratios) / 2, max(100.0, *ratios) * 2
    bottom = min(-0.3, *(each.cosine.mean - 0.25 for each in drawn if each.cosine.mean is not None))
    axes.set(xscale="log", xlim=(low, high), ylim=(bottom, 1.2))
    axes.axhline(SAME, color="0.7", lw=0.8, zorder=0)
    axes.plot([TIMES, TIMES], [bottom, SAME], color="0.7", lw=0.8, zorder=0)
    style = {"fontsize": 8, "color": "0.45", "style": "italic"}
    axes.text(low * 1.1, 1.11, "a second helping of the base loss", **style)
    axes.text(low * 1.1, bottom + 0.05, "something else, but little of it", **style)
    axes.text(TIMES * 1.1, bottom + 0.05, "something else: may matter", **style)
