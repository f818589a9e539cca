"""Decoupled knowledge distillation (DKD): separate weights for the label and for the other classes.

Let p be the teacher's softened probability of the label y. The divergence of knowledge distillation is, example by
example, the sum of a part for the label against all others and a part among the others,

    KL(teacher ‖ student) = TCKD + (1 − p) NCKD
    TCKD = KL between the binary distributions (p_y, 1 − p_y) of teacher and student
    NCKD = KL between the softmaxes of teacher and student over the classes other than y.

The factor 1 − p silences the second part where the teacher is sure. DKD weighs the two on their own: α TCKD + β NCKD,
each times τ².

Zhao et al. 2022 (arXiv:2203.08679), section 3.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from distill.errors import DistillError
from distill.losses.common import find_labelled, keep, kept_numbers, loss, same_shapes, soften, spread
from distill.losses.response import binary_kl, forward_kl
from distill.precision import widen


@loss
@same_shapes
def tckd(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    labels: Shaped[Tensor, "..."],
    temperature: float | Float[Tensor, ""] = 1.0,
    reduction: str = "mean",
) -> Float[Tensor, "*out"]:
    """Target class: KL(teacher ‖ student) [nats / position] of "the label or another", (p_y, 1 − p_y), times τ².

    Args:
        student_logits: `[B, C]`, or `[B, T, V]` for token models.
        teacher_logits: the same shape. It is not detached: run the teacher under `torch.no_grad`.
        labels: `[B]` or `[B, T]`: classes from 0 to C − 1, or −100 for a position that does not count.
        temperature: τ, divides both logits.
        reduction: `"mean"` over the positions that count; `"none"` returns one value a position, 0 where left out.

    Zhao et al. 2022 (arXiv:2203.08679), equation 6.

    >>> tckd(torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([0])).item()  # ½ ln 1.5 + ½ ln 0.75
    0.0588...
    """
    return _weigh_part("tckd", _label_kl, (student_logits, teacher_logits, labels), temperature, reduction)


@loss
@same_shapes
def nckd(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    labels: Shaped[Tensor, "..."],
    temperature: float | Float[Tensor, ""] = 1.0,
    reduction: str = "mean",
) -> Float[Tensor, "*out"]:
    """Non-target classes: KL(teacher ‖ student) [nats / position] among the classes other than the label, times τ².

    Arguments as for `tckd`. With two classes there is one other class, so value and gradient are 0.

    Zhao et al. 2022 (arXiv:2203.08679), equation 6.

    >>> nckd(torch.zeros(1, 3), torch.tensor([[9.0, 3.0, 1.0]]).log(), torch.tensor([0])).item()
    0.1308...
    """
    return _weigh_part("nckd", _others_kl, (student_logits, teacher_logits, labels), temperature, reduction)


@loss
@same_shapes
def dkd(  # noqa: PLR0917 (as in the paper's formula)
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    labels: Shaped[Tensor, "..."],
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Float[Tensor, ""] = 4.0,
) -> Float[Tensor, ""]:
    """α TCKD + β NCKD [nats / position], each times τ²; without the paper's cross-entropy and warm-up.

    Arguments as for `tckd`. With two classes it is α times `kd`.

    Zhao et al. 2022 (arXiv:2203.08679), equation 7; the paper's β is 8, 6 or 2 by pair, and 0.5 with τ 1 on ImageNet.

    >>> logits = torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 1.0]]).log()
    >>> dkd(*logits, torch.tensor([0]), temperature=1.0).item()  # 1 · TCKD + 8 · 0
    0.0588...
    """
    if not (math.isfinite(alpha) and math.isfinite(beta)):
        raise DistillError(f"dkd needs finite weights: alpha={alpha}, beta={beta}; the paper's are alpha=1, beta=8.")
    arguments = student_logits, teacher_logits, labels
    target = _weigh_part("dkd", _label_kl, arguments, temperature, "mean")
    return alpha * target + beta * _weigh_part("dkd", _others_kl, arguments, temperature, "mean")


def _weigh_part(
    name: str,
    part: Callable[[Tensor, Tensor, Tensor], Tensor],
    arguments: tuple[Tensor, Tensor, Tensor],
    temperature: float | Float[Tensor, ""],
    reduction: str,
) -> Tensor:
    """Return a part of the divergence times τ², over the positions that have a label.

    Args:
        name: of the loss, for errors.
        part: `_label_kl` or `_others_kl`.
        arguments: the logits of student and teacher, and the labels.
        temperature: τ.
        reduction: `"mean"` or `"none"`.
    """
    student_logits, teacher_logits, labels = arguments
    if student_logits.shape[-1] < 2:
        raise DistillError(
            f"{name} compares the label with the other classes, and there are none: student_logits "
            f"{tuple(student_logits.shape)}; for one logit an example use multi_label_kd."
        )
    is_labelled = find_labelled(name, student_logits, labels)
    student, teacher = (soften(name, keep(z, is_labelled), temperature) for z in (student_logits, teacher_logits))
    parts = part(student, teacher, kept_numbers(labels, is_labelled).long())
    values = (parts * temperature**2).to(widen(student_logits).dtype)
    if reduction == "mean":
        return values.mean()
    if reduction == "none":
        return spread(values, is_labelled, labels.shape)
    raise DistillError(f"{name} has no reduction={reduction!r}; use reduction='mean' or 'none'.")


def _label_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """TCKD [nats] at each position, without τ²."""
    return binary_kl(*(_label(z, labels) - _others(z, labels).logsumexp(-1) for z in (student, teacher)))


def _others_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """NCKD [nats] at each position, without τ²."""
    return forward_kl(*(_others(z, labels).log_softmax(-1) for z in (student, teacher)))


def _label(logits: Float[Tensor, "N classes"], labels: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the logit of each label."""
    return logits.gather(-1, labels[:, None])[:, 0]


def _others(logits: Float[Tensor, "N classes"], labels: Int[Tensor, " N"]) -> Float[Tensor, "N others"]:
    """Return the logits of the classes other than the label.

    They are gathered and not masked: −∞ in place of the label gives NaN, and a large negative number leaves a rest.
    """
    first = torch.arange(logits.shape[-1] - 1, device=logits.device)
    return logits.gather(-1, first + (first >= labels[:, None]))
