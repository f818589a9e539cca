"""Proportions with their 95 % intervals: Wilson's score interval, and the bootstrap over clusters.

Of k right among n, with p = k / n, Wilson's interval is

    (p + z² / 2n ± z √(p (1 − p) / n + z² / 4n²)) / (1 + z² / n).

Wilson 1927, JASA 22; Efron, Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
"""

from dataclasses import dataclass
from math import inf, sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.errors import DistillError, checked

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
