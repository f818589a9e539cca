"""Metrics: functions of a model's output that return one number for each example, as a sweep measures them.

Any function of the output is a metric. Those made here also have a name for tables and plots, and read one position:

    logit difference        mean logit of the answers − mean logit of the foils
    probability             mean of softmax(logits) at the answers
    log probability         mean of log softmax(logits) at the answers
    accuracy, agreement     1 where the highest logit is that of the answer, or of the reference
    KL                      Σ p (log p − log q), p of the reference and q of the output
    normalized              (metric − corrupted) / (clean − corrupted)

Heimersheim and Nanda 2024 (arXiv:2404.15255), section 4, compare them.

>>> import torch
>>> logits = torch.tensor([[2.0, 0.5, 0.0], [0.0, 1.0, 0.0]])
>>> logit_difference(answers=[0, 1], foils=2)(logits)
tensor([2., 1.])
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div

from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.metrics.metric_targets import ClassIds, Ids, PerExample, take
from interventions.models.answers import logits_of, unanswered
from interventions.names import shown
from interventions.positions import select
from interventions.precision import widen


@checked
@dataclass(frozen=True, eq=False)
class Metric:
    """A function of the logits at one position, with a name for tables and plots.

    It is called with the output of a model, a Run, or logits `[batch, classes]` or `[batch, token, vocabulary]`, and
    returns `[batch]`.

    Attributes:
        name: the name, with the unit in brackets.
        function: logits `[batch, classes]` at the position → `[batch]`.
        position: the token to read where there are several, counted over real tokens; −1 is the last.
        mask: `[batch, token]`, true where a token of the output is real; None takes all tokens for real.
        is_signed: True if 0 is the middle of its scale, as for differences, and False if 0 is its end.

    Raises:
        InterventionError: when called: no logits, a mask of another shape, a position on padding, or a function that
            returns something else than `[batch]`.

    >>> Metric("largest logit", lambda logits: logits.amax(-1))(torch.tensor([[2.0, 0.5], [0.0, 1.0]]))
    tensor([2., 1.])
    """

    name: str
    function: Callable[[Tensor], Tensor]
    position: int = -1
    mask: Tensor | None = None
    is_signed: bool = False

    def __call__(self, output: object) -> Float[Tensor, " batch"]:
        logits = _at(logits_of(output), self.position, self.mask)
        found = self.function(logits)
        if not isinstance(found, Tensor) or found.shape != logits.shape[:1]:
            raise InterventionError(
                f"the metric {self.name!r} returned {shown(found)} for {len(logits)} examples; return one number for "
                "each, [batch]."
            )
        return found

    def take(self, rows: Sequence[int]) -> "Metric":
        """Return the metric of the examples `rows`, of those that its targets, its reference and its mask are of.

        Raises:
            InterventionError: an example beyond them.
        """
        return replace(self, function=take(self.function, rows, "function"), mask=take(self.mask, rows, "mask"))


@checked
def logit_difference(answers: Ids, foils: Ids, *, position: int = -1, mask: Tensor | None = None) -> Metric:
    """The logit of the answer minus the logit of the foil, as a metric.

    Wang et al. 2022 (arXiv:2211.00593), section 2, where both are names in a sentence.

    Args:
        answers: class or token ids: one int for all examples, `[batch]`, or `[batch, k]`, whose k logits are averaged.
        foils: ids of the wrong answers, in the same forms.
        position: the token to read where there are several, counted over real tokens; −1 is the last.
        mask: the attention mask `[batch, token]`; needed where padding follows the tokens.

    Raises:
        InterventionError: when called: ids of another shape or outside the vocabulary; a position on padding.

    >>> logit_difference(answers=0, foils=[[1, 2]])(torch.tensor([[5.0, 1.0, 3.0]]))
    tensor([3.])
    """

    def difference(logits: Tensor, right: ClassIds, wrong: ClassIds) -> Tensor:
        return right.mean(logits) - wrong.mean(logits)

    targets = {"right": ClassIds(answers, "answers"), "wrong": ClassIds(foils, "foils")}
    return Metric("logit difference", PerExample(difference, targets), position, mask, is_signed=True)


@checked
def probability(tokens: Ids, *, position: int = -1, mask: Tensor | None = None) -> Metric:
    """The probability of an answer, as a metric: that of causal tracing (Meng et al. 2022, arXiv:2202.05262, 2.1).

    Args:
        tokens: class or token ids: one int for all examples, `[batch]`, or `[batch, k]`, whose probabilities are
            averaged.
        position: as in `logit_difference`.
        mask: as in `logit_difference`.

    Raises:
        InterventionError: when called: as `logit_difference`.

    >>> probability(1)(torch.tensor([[0.0, 0.0]]))
    tensor([0.5000])
    """

    def chance(logits: Tensor, ids: ClassIds) -> Tensor:
        return ids.mean(widen(logits).softmax(-1))

    return Metric("probability", PerExample(chance, {"ids": ClassIds(tokens, "tokens")}), position, mask)


@checked
def log_probability(tokens: Ids, *, position: int = -1, mask: Tensor | None = None) -> Metric:
    """The natural logarithm of the probability of an answer, as a metric [nats]; arguments as in `probability`.

    Heimersheim and Nanda 2024 (arXiv:2404.15255), section 4, compare it with the other metrics.

    Raises:
        InterventionError: when called: as `logit_difference`.

    >>> log_probability(1)(torch.tensor([[0.0, 0.0]]))  # −ln 2
    tensor([-0.6931])
    """

    def logarithm(logits: Tensor, ids: ClassIds) -> Tensor:
        return ids.mean(widen(logits).log_softmax(-1))

    return Metric("log probability [nats]", PerExample(logarithm, {"ids": ClassIds(tokens, "tokens")}), position, mask)


@checked
def accuracy(answers: Ids, *, position: int = -1, mask: Tensor | None = None) -> Metric:
    """1 where the answer has the highest logit, else 0, as a metric; arguments as in `probability`.

    Of several answers `[batch, k]` it is the share that has the highest logit: 1/k or 0.

    Raises:
        InterventionError: when called: as `logit_difference`; logits that are NaN or infinite.

    >>> accuracy([0, 1])(torch.tensor([[2.0, 1.0], [2.0, 1.0]]))
    tensor([1., 0.])
    """

    def correct(logits: Tensor, ids: ClassIds) -> Tensor:
        highest = rearrange(_highest(logits, "accuracy"), "batch -> batch 1")
        return reduce((ids.of(logits) == highest).float(), "batch k -> batch", "mean")

    return Metric("accuracy", PerExample(correct, {"ids": ClassIds(answers, "answers")}), position, mask)


@checked
def kl(reference: object, *, position: int = -1, mask: Tensor | None = None) -> Metric:
    """KL(reference ‖ output) of the distributions over classes or tokens, as a metric [nats]; 0 if they are equal.

    Args:
        reference: a Run, an output or logits of the same examples, e.g. the base run.
        position: as in `logit_difference`.
        mask: as in `logit_difference`.

    Raises:
        InterventionError: when called: the reference has another number of examples or classes.

    >>> kl(torch.tensor([[0.0, 0.0]]))(torch.tensor([[3.0, 1.0]]).log())  # ½ ln(½ / ¾) + ½ ln(½ / ¼)
    tensor([0.1438])
    """
    known = widen(_at(logits_of(reference), position, mask).detach()).log_softmax(-1)

    def divergence(logits: Tensor, expected: Tensor) -> Tensor:
        target = _match(expected, logits)
        each = kl_div(widen(logits).log_softmax(-1), target, reduction="none", log_target=True)
        return reduce(each, "batch classes -> batch", "sum")

    return Metric("KL [nats]", PerExample(divergence, {"expected": known}), position, mask)


@checked
def agreement(reference: object, *, position: int = -1, mask: Tensor | None = None) -> Metric:
    """1 where output and reference have their highest logit at the same class, else 0, as a metric.

    Arguments as in `kl`.

    Raises:
        InterventionError: when called: as `kl`; logits that are NaN or infinite.

    >>> agreement(torch.tensor([[0.0, 1.0]]))(torch.tensor([[3.0, 1.0]]))
    tensor([0.])
    """
    known = _at(logits_of(reference), position, mask).detach()

    def agrees(logits: Tensor, expected: Tensor) -> Tensor:
        return (_highest(_match(expected, logits), "agreement") == _highest(logits, "agreement")).float()

    return Metric("agreement", PerExample(agrees, {"expected": known}), position, mask)


@checked
def normalized(metric: Callable[[object], Tensor], clean: object, corrupted: object) -> "Normalized":
    """`metric` on a linear scale on which the corrupted run is 0 and the clean run 1.

    Heimersheim and Nanda 2024 (arXiv:2404.15255), section 4. Both ends are means over the examples, so there is one
    scale for all of them: the mean of the normalized metric is the normalized mean, and no example in which the two
    runs are close is divided by a small number.

    Args:
        metric: any function of an output.
        clean: a Run or an output, whose mean becomes 1.
        corrupted: a Run or an output, whose mean becomes 0.

    Raises:
        InterventionError: the metric is the same for both, or not finite.

    >>> clean, corrupted = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    >>> normalized(logit_difference(0, 1), clean, corrupted)(torch.tensor([[2.5, 0.0]]))
    tensor([0.7500])
    """
    low, high = (_mean(metric, run) for run in (corrupted, clean))
    if not (abs(high - low) > 0 and abs(high) < float("inf") and abs(low) < float("inf")):
        raise InterventionError(
            f"{name_of(metric)} is {high:.6g} in the clean and {low:.6g} in the corrupted run, which makes no scale; "
            "choose inputs or a metric for which the two differ."
        )
    return Normalized(metric, low, high)


@dataclass(frozen=True, eq=False)
class Normalized:
    """A metric on a linear scale on which `low` is 0 and `high` is 1.

    Attributes:
        metric: a function of an output → `[batch]`.
        low: the value that becomes 0.
        high: the value that becomes 1.
    """

    metric: Callable[[object], Tensor]
    low: float
    high: float
    is_signed: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The name for tables and plots."""
        return f"normalized {name_of(self.metric).partition(' [')[0]}"

    def __call__(self, output: object) -> Tensor:
        return (self.metric(output) - self.low) / (self.high - self.low)

    def take(self, rows: Sequence[int]) -> "Normalized":
        """Return the metric of the examples `rows`, on the same scale."""
        return replace(self, metric=take(self.metric, rows, "metric"))


