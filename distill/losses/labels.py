"""Losses under the labels of the data: one class an example, several labels an example, or real values.

With logits z over C classes and labels y, averaged over all labels that count,

    cross_entropy = −Σ_k q_k log softmax(z)_k,    q_k = (1 − ε) [k = y] + ε / C
    binary_cross_entropy = −y log σ(z) − (1 − y) log(1 − σ(z))
    mean_squared_error = (z − y)².

ε is label smoothing: Szegedy et al. 2015 (arXiv:1512.00567), section 7.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional

from distill.errors import DistillError
from distill.losses.common import find_labelled, is_labelled, keep, kept_numbers, loss
from distill.precision import widen
from interventions import on_host


@loss
def cross_entropy(
    logits: Float[Tensor, "... classes"], labels: Shaped[Tensor, "..."], smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Cross-entropy [nats / position] under the labels, averaged over the positions whose label is not −100.

    Args:
        logits: `[B, C]`, or `[B, T, V]` for token models.
        labels: `[B]` or `[B, T]`: classes from 0 to C − 1, or −100 for a position that does not count.
        smoothing: ε from 0 to 1: the target is 1 − ε on the label plus ε / C on each of the C classes.

    Smoothing: Szegedy et al. 2015 (arXiv:1512.00567), section 7.

    >>> cross_entropy(torch.tensor([[3.0, 1.0], [9.0, 0.0]]).log_softmax(-1), torch.tensor([0, -100])).item()
    0.1269...
    """
    if not 0 <= smoothing <= 1:
        raise DistillError(
            f"cross_entropy needs a smoothing from 0 to 1: smoothing={smoothing}; smoothing=0.1 is usual, 0 is none."
        )
    counts = find_labelled("cross_entropy", logits, labels)
    targets = kept_numbers(labels, counts).long()
    return functional.cross_entropy(keep(logits, counts), targets, label_smoothing=smoothing)


@loss
def binary_cross_entropy(logits: Float[Tensor, "..."], labels: Shaped[Tensor, "..."]) -> Float[Tensor, ""]:
    """Binary cross-entropy [nats / label] of each label, averaged over all entries that are not −100.

    Args:
        logits: `[B, C]`, one logit a label.
        labels: the same shape: 1 where the label holds and 0 where not, or a probability; −100 where it does not count.

    >>> binary_cross_entropy(torch.tensor([[0.0, 9.0]]), torch.tensor([[1.0, -100.0]])).item()  # ln 2
    0.6931...
    """
    found = f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}"
    if logits.shape != labels.shape:
        raise DistillError(
            f"binary_cross_entropy needs one label a logit: {found}; for one class an example use cross_entropy, or "
            "give torch.nn.functional.one_hot(labels, logits.shape[-1])."
        )
    counts, here = is_labelled(labels), on_host(labels)
    answers, targets = widen(kept_numbers(logits, counts)), kept_numbers(labels, counts)
    if len(targets) == 0:
        raise DistillError(
            f"No label is left to average over: {found}, none of them other than -100; skip this batch, or check that "
            "a label is 0 or 1 where it counts."
        )
    outside = here[(here != -100) & ~((here >= 0) & (here <= 1))]
    if len(outside):
        raise DistillError(
            f"binary_cross_entropy met label {outside[0].item()}, which is not from 0 to 1; set -100 where a label "
            "does not count, and use mean_squared_error for real values."
        )
    return functional.binary_cross_entropy_with_logits(answers, targets.to(answers.dtype))


@loss
def mean_squared_error(values: Float[Tensor, "..."], labels: Shaped[Tensor, "..."]) -> Float[Tensor, ""]:
    """Squared error of real values, averaged over all entries, for regression. Every label counts, −100 too.

    Args:
        values: `[B]`, `[B, 1]` or `[B, C]`.
        labels: the same shape; `[B]` fits `[B, 1]`, either way round.

    >>> mean_squared_error(torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 5.0])).item()  # (0 + 9) / 2
    4.5
    """
    found = f"values {tuple(values.shape)}, labels {tuple(labels.shape)}"
    if _without_last(values) != _without_last(labels):
        raise DistillError(
            f"mean_squared_error needs one label a value: {found}; give labels of shape {tuple(values.shape)}."
        )
    if labels.numel() == 0:
        raise DistillError(f"No value is left to average over: {found}; skip this batch.")
    answers = widen(values)
    return functional.mse_loss(answers, labels.to(answers.dtype).reshape(answers.shape))


def _without_last(values: Tensor) -> torch.Size:
    """Return the shape without a last axis of size 1: one value an example may be `[B]` or `[B, 1]`."""
    return values.shape[:-1] if values.ndim > 1 and values.shape[-1] == 1 else values.shape
