"""Figures of several runs of one training, e.g. with other seeds, over the same pairs: means with their intervals.

A figure of run s over pairs p varies with the run, with the pairs, and with both together,

    y_sp = mean + α_s + β_p + ε_sp,

so that the mean over S runs has the variance σ_α² / S + (that of β) + (that of ε) / S. The spread of the runs about
their mean, s² / S, estimates the first and the third part; the variance of the mean over runs by what pairs share
(`Sharing`) estimates the second and the third. The third is taken off the latter, so that it counts once: it is what
pairs say of the deviation of each run from the mean, Σ_s var_p(y_s − mean) / S (S − 1) (the method of moments of a
random two-way layout: Searle, Casella, McCulloch 1992, Variance Components, chapter 4).

Each of the two parts has an interval with its own quantile of Student's t, and their half-widths are added as squares,

    half² = t²_seeds · s² / S + t²_pairs · (variance over pairs),

which covers at least as often as it says (Banerjee 1960, Bulletin of the Calcutta Statistical Association 10). Few runs
may happen to agree closely; so the interval is never narrower than that of these very runs over other pairs. The
degrees of freedom of the sum by Satterthwaite would give narrower intervals, and cover 90 in 100 with two seeds
(simulated: `tests/distill/statistics/test_over_runs.py`). A bootstrap that draws runs and clusters of pairs with
replacement counts the third part more than once (Owen 2007, The pigeonhole bootstrap, Annals of Applied Statistics 1),
and of the two or three runs that are usual here, it draws the same one again in a half or a ninth of its samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch

from distill.statistics.figures import Figure
from distill.statistics.intervals import Estimate, student_quantile
from distill.statistics.sharing import Sharing

TINY = 1e-12
"""Of a value: what is smaller is rounding."""


@dataclass(frozen=True)
class OverRuns:
    """A figure of one or several runs, or a difference of such figures, with its 95 % intervals.

    Attributes:
        estimate: the mean over the runs. Its interval is about other runs and other pairs; of one run it is about other
            pairs alone.
        runs: the figure of each run; empty for the difference of unequal numbers of runs.
        over_seeds: the mean with the interval of Student's t over the runs alone, for these very pairs; None of one
            run.
    """

    estimate: Estimate
    runs: tuple[float, ...] = ()
    over_seeds: Estimate | None = None

    @property
    def sd(self) -> float | None:
        """The standard deviation over the runs; None of fewer than two."""
        return sqrt(_variance(self.runs)) if len(self.runs) > 1 else None

    def __str__(self) -> str:
        return str(self.estimate)


def of_runs(figures: Sequence[Figure], sharing: Sharing) -> OverRuns:
    """Return the mean of the figures of several runs over the same pairs, with its intervals."""
    return _over_runs([(1.0, figures)], sharing, tuple(each.value for each in figures))


def difference_of_runs(one: Sequence[Figure], other: Sequence[Figure], sharing: Sharing) -> OverRuns:
    """Return the figures of one minus those of another, over the same pairs.

    Equal numbers of runs are paired by their place. Of unequal numbers the means are compared as Welch does (1947,
    Biometrika 34). A single run beside several stands for itself: its interval knows of no other seed of it.
    """
    if len(one) == len(other):
        return of_runs([a - b for a, b in zip(one, other, strict=True)], sharing)
    return _over_runs([(1.0, one), (-1.0, other)], sharing, ())


def mean_figure(figures: Sequence[Figure]) -> Figure:
    """Return the mean of several figures over the same pairs."""
    values = sum(each.value for each in figures) / len(figures)
    return Figure(values, torch.stack([each.influence for each in figures]).mean(0))


def _over_runs(groups: Sequence[tuple[float, Sequence[Figure]]], sharing: Sharing, runs: tuple[float, ...]) -> OverRuns:
    """Return the sum over groups of their sign times the mean of their runs."""
    means = [(sign, mean_figure(figures)) for sign, figures in groups]
    value = sum(sign * mean.value for sign, mean in means)
    influence = torch.stack([sign * mean.influence for sign, mean in means]).sum(0)
    several = [[each.value for each in figures] for _, figures in groups if len(figures) > 1]
    twice = sum(_left_over(figures, mean, sharing) for (_, figures), (_, mean) in zip(groups, means, strict=True))
    both = _over_seeds(several) + _over_pairs(influence, sharing, twice)
    half, n = sqrt(max(both, _over_pairs(influence, sharing, 0.0))), sharing.independent
    over_seeds = _estimate(value, sqrt(_over_seeds(several)), min(map(len, several))) if several else None
    return OverRuns(_estimate(value, half, n), runs, over_seeds)


def _over_seeds(several: Sequence[Sequence[float]]) -> float:
    """Return the squared half-width of the interval of a sum of means over runs, by the spread of the runs.

    With more than one group Student's t has the degrees of freedom of Welch.
    """
    parts = [_variance(values) / len(values) for values in several]
    if not sum(parts):
        return 0.0
    uncertainty = sum(part**2 / (len(values) - 1) for part, values in zip(parts, several, strict=True))
    return float(student_quantile(sum(parts) ** 2 / uncertainty) ** 2 * sum(parts))


def _over_pairs(influence: torch.Tensor, sharing: Sharing, twice: float) -> float:
    """Return the squared half-width of the interval of a figure over pairs, without the part that seeds have too."""
    if not bool(influence.any()):
        return 0.0
    found = sharing.spread(influence)
    return float(student_quantile(found.degrees) ** 2 * max(found.variance - twice, 0.0))


def _left_over(figures: Sequence[Figure], mean: Figure, sharing: Sharing) -> float:
    """Return the variance of a mean over runs that is both in the spread of the runs and in that over pairs."""
    deviations = [each.influence - mean.influence for each in figures]
    if len(figures) < 2 or len(sharing) < 2:
        return 0.0
    return sum(map(sharing.variance, deviations)) / (len(figures) * (len(figures) - 1))


def _estimate(value: float, half: float, independent: float) -> Estimate:
    """Return a value with its interval of this half-width; `independent` things vary on their own."""
    return Estimate(value, value - half, value + half) if half > TINY * abs(value) else _all_alike(value, independent)


def _all_alike(value: float, independent: float) -> Estimate:
    """Return a value that all pairs and runs have, with an interval from where as many others might have none of it.

    Its end towards 0 is that of Wilson's interval for a share of 1, n / (n + z²) for n independent examples: a
    difference of 1 in each of ten pairs is not known to be 1 in all. A value of 0 is known to be 0, as of a model
    compared with itself.
    """
    end = value * independent / (independent + student_quantile(independent - 1) ** 2)
    return Estimate(value, min(value, end), max(value, end))


def _variance(values: Sequence[float]) -> float:
    """Return the variance of the values of which these are a sample."""
    mean = sum(values) / len(values)
    return sum((each - mean) ** 2 for each in values) / (len(values) - 1)
