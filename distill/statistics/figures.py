"""The figures of a measurement, each with what every pair adds to it.

A figure is a value and the influence of every pair of a base and a source on it: to first order, the value that other
pairs would give is this value plus the sum of their influences. Intervals, and those of the difference of two figures
over the same pairs, follow from the influences and from what pairs share.

Efron, Tibshirani 1993, An Introduction to the Bootstrap, chapter 21 (influence functions).
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from distill.statistics.intervals import Estimate, estimate_of
from distill.statistics.sharing import Sharing
from distill.statistics.shifts import correlation
from distill.statistics.tally import Tally


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure over pairs.

    Attributes:
        value: of all pairs together.
        influence: what each pair adds to the deviation of the value from its expectation; it sums to 0.
    """

    value: float
    influence: Float[Tensor, " pairs"]

    def __sub__(self, other: "Figure") -> "Figure":
        return Figure(self.value - other.value, self.influence - other.influence)

    def estimate(self, sharing: Sharing) -> Estimate:
        """Return the value with its 95 % interval."""
        return estimate_of(self.value, self.influence, sharing)


def ratio(above: Float[Tensor, " pairs"], below: Float[Tensor, " pairs"]) -> Figure | None:
    """Return Σ above / Σ below over pairs; None where the sum below is 0."""
    above, below = above.double(), below.double()
    summed = float(below.sum())
    if not summed:
        return None
    value = float(above.sum()) / summed
    return Figure(value, (above - value * below) / summed)


def _mean(name: str) -> Callable[[Tally], Figure | None]:
    """Return the function that gives the mean over predictions of a sum of a tally."""

    def mean(tally: Tally) -> Figure | None:
        return ratio(tally[name].sum(1), tally["total"].sum(1)) if name in tally else None

    return mean


def _effective(tally: Tally) -> Figure | None:
    return ratio(tally["agree_on_effect"].sum(1), tally["effect"].sum(1)) if "effect" in tally else None


def _normalized(tally: Tally) -> Figure | None:
    if "agree" not in tally:
        return None
    agree, nothing, total = (tally[name].sum(1) for name in ("agree", "do_nothing", "total"))
    return ratio(agree - nothing, total - nothing)


def _correlation(tally: Tally) -> Figure | None:
    found = correlation(tally)
    return None if found is None else Figure(*found)


FIGURES: dict[str, Callable[[Tally], Figure | None]] = {
    "iia": _mean("agree"),
    "effect_rate": _mean("effect"),
    "effective": _effective,
    "normalized": _normalized,
    "do_nothing": _mean("do_nothing"),
    "replace_all": _mean("replace_all"),
    "kl": _mean("divergence"),
    "correlation": _correlation,
    "agreement": _mean("agree_on_base"),
    "base_kl": _mean("divergence_on_base"),
    "as_source": _mean("as_source"),
    "error": _mean("error"),
}
"""Each figure by its name, as a function of a tally; it gives None where the figure is not defined."""


def figure_of(name: str, tally: Tally) -> Figure | None:
    """Return a figure of a tally; None where it is not defined, as that of effects where there are none."""
    return FIGURES[name](tally) if bool(tally.kept.any()) else None
