"""Losses between the answers of student and teacher: divergences of softened distributions, distances of logits.

With logits z over C classes, the softened distribution p^τ = softmax(z / τ), and the mean taken over positions,

    kd = τ² KL(p_t^τ ‖ p_s^τ)                         Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 2
    soft_cross_entropy = −τ² Σ_k p_t^τ log p_s^τ      the same, and Jiao et al. 2019 (arXiv:1909.10351), section 3.2
    multi_label_kd = τ² (1/C) Σ_k KL(Bernoulli(σ(z_t,k / τ)) ‖ Bernoulli(σ(z_s,k / τ)))
    squared_error = ‖z_s − z_t‖²                      Ba, Caruana 2014 (arXiv:1312.6184), section 2.2

In `kd` another divergence can take the place of the forward KL: the reverse KL(p_s ‖ p_t), or the generalised
Jensen–Shannon divergence between the two, Agarwal et al. 2023 (arXiv:2306.13649), section 2.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional

from distill.errors import DistillError
from distill.losses.common import is_readable, keep, loss, same_shapes, soften, spread
from distill.precision import widen

Divergence = Callable[[Tensor, Tensor], Tensor]
"""From the log-probabilities of student and teacher, `[*batch, classes]`, to one value a position, `[*batch]`."""


def divergences(divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """Return a divergence at each position, `[*batch]`, from log-probabilities `[*batch, classes]`.

    Raises:
        DistillError: the function returns anything else than one value a position.
    """
    values = divergence(student, teacher)
    if not isinstance(values, Tensor) or values.shape != student.shape[:-1]:
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise DistillError(
            f"the divergence gives {found} for log-probabilities {tuple(student.shape)}; let it return one value a "
            f"position, {tuple(student.shape[:-1])}, as divergence=forward_kl does."
        )
    return values


def _expectation(log_probabilities: Tensor, values: Tensor) -> Tensor:
    """Mean of the values under the probabilities; a class of probability 0 adds 0, not 0 · ∞."""
    if not _are_above_zero(log_probabilities):
        values = values.masked_fill(torch.isneginf(log_probabilities), 0)
    return (log_probabilities.exp() * values).sum(-1)


def _are_above_zero(log_probabilities: Tensor) -> bool:
    """Return whether no class is known to have the probability 0, where it costs no wait to see that.

    To leave the mask out spares a third of the loss of a language model, forward and backward.
    """
    if not is_readable(log_probabilities) or not log_probabilities.numel():
        return False
    return float(log_probabilities.detach().amin()) > -math.inf  # False for NaN too


@loss
@same_shapes
def forward_kl(
    student: Float[Tensor, "*batch classes"], teacher: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch"]:
    """KL(teacher ‖ student) [nats] at each position, from log-probabilities.

    It is large where the student finds improbable what the teacher finds probable.

    Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 2.

    >>> forward_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()).item()
    0.1308...
    """
    return _expectation(teacher, teacher - student)


@loss
@same_shapes
def reverse_kl(
    student: Float[Tensor, "*batch classes"], teacher: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch"]:
    """KL(student ‖ teacher) [nats] at each position, from log-probabilities.

    It is large where the student finds probable what the teacher finds improbable.

    Agarwal et al. 2023 (arXiv:2306.13649), section 2.

    >>> reverse_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()).item()
    0.1438...
    """
    return _expectation(student, student - teacher)


@loss
@same_shapes
def jensen_shannon(
    student: Float[Tensor, "*batch classes"],
    teacher: Float[Tensor, "*batch classes"],
    beta: float | Float[Tensor, ""] = 0.5,
) -> Float[Tensor, "*batch"]:
    """β KL(teacher ‖ m) + (1 − β) KL(student ‖ m) [nats], m = β teacher + (1 − β) student, from log-probabilities.

    β is that of `generalized_jsd_loss` in TRL, which takes the forward KL at β = 0 and the reverse KL at β = 1.
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
    # Finite, as the gradient of logaddexp(−inf, −inf) is NaN.
    finite_student, finite_teacher = (logs.clamp(min=torch.finfo(logs.dtype).min / 2) for logs in (student, teacher))
    mixture = torch.logaddexp(finite_teacher + math.log(beta), finite_student + math.log1p(-beta))
    return beta * _expectation(teacher, teacher - mixture) + (1 - beta) * _expectation(student, student - mixture)


