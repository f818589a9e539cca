"""Calibration: whether the confidence of a model is its accuracy, as a figure and as the reliability diagram.

Answers are sorted into bins by their confidence, the probability of the class that was answered. The error is

    ECE = Σ_b n_b / n · |accuracy of bin b − mean confidence of bin b|

Guo, Pleiss, Sun, Weinberger 2017 (arXiv:1706.04599), section 2, equation 3.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import reduce
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from distill.errors import DistillError, checked
from distill.evaluation.answers.labelled_answers import labelled_answers
from distill.models.outputs import answered
from distill.statistics.intervals import Share, wilson
from distill.statistics.tables import table_of
from interventions import Picture, Result, plain_data

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Bin:
    """The answers whose confidence lies in (low, high].

    Attributes:
        low, high: the edges, from 0 to 1.
        count: how many answers there are, at least one.
        accuracy: the share of them that is right.
        confidence: their mean confidence.
    """

    low: float
    high: float
    count: int
    accuracy: float
    confidence: float


@checked
@dataclass(frozen=True)
class Calibration(Result):
    """The calibration of a classifier: how far its confidence is from its accuracy.

    Attributes:
        error: the expected calibration error, from 0 to 1.
        accuracy: how often its most probable class is the label.
        confidence: the mean probability of that class. Above the accuracy, the model is overconfident.
        bins: by confidence, for the reliability diagram; empty where only the figures are known.

    >>> print(Calibration(0.05, Share(0.9, 0.88, 0.92, 1000), 0.95))
    calibration error 0.050: accuracy 0.900 [0.880, 0.920], confidence 0.950
    """

    error: float
    accuracy: Share
    confidence: float
    bins: tuple[Bin, ...] = ()

    def __post_init__(self) -> None:
        if not (0 <= self.error <= 1 and 0 <= self.confidence <= 1):
            raise DistillError(
                f"Calibration(error={self.error}, confidence={self.confidence}) has values that are not from 0 to 1; "
                "use calibration(model, data)."
            )

    def plot(self) -> Picture:
        """Draw the reliability diagram: the accuracy of each bin over its confidence, and how many answers it holds.

        Guo, Pleiss, Sun, Weinberger 2017 (arXiv:1706.04599), figure 1. Without bins, one point for all answers.
        """
        figure = Picture(figsize=(3.8, 3.6), dpi=110, layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="0.6", lw=1, ls="--", label="calibrated")
        most = max((each.count for each in self.bins), default=1)
        for number, each in enumerate(self.bins):
            depth = 0.25 + 0.75 * each.count / most
            middle, width = (each.low + each.high) / 2, each.high - each.low
            name = None if number else "answers of a bin"
            axes.bar(middle, each.accuracy, width, color="#4477aa", alpha=depth, label=name)
        axes.plot([self.confidence], [self.accuracy.value], "o", color="#ee6677", label="all answers")
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        axes.set_title(f"calibration error {self.error:.3f}", fontsize=9)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Return error, accuracy, confidence and the bins as plain data, for JSON."""
        return plain_data(asdict(self))

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the bins as a table: a row for each that holds answers; without bins one row for all answers.

        Raises:
            DistillError: pandas is not installed.
        """
        everything = Bin(0.0, 1.0, self.accuracy.count, self.accuracy.value, self.confidence)
        return table_of((vars(each) for each in self.bins or (everything,)), "low", "high")

    def __str__(self) -> str:
        return f"calibration error {self.error:.3f}: accuracy {self.accuracy}, confidence {self.confidence:.3f}"


@checked
def calibration(
    model: nn.Module, data: Any, *, bins: int = 15, batch_size: int = 128, answers: Any = None
) -> Calibration:
    """Measure the expected calibration error of `model` on rows (of token models, on labelled tokens).

    `data` and `answers` are those of `accuracy`.

    Raises:
        DistillError: data without labels, or no bins.
    """
    confidences, correct = [], []
    with answered((model,), answers):
        for logits, labels, _ in labelled_answers(model, data, batch_size, "calibration"):
            if logits.shape[-1] < 2:
                raise DistillError("calibration is of classes, and this model has one output; use it for a classifier.")
            confidence, chosen = logits.cpu().double().softmax(-1).max(-1)  # in float32 sure answers would all be 1
            confidences.append(confidence)
            correct.append(chosen == labels.cpu())
    return calibration_of(torch.cat(confidences), torch.cat(correct), bins)


def calibration_of(
    confidence: Float[Tensor, " examples"], right: Shaped[Tensor, " examples"], bins: int = 15
) -> Calibration:
    """Return the calibration of answers: the confidence of each, and whether it was right."""
    error = expected_calibration_error(confidence, right, bins)
    return Calibration(
        float(error),
        wilson(int(right.sum()), len(right)),
        float(confidence.mean()),
        _bins_of(confidence, right, bins),
    )


@checked
def expected_calibration_error(
    confidence: Float[Tensor, " examples"], correct: Shaped[Tensor, " answers"], bins: int = 15
) -> Float[Tensor, ""]:
    """Return the expected calibration error: Σ over bins of their share of the examples × |accuracy − confidence|.

    Guo, Pleiss, Sun, Weinberger 2017 (arXiv:1706.04599), section 2, equation 3. Bins are equally wide; an edge belongs
    to the bin below it, (low, high], and 0 to the first. Edges have the dtype of the confidences, so 0.9 in float32
    lies on the edge 0.9.

    Args:
        confidence: the probability of the class that was answered.
        correct: whether it was right.
        bins: how many there are between 0 and 1.

    Returns:
        The error in float64, from 0 to 1.

    Raises:
        DistillError: no bins, no examples, another number of answers, or a confidence that is no probability.

    >>> expected_calibration_error(torch.tensor([0.9, 0.9, 0.6, 0.6]), torch.tensor([1, 0, 1, 1]), bins=10)
    tensor(0.4000, dtype=torch.float64)
    """
    if bins < 1 or not len(confidence) or len(confidence) != len(correct):
        raise DistillError(
            f"{bins} bins of {len(confidence)} confidences and {len(correct)} answers have no calibration error; give "
            "one answer to each confidence, at least one, and bins=15."
        )
    if not ((confidence >= 0) & (confidence <= 1)).all():  # also where one is NaN
        wrong = float(confidence[~((confidence >= 0) & (confidence <= 1))][0])
        raise DistillError(f"a confidence is {wrong:.6g}, which is no probability; take the softmax of the logits.")
    bin_of = _numbers_of(confidence, bins)
    gaps = correct.double() - confidence.double()
    sums = torch.zeros(bins, dtype=torch.float64, device=gaps.device).index_add(0, bin_of, gaps)
    return reduce(sums.abs(), "bins -> ", "sum") / len(gaps)


def _numbers_of(confidence: Float[Tensor, " examples"], bins: int) -> Int[Tensor, " examples"]:
    """Return the number of the bin, from 0, in which each confidence lies."""
    edges = torch.tensor([i / bins for i in range(1, bins)], dtype=confidence.dtype, device=confidence.device)
    return torch.bucketize(confidence, edges)


def _bins_of(
    confidence: Float[Tensor, " examples"], correct: Shaped[Tensor, " examples"], bins: int
) -> tuple[Bin, ...]:
    """Return the bins that hold answers, from the lowest confidence."""
    numbers = _numbers_of(confidence, bins)
    found = []
    for number in numbers.unique().tolist():
        inside = numbers == number
        found.append(
            Bin(
                number / bins,
                (number + 1) / bins,
                int(inside.sum()),
                float(correct[inside].double().mean()),
                float(confidence[inside].double().mean()),
            )
        )
    return tuple(found)
