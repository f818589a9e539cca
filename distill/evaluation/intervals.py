"""Proportions with their 95 % intervals: Wilson's score interval, and the bootstrap over clusters.

Of k right among n, with p = k / n, Wilson's interval is

    (p + z² / 2n ± z √(p (1 − p) / n + z² / 4n²)) / (1 + z² / n).

Wilson 1927, JASA 22; Efron, Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
"""

from dataclasses import dataclass
from math import erf, inf, pi, sqrt, tan

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.errors import DistillError, checked
from distill.evaluation.sharing import Sharing

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
    share = right / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return Share(share, max(0.0, center - half), min(1.0, center + half), total)


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


def clustered_share(right: Float[Tensor, " pairs"], total: Float[Tensor, " pairs"], sharing: Sharing) -> Share:
    """Return the share Σ right / Σ total over pairs with its 95 % interval, where pairs share rows and clusters.

    The interval is Wilson's for as many independent examples as would give the variance that `sharing` finds,
    n = p (1 − p) / variance, with the quantile of Student's t for the number of bases, sources or clusters (the
    fewest). Where all are right or all wrong, n is that number.

    Raises:
        DistillError: other numbers of sums than of pairs, or a total of 0.
    """
    if not len(right) == len(total) == len(sharing) or not bool((total > 0).any()):
        raise DistillError(
            f"there is no share of {len(right)} right and {len(total)} totals in {len(sharing)} pairs; give a right "
            "and a total to each pair, and at least one total above 0."
        )
    right, total = right.double(), total.double()
    summed = float(total.sum())
    value = float(right.sum()) / summed
    variance = sharing.variance((right - value * total) / summed)
    spread = value * (1 - value)
    independent = sharing.independent
    n = min(spread / variance, summed) if variance > 0 and spread > 0 else float(min(independent, summed))
    z = t_quantile(max(independent - 1, 1))
    center = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(spread / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Share(value, max(0.0, center - half), min(1.0, center + half), round(summed))


def t_quantile(degrees: int, z: float = 1.959964) -> float:
    """Return the quantile of Student's t at the probability where that of the normal distribution is `z`.

    Exact for 1 and 2 degrees of freedom, right to 0.004 for 3, and better for more (Abramowitz, Stegun 1964, 26.7.5).

    >>> round(t_quantile(1), 3), round(t_quantile(10), 3), round(t_quantile(1000), 3)
    (12.706, 2.228, 1.962)
    """
    p = 0.5 * (1 + erf(z / sqrt(2)))
    if degrees == 1:
        return tan(pi * (p - 0.5))
    if degrees == 2:
        return (2 * p - 1) * sqrt(2 / (4 * p * (1 - p)))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))