def name_of(metric: object) -> str:
    """Return the name of a metric for tables and plots: its `name`, else that of the function."""
    name = str(getattr(metric, "name", getattr(metric, "__name__", type(metric).__name__)))
    return "metric" if name == "<lambda>" else name.replace("_", " ")


def _at(logits: Tensor, position: int, mask: Tensor | None) -> Tensor:
    """Return the logits at the position, `[batch, classes]`."""
    if not logits.is_floating_point() or logits.is_meta or logits.layout != torch.strided:
        raise InterventionError(
            f"{shown(logits)} ({logits.device}, {logits.layout}) holds no logits; measure the output of a model, or "
            "floating-point logits [batch, classes]."
        )
    if logits.ndim == 2:
        return logits
    if logits.ndim != 3:
        raise InterventionError(
            f"the logits have shape {list(logits.shape)}, and [batch, classes] or [batch, token, vocabulary] can be "
            "measured; write a metric of your own: metric=lambda output: …."
        )
    if mask is not None and mask.shape != logits.shape[:2]:
        raise InterventionError(
            f"mask has shape {list(mask.shape)} and the logits have [batch, token] = {list(logits.shape[:2])}; pass "
            "the attention mask of the same examples."
        )
    real = torch.ones(logits.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    chosen = select(position, real.to(logits.device))
    return logits[chosen.rows, chosen.columns]


def _highest(logits: Tensor, what: str) -> Tensor:
    """Return the class with the highest logit of each example, `[batch]`.

    Raises:
        InterventionError: logits that are NaN or infinite, for which argmax would still return a class.
    """
    wrong = int(unanswered(logits).sum())
    if wrong:
        raise InterventionError(
            f"{what} is of answers, and {wrong} of {len(logits)} are none: {int((~logits.isfinite()).sum())} of "
            f"{logits.numel()} logits are NaN or infinite; see what the model computed: run(model, inputs).logits."
        )
    return logits.argmax(-1)


def _match(expected: Tensor, logits: Tensor) -> Tensor:
    """Return the reference on the device of the logits, or raise if it has another shape."""
    if expected.shape != logits.shape:
        raise InterventionError(
            f"the reference has [batch, classes] = {list(expected.shape)} and the output {list(logits.shape)}; "
            "measure the reference on the same examples."
        )
    return expected.to(logits.device)


def _mean(metric: Callable[[object], Tensor], run: object) -> float:
    """Return the mean of a metric over the examples of a Run or an output."""
    given = run if isinstance(metric, Metric) else getattr(run, "output", run)
    found = metric(given)
    if not isinstance(found, Tensor | float | int) or (isinstance(found, Tensor) and found.ndim > 1):
        raise InterventionError(
            f"the metric {name_of(metric)} returned {shown(found)}; return one number for each example, [batch]."
        )
    return float(torch.as_tensor(found).detach().float().mean())
