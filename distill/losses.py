"""Pure losses between what a student and a teacher computed: tensors in, one scalar out.

Every loss averages over positions: over the batch for `[B, C]`, over the tokens that `mask` keeps for `[B, T, V]`, so
that padding changes nothing. Half precision is widened to float32 before anything is computed, and so is the value.
"""

import math
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional

from distill.errors import DistillError

P = ParamSpec("P")

Divergence = Callable[[Tensor, Tensor], Tensor]
"""From the log-probabilities of student and teacher, `[*batch, classes]`, to one value a position, `[*batch]`."""

WAYS_OUT = {
    "classes": "give both models the same label set, or keep the classes they share, as with logits[..., :2]",
    "width": "project one first, as with torch.nn.Linear(student.shape[-1], teacher.shape[-1])(student)",
}


def _same_shapes(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Make a loss refuse tensors that do not fit together, before the shapes in its annotations are looked at."""
    expected = signature(loss)
    axis = next(iter(expected.parameters.values())).annotation.dim_str.split()[-1]

    @wraps(loss)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        _refuse_mismatch(loss.__name__, expected.bind(*args, **kwargs).arguments, axis)
        return loss(*args, **kwargs)

    return checked


def _refuse_mismatch(name: str, given: dict[str, Any], axis: str) -> None:
    (one, student), (other, teacher) = list(given.items())[:2]
    found = f"{one} {tuple(student.shape)}, {other} {tuple(teacher.shape)}"
    if student.shape[:-1] != teacher.shape[:-1]:
        raise DistillError(
            f"{name} compares position by position, but the batches differ: {found}; run both on the same inputs."
        )
    if student.shape[-1] != teacher.shape[-1]:
        raise DistillError(f"{name} needs the same {axis} on both sides: {found}; {WAYS_OUT[axis]}.")
    mask = given.get("mask")
    if mask is not None and mask.shape != student.shape[:-1]:
        raise DistillError(
            f"{name} needs one mask entry a position, but mask is {tuple(mask.shape)}: {found}; "
            f"pass one of shape {tuple(student.shape[:-1])}, as inputs['attention_mask'] of the same inputs."
        )


def _widened(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """The positions that the mask keeps, `[N, width]`, in at least single precision; padding never enters a graph."""
    kept = rearrange(values, "... width -> (...) width") if mask is None else values[mask.bool()]
    if len(kept) == 0:
        raise DistillError(
            f"No position is left to average over: 0 of {values.shape[:-1].numel()} are kept of {tuple(values.shape)}; "
            "skip this batch, or check that the mask is 1 (a label not -100) where a position counts."
        )
    return _widened(kept)


def _expectation(log_probabilities: Tensor, values: Tensor) -> Tensor:
    """Mean of the values under the probabilities; a class of probability 0 adds 0, not 0 · ∞."""
    return (log_probabilities.exp() * values.masked_fill(log_probabilities == -math.inf, 0)).sum(-1)


@_same_shapes
def forward_kl(
    student: Float[Tensor, "*batch classes"], teacher: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch"]:
    """KL(teacher ‖ student) [nats] at each position, from log-probabilities: cover all that the teacher does.

    Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 2.

    >>> forward_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()).item()
    0.1308...
    """
    return _expectation(teacher, teacher - student)


@_same_shapes
def reverse_kl(
    student: Float[Tensor, "*batch classes"], teacher: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch"]:
    """KL(student ‖ teacher) [nats] at each position, from log-probabilities: stay where the teacher is.

    Agarwal et al. 2023 (arXiv:2306.13649), section 2.

    >>> reverse_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()).item()
    0.1438...
    """
    return _expectation(student, student - teacher)


@_same_shapes
def jensen_shannon(
    student: Float[Tensor, "*batch classes"], teacher: Float[Tensor, "*batch classes"], beta: float = 0.5
) -> Float[Tensor, "*batch"]:
    """β KL(teacher ‖ m) + (1 − β) KL(student ‖ m) [nats], m = β teacher + (1 − β) student, from log-probabilities.

    Divided by β it tends to the forward KL as β → 0, divided by 1 − β to the reverse KL as β → 1; at most ln 2 for
    β = 1/2. Another β is given as `kd(..., divergence=partial(jensen_shannon, beta=0.1))`.

    Agarwal et al. 2023 (arXiv:2306.13649), section 2, generalised Jensen–Shannon divergence.

    >>> apart = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
    >>> jensen_shannon(*apart).item()  # ln 2
    0.6931...
    """
    if not 0 < beta < 1:
        raise DistillError(
            f"jensen_shannon needs 0 < beta < 1, where it is not identically 0: beta={beta}; "
            "for the limits use divergence=forward_kl (beta to 0) or divergence=reverse_kl (beta to 1)."
        )
    floor = torch.finfo(student.dtype).min / 2  # the gradient of logaddexp(−inf, −inf) is NaN
    mixture = torch.logaddexp(teacher.clamp(min=floor) + math.log(beta), student.clamp(min=floor) + math.log1p(-beta))
    return beta * _expectation(teacher, teacher - mixture) + (1 - beta) * _expectation(student, student - mixture)


@_same_shapes
def kd(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    temperature: float = 1.0,
    reduction: str = "batchmean",
    scale_t2: bool = True,
    *,
    mask: Shaped[Tensor, "*batch"] | None = None,
    divergence: Divergence = forward_kl,
) -> Float[Tensor, "*out"]:
    """Divergence [nats / position] between the softened student and the softened teacher, times temperature².

    Args:
        student_logits: `[B, C]`, or `[B, T, V]` for token models.
        teacher_logits: the same shape. It is not detached: run the teacher under `torch.no_grad`.
        temperature: divides both logits before the softmax.
        reduction: `"batchmean"` averages over positions (the B examples, or the tokens that the mask keeps); `"mean"`
            divides that by the number of classes too, so it weighs 1/C of what is written; `"none"` returns one value a
            position, 0 where masked.
        scale_t2: multiply by temperature², which keeps the gradient's size when the temperature changes.
        mask: one entry a position, 0 or False where it does not count, as the attention mask of a tokenizer.
        divergence: `forward_kl`, `reverse_kl`, `jensen_shannon`, or your own from log-probabilities to `[*batch]`.

    Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 2.

    >>> kd(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()).item()  # 0.75 ln 1.5 + 0.25 ln 0.5
    0.1308...
    """
    if not temperature > 0:
        raise DistillError(f"kd needs a temperature above 0: temperature={temperature}; temperature=1 softens nothing.")
    student = (_kept(student_logits, mask) / temperature).log_softmax(-1)
    teacher = (_kept(teacher_logits, mask) / temperature).log_softmax(-1)
    values = divergence(student, teacher) * (temperature**2 if scale_t2 else 1)
    if reduction == "batchmean":
        return values.mean()
    if reduction == "mean":
        return values.mean() / student_logits.shape[-1]
    if reduction == "none" and mask is None:
        return values.reshape(student_logits.shape[:-1])
    if reduction == "none" and mask is not None:
        return values.new_zeros(mask.shape).masked_scatter(mask.bool(), values)
    raise DistillError(f"kd has no reduction={reduction!r}; use reduction='batchmean', 'mean' or 'none'.")


@_same_shapes
def squared_error(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    *,
    mask: Shaped[Tensor, "*batch"] | None = None,
) -> Float[Tensor, ""]:
    """Squared distance between logits, ‖z_s − z_t‖² [logit² / position]: sum over classes, mean over positions, no ½.

    Ba, Caruana 2014 (arXiv:1312.6184), section 2.2, which writes half of it. On centred logits it is 2C times the limit
    of `kd` for an infinite temperature (Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.1).

    >>> student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    >>> squared_error(student, teacher).item()  # (5 + 9) / 2
    7.0
    """
    return (_kept(student_logits, mask) - _kept(teacher_logits, mask)).square().sum(-1).mean()


def cross_entropy(logits: Float[Tensor, "... classes"], labels: Int[Tensor, "..."]) -> Float[Tensor, ""]:
    """Cross-entropy [nats / position] under the labels, averaged over the positions whose label is not −100.

    Args:
        logits: `[B, C]`, or `[B, T, V]` for token models.
        labels: `[B]` or `[B, T]`: classes from 0 to C − 1, or −100 for a position that does not count.

    >>> cross_entropy(torch.tensor([[3.0, 1.0], [9.0, 0.0]]).log_softmax(-1), torch.tensor([0, -100])).item()
    0.1269...
    """
    if logits.shape[:-1] != labels.shape:
        raise DistillError(
            f"cross_entropy needs one label a position: logits {tuple(logits.shape)}, labels {tuple(labels.shape)}; "
            f"give labels of shape {tuple(logits.shape[:-1])}, -100 where a position does not count."
        )
    counted = labels != -100
    outside = labels[counted & ((labels < 0) | (labels >= logits.shape[-1]))]
    if len(outside):
        raise DistillError(
            f"cross_entropy met label {outside[0].item()}, but the logits have {logits.shape[-1]} classes "
            f"(0 to {logits.shape[-1] - 1}); map the labels to them, or set -100 where a position does not count."
        )
    return functional.cross_entropy(_kept(logits, counted), labels[counted].long())


@_same_shapes
def cosine(
    student: Float[Tensor, "*batch width"],
    teacher: Float[Tensor, "*batch width"],
    *,
    mask: Shaped[Tensor, "*batch"] | None = None,
) -> Float[Tensor, ""]:
    """1 − cosine between the vectors of student and teacher, from 0 to 2, averaged over positions.

    Sanh et al. 2019 (DistilBERT, arXiv:1910.01108), section 3, on the last hidden state of the unmasked tokens.

    >>> cosine(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 3.0]])).item()  # (0 + 1) / 2
    0.5
    """
    return 1 - functional.cosine_similarity(_kept(student, mask), _kept(teacher, mask), dim=-1).mean()


@_same_shapes
def patient(
    student_cls: Float[Tensor, "*batch width"], teacher_cls: Float[Tensor, "*batch width"]
) -> Float[Tensor, ""]:
    """Mean squared error between the L2-normalised [CLS] vectors: (2 − 2 cos) / width, averaged over batch and layers.

    Args:
        student_cls: `[B, H]`, or `[B, L, H]` for L layers at once.
        teacher_cls: the same shape.

    Sun et al. 2019 (PKD, arXiv:1908.09355), section 3.2; the mean over the width is that of the published code.

    >>> patient(torch.tensor([[7.0, 0.0]]), torch.tensor([[0.0, 0.1]])).item()  # (2 − 0) / 2
    1.0
    """
    student, teacher = (functional.normalize(_widened(vectors), dim=-1) for vectors in (student_cls, teacher_cls))
    return functional.mse_loss(student, teacher)
