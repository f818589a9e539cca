"""How well a model answers: shares with their intervals."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.errors import DistillError
from distill.inputs import device_of, inputs_of, to_device
from distill.tasks import Rows
from interventions import run

RESAMPLES = 1000


@dataclass(frozen=True)
class Share:
    """A share of `count` examples with its 95 % interval.

    >>> print(Share(0.9, 0.88, 0.92, 1000))
    0.900 [0.880, 0.920]
    """

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def accuracy(model: nn.Module, data: Rows, *, batch_size: int = 128) -> Share:
    """The share of rows (of labelled tokens, for token models) that `model` answers right, with its Wilson interval.

    Raises:
        DistillError: data without labels.
    """
    if "labels" not in data.columns:
        raise DistillError(f"accuracy needs a column 'labels' and the data has {', '.join(data.columns)}.")
    right = total = 0
    with evaluating(model), torch.no_grad():
        for rows in batches(len(data), batch_size):
            batch = to_device(data.batch(rows), device_of(model))
            answers = run(model, inputs_of(model, batch), resumable=False).logits.argmax(-1)
            counted = batch["labels"] != -100
            right += int((answers == batch["labels"])[counted].sum())
            total += int(counted.sum())
    if not total:
        raise DistillError(f"accuracy needs a label that is not -100, and none of the {len(data)} rows has one.")
    return wilson(right, total)


def has_classes(data: Rows) -> bool:
    """Whether the labels of the rows are classes, not numbers to regress on."""
    labels = data.table.get("labels")
    return labels is not None and not (labels if isinstance(labels, Tensor) else labels[0]).is_floating_point()


def wilson(right: int, total: int, z: float = 1.959964) -> Share:
    """A share with its Wilson score interval (Wilson 1927, JASA 22).

    >>> print(wilson(90, 100))
    0.900 [0.826, 0.945]
    """
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return Share(share, centre - half, centre + half, total)


def bootstrap(
    right: Float[Tensor, " examples"], total: Float[Tensor, " examples"], clusters: Int[Tensor, " examples"], seed: int
) -> Share:
    """A share with its percentile bootstrap interval, whole clusters drawn with replacement.

    Args:
        right, total: sums of each example.
        clusters: which examples belong together, from 0, e.g. because they share their base.

    Efron, Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
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


def batches(count: int, size: int) -> Iterator[Int[Tensor, " batch"]]:
    """The numbers from 0 to count − 1, in order, `size` at a time."""
    yield from torch.arange(count).split(size)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; every module is put back in its own mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
