"""Figures with their 95 % intervals: Wilson's score interval of shares, also where pairs share rows, and the bootstrap.

Of k right among n, with p = k / n, Wilson's interval is

    (p + z² / 2n ± z √(p (1 − p) / n + z² / 4n²)) / (1 + z² / n).

Where pairs share rows or clusters of rows (`Sharing`), n is the number of independent examples that would give the
variance that is found, p (1 − p) / variance, and z the quantile of Student's t.

Wilson 1927, JASA 22; Efron, Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.errors import DistillError, checked
from distill.statistics.sharing import Sharing

RESAMPLES = 1000


@checked
@dataclass(frozen=True)
class Share:
    """A share of `count` examples, from 0 to 1, with its 95 % interval from `low` to `high`.

    >>> print(Share(0.9, 0.88, 0.92, 1000))
    0.900 [0.880, 0.920]
    """

    value: float
    low: float
    high: float
    count: int

    def __post_init__(self) -> None:
        if not (0 <= self.value <= 1 and 0 <= self.low <= self.high <= 1 and self.count >= 0):
            raise DistillError(
                f"Share(value={self.value}, low={self.low}, high={self.high}, count={self.count}) is no share with its "
                "interval, all from 0 to 1; use metrics.wilson(right, total)."
            )

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@checked
@dataclass(frozen=True)
class Estimate:
    """A figure of any size and sign, e.g. a difference of two shares, with its 95 % interval from `low` to `high`.

    >>> print(Estimate(0.123, 0.1, 0.15))
    0.123 [0.100, 0.150]
    """

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise DistillError(
                f"Estimate(value={self.value}, low={self.low}, high={self.high}) is no figure in its interval; give "
                "low <= value <= high."
            )

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def signed(estimate: Estimate) -> str:
    """Return an estimate as text with the sign of each number, as differences are written.

    >>> signed(Estimate(0.012, -0.003, 0.027))
    '+0.012 [-0.003, +0.027]'
    """
    values = (0.0 if abs(each) < 0.0005 else each for each in (estimate.value, estimate.low, estimate.high))
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*values)


@checked
def wilson(right: int, total: int, z: float = 1.959964) -> Share:
    """Return the share of `right` among `total` with its Wilson score interval (Wilson 1927, JASA 22).

    Args:
        right: how many.
        total: of how many, at least one.
        z: the quantile of the normal distribution; 1.96 for 95 %.

    Raises:
        DistillError: `right` is not from 0 to `total`, or there are no examples.

    >>> print(wilson(90, 100))
    0.900 [0.826, 0.945]
    """
    if not 0 <= right <= total or total < 1 or not 0 <= z < inf:
        raise DistillError(
            f"wilson({right}, {total}, z={z}) has no share: it needs 0 <= right <= total, at least one example, and a "
            "finite z of 0 or more; use e.g. wilson(90, 100)."
        )
    return Share(right / total, *_wilson_interval(right / total, total, z), total)


@checked
def bootstrap(
    right: Float[Tensor, " examples"], total: Float[Tensor, " examples"], clusters: Int[Tensor, " examples"], seed: int
) -> Share:
    """Return the share of right ones with its percentile bootstrap interval, whole clusters drawn with replacement.

    Args:
        right, total: how many predictions of each example are right, and how many there are.
        clusters: the number of the cluster of each example, from 0: examples that share their base are of one.
        seed: of the draws.

    Raises:
        DistillError: other numbers of examples, or no prediction.

    Efron, Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    if not len(right) == len(total) == len(clusters) or not bool((total > 0).any()):
        raise DistillError(
            f"there is no share of {len(right)} right and {len(total)} examples in {len(clusters)} clusters; give a "
            "sum and a cluster for each, and at least one example."
        )
    size = int(clusters.max()) + 1
    sums = torch.zeros(2, size, dtype=torch.float64)
    sums[0].index_add_(0, clusters, right.double())
    sums[1].index_add_(0, clusters, total.double())
    sums = sums[:, sums[1] > 0]
    generator = torch.Generator().manual_seed(seed)
    shares = []
    for _ in range(RESAMPLES):
        drawn = sums[:, torch.randint(sums.shape[1], (sums.shape[1],), generator=generator)].sum(1)
        shares.append(drawn[0] / drawn[1])
    low, high = torch.stack(shares).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    value = float(sums[0].sum() / sums[1].sum())
    return Share(value, low, high, round(float(total.sum())))