@loss
@same_shapes
def kd(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    temperature: float | Float[Tensor, ""] = 1.0,
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
        divergence: `forward_kl`, `reverse_kl`, `jensen_shannon`, or a function like them.

    Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 2.

    >>> kd(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()).item()  # 0.75 ln 1.5 + 0.25 ln 0.5
    0.1308...
    """
    student = soften("kd", keep(student_logits, mask), temperature).log_softmax(-1)
    teacher = soften("kd", keep(teacher_logits, mask), temperature).log_softmax(-1)
    scale = temperature**2 if scale_t2 else 1
    values = (divergences(divergence, student, teacher) * scale).to(widen(student_logits).dtype)
    if reduction == "batchmean":
        return values.mean()
    if reduction == "mean":
        return values.mean() / student_logits.shape[-1]
    if reduction == "none":
        return spread(values, mask, student_logits.shape[:-1])
    raise DistillError(f"kd has no reduction={reduction!r}; use reduction='batchmean', 'mean' or 'none'.")


@loss
@same_shapes
def multi_label_kd(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    temperature: float | Float[Tensor, ""] = 1.0,
    reduction: str = "batchmean",
    scale_t2: bool = True,
    *,
    mask: Shaped[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*out"]:
    """KL(teacher ‖ student) [nats / label] of each label's presence, averaged over labels, times temperature².

    `kd` for classifiers with several labels an example: each label is softened by a sigmoid, σ(z / temperature).

    Args:
        student_logits: `[B, C]`, one logit a label.
        teacher_logits: the same shape, not detached.
        temperature: divides both logits before the sigmoid.
        reduction: `"batchmean"` averages over positions and labels, and so does `"mean"`; `"none"` returns one value a
            position, 0 where masked.
        scale_t2: multiply by temperature².
        mask: one entry a position, 0 or False where it does not count.

    After Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 2, label by label.

    >>> multi_label_kd(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()).item()  # (0.75 ln 1.5 + 0.25 ln 0.5) / 2
    0.0654...
    """
    logits = (soften("multi_label_kd", keep(z, mask), temperature) for z in (student_logits, teacher_logits))
    values = (binary_kl(*logits).mean(-1) * (temperature**2 if scale_t2 else 1)).to(widen(student_logits).dtype)
    if reduction in ("batchmean", "mean"):
        return values.mean()
    if reduction == "none":
        return spread(values, mask, student_logits.shape[:-1])
    raise DistillError(f"multi_label_kd has no reduction={reduction!r}; use reduction='batchmean', 'mean' or 'none'.")


def binary_kl(student: Float[Tensor, "*any"], teacher: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """KL(σ(teacher) ‖ σ(student)) [nats] of binary variables, from their logits log(p / (1 − p)), entry by entry."""
    both = (torch.stack([functional.logsigmoid(z), functional.logsigmoid(-z)], -1) for z in (student, teacher))
    return forward_kl(*both)


@loss
@same_shapes
def soft_cross_entropy(
    student: Float[Tensor, "*batch classes"],
    teacher: Float[Tensor, "*batch classes"],
    temperature: float | Float[Tensor, ""] = 1.0,
    *,
    mask: Shaped[Tensor, "*batch"] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy [nats / position] of the softened student under the softened teacher, times temperature².

    It is `kd` plus temperature² times the entropy of the softened teacher, so the student's gradient is that of `kd`.

    Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 2; Jiao et al. 2019 (TinyBERT, arXiv:1909.10351), section
    3.2, prediction layer.

    >>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()).item()  # ln 2
    0.6931...
    """
    student, teacher = (
        soften("soft_cross_entropy", keep(logits, mask), temperature).log_softmax(-1) for logits in (student, teacher)
    )
    return -_expectation(teacher, student).mean() * temperature**2


@loss
@same_shapes
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
    return (keep(student_logits, mask) - keep(teacher_logits, mask)).square().sum(-1).mean()
