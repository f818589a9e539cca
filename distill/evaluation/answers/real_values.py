"""The figures of real values: mean squared error, and the correlation with the labels, of values and of ranks.

Pearson: the covariance over the product of the standard deviations. Spearman: Pearson of the ranks, of equal values
their mean rank. Of several values a row they are the means over the values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from distill.data.missing import IGNORED
from distill.errors import DistillError


@dataclass(frozen=True)
class RealValues:
    """The figures of real values.

    Attributes:
        mse: the mean squared error.
        pearson: the correlation with the labels; None where it does not exist, as of equal numbers or a single row.
        spearman: that of the ranks.
    """

    mse: float
    pearson: float | None
    spearman: float | None


def real_values(parts: Sequence[tuple[Float[Tensor, "rows values"], Shaped[Tensor, "..."]]]) -> RealValues | None:
    """Return the figures of answers under labels; None where there is no row with a label.

    Rows with a whole label of −100, which stands for a missing one, are left out.

    Args:
        parts: answers and labels of some rows each; `[rows]` fits `[rows, 1]`.

    Raises:
        DistillError: labels of another shape.

    >>> found = real_values([(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 3.0, 4.0]))])
    >>> [round(each, 3) for each in vars(found).values()]  # mse, Pearson, Spearman
    [0.333, 0.929, 1.0]
    """
    answers, labels = [], []
    for found, wanted in parts:
        if wanted.numel() != found.numel():
            raise DistillError(
                f"real values need one label a value: answers {list(found.shape)}, labels {list(wanted.shape)}; give "
                f"labels of shape {list(found.shape)}."
            )
        given = wanted.reshape(found.shape)
        kept = given.new_ones(len(given), dtype=torch.bool)
        kept = kept if given.is_floating_point() else (given != IGNORED).all(1)
        answers.append(found[kept].double().cpu().numpy())
        labels.append(given[kept].double().cpu().numpy())
    if not sum(map(len, answers)):
        return None
    one, other = np.concatenate(answers), np.concatenate(labels)
    ranked = (_ranks(one), _ranks(other))
    return RealValues(float(((one - other) ** 2).mean()), _correlation(one, other), _correlation(*ranked))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value in its column, of equal values their mean rank."""
    from scipy.stats import rankdata  # type: ignore[import-untyped]

    return np.asarray(rankdata(values, axis=0))


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return the mean correlation of the columns of two arrays; None where one of them is constant."""
    one, other = (each - each.mean(0) for each in (one, other))
    sizes = np.sqrt((one**2).sum(0)) * np.sqrt((other**2).sum(0))
    if (sizes == 0).any() or not np.isfinite(sizes).all():
        return None
    return float(np.clip((one * other).sum(0) / sizes, -1, 1).mean())