@checked
def share_of(right: Float[Tensor, " pairs"], total: Float[Tensor, " totals"], sharing: Sharing) -> Share:
    """Return the share Σ right / Σ total over pairs with its 95 % interval, where pairs share rows and clusters.

    The interval is Wilson's for as many independent examples as would give the variance that `sharing` finds, with the
    quantile of Student's t for the degrees of freedom of that variance. Where all are right or all wrong, which says
    nothing of what they have in common, each thing that varies on its own counts as one example.

    Args:
        right, total: how many predictions of each pair are right, and how many there are; 0 of 0 leaves a pair out.
        sharing: what the pairs have in common.

    Raises:
        DistillError: other numbers of sums than of pairs, or no prediction.
    """
    return shares_of(right[None], total[None], sharing)[0]


@checked
def shares_of(
    right: Float[Tensor, "figures pairs"], total: Float[Tensor, "figures totals"], sharing: Sharing
) -> list[Share]:
    """Return several shares over the same pairs, each to the bit what `share_of` returns of it."""
    same = right.shape == total.shape and right.shape[1] == len(sharing)
    if not same or not bool((total > 0).any(1).all()) or not bool(((right >= 0) & (right <= total)).all()):
        raise DistillError(
            f"there is no share of {right.shape[1]} right and {total.shape[1]} totals in {len(sharing)} pairs; give a "
            "right one from 0 to its total to each pair, and at least one total above 0."
        )
    masks, group_of = (total > 0).unique(dim=0, return_inverse=True)
    found: dict[int, Share] = {}
    for group, kept in enumerate(masks):  # figures of the same pairs
        mine = (group_of == group).nonzero()[:, 0]
        some = slice(None) if bool(kept.all()) else kept
        here = sharing if isinstance(some, slice) else sharing.take(kept)
        shares = _shares(right[mine][:, some].double(), total[mine][:, some].double(), here)
        found |= dict(zip(mine.tolist(), shares, strict=True))
    return [found[number] for number in range(len(right))]


def _shares(
    right: Float[Tensor, "figures pairs"], total: Float[Tensor, "figures pairs"], sharing: Sharing
) -> Iterator[Share]:
    """Yield shares over the same pairs, each of which has a prediction."""
    sums = total.sum(1)
    values = right.sum(1) / sums
    spreads = sharing.spreads((right - values[:, None] * total) / sums[:, None])
    for value, summed, found in zip(values.tolist(), sums.tolist(), spreads, strict=True):
        spread = value * (1 - value)
        if spread > 0:
            n = min(spread / found.variance, summed) if found.variance > 0 else summed
            z = student_quantile(found.degrees)
        else:
            n, z = min(sharing.independent, summed), student_quantile(sharing.independent - 1)
        yield Share(value, *_wilson_interval(value, n, z), round(summed))


@checked
def estimate_of(value: float, influence: Float[Tensor, " pairs"], sharing: Sharing) -> Estimate:
    """Return a figure over pairs with its 95 % interval, where pairs share rows and clusters.

    Args:
        value: the figure.
        influence: what each pair adds to its deviation from its expectation, see `Sharing.variance`. Where all are 0,
            as in the difference of a model and itself, the interval is the value alone.
        sharing: what the pairs have in common.

    Raises:
        DistillError: another number of influences than of pairs, or one that is not finite.
    """
    return estimates_of([value], influence[None], sharing)[0]


@checked
def estimates_of(values: list[float], influences: Float[Tensor, "figures pairs"], sharing: Sharing) -> list[Estimate]:
    """Return several figures over the same pairs, each to the bit what `estimate_of` returns of it."""
    if influences.shape[1] != len(sharing) or not bool(influences.isfinite().all()):
        raise DistillError(
            f"there is no interval of {influences.shape[1]} influences over {len(sharing)} pairs; give a finite one to "
            "each pair."
        )
    found, moves = [], influences.any(1).tolist()
    for value, spread, moved in zip(values, sharing.spreads(influences), moves, strict=True):
        half = student_quantile(spread.degrees) * sqrt(spread.variance) if moved else 0.0
        found.append(Estimate(value, value - half, value + half))
    return found


@checked
def student_quantile(degrees: float) -> float:
    """Return the quantile of Student's t that holds 95 % between −t and t.

    >>> round(student_quantile(1), 3), round(student_quantile(10), 3)
    (12.706, 2.228)
    """
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    return float(stdtrit(max(degrees, 1.0), 0.975))


def _wilson_interval(share: float, total: float, z: float) -> tuple[float, float]:
    """Return Wilson's interval of a share of so many independent examples, from 0 to 1 where there are none."""
    if not total:
        return 0.0, 1.0
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, center - half), min(1.0, center + half)
