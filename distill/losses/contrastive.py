"""Contrastive losses: a student's features of an example should single out the teacher's features of the same example.

ICD compares the L2-normalised features u of the student and v of the teacher among the n examples of a batch. With the
similarities S = s u vᵀ, where s is 1 / temperature,

    contrast = CE(S, diagonal) = −(1/n) Σ_i log P₁[i, i]
    invariance = (1/n) Σ_i KL(P₂[i] ‖ P₁[i]),    P₁ = softmax of the rows of S,    P₂ = softmax of the rows of Sᵀ.

Giakoumoglou, Stathaki 2024 (arXiv:2407.11802), section 3.

CRD decides by noise-contrastive estimation whether a pair of features belongs to one example or is one of m pairs with
examples drawn from N. With the scores P⁺ of the true pair and P⁻ of the m others, and ε = 1e-7,

    nce = −mean [log P⁺ / (P⁺ + m/N + ε) + Σ log (m/N) / (P⁻ + m/N + ε)].

Tian, Krishnan, Isola 2019 (arXiv:1910.10699), section 3.2.
"""

import math

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from distill.errors import DistillError
from distill.losses.common import loss, same_shapes
from distill.losses.response import Divergence, divergences, forward_kl
from distill.precision import widen

EPSILON = 1e-7


@loss
@same_shapes
def contrast(
    student: Float[Tensor, "batch width"],
    teacher: Float[Tensor, "batch width"],
    scale: float | Float[Tensor, ""],
    *,
    bias: float | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, ""]:
    """Cross-entropy [nats / example] of choosing each example's teacher features among those of the batch.

    Args:
        student: `[B, d]`, L2-normalised.
        teacher: `[B, d]`, L2-normalised, the same examples in the same order; the others are the negatives.
        scale: multiplies the cosines: 1 / temperature, as a number or learned.
        bias: added to all logits, as the published code learns one; it changes nothing.

    Giakoumoglou, Stathaki 2024 (ICD, arXiv:2407.11802), section 3.

    >>> contrast(torch.eye(5), torch.eye(5), torch.e).item()  # ln(1 + 4 exp(−e))
    0.2342...
    """
    logits = _similarities(student, teacher, scale, bias)
    return functional.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


@loss
@same_shapes
def invariance(
    student: Float[Tensor, "batch width"],
    teacher: Float[Tensor, "batch width"],
    scale: float | Float[Tensor, ""],
    *,
    bias: float | Float[Tensor, ""] = 0.0,
    divergence: Divergence = forward_kl,
) -> Float[Tensor, ""]:
    """KL(P₂ ‖ P₁) [nats / example] between the softmax over teachers for a student and over students for a teacher.

    P₁ is the softmax over the teacher's features for each student's, P₂ that over the student's features for each
    teacher's; both have gradients. With symmetric similarities they are equal and the loss is 0.
    Arguments as for `contrast`; `divergence=reverse_kl` gives KL(P₁ ‖ P₂), and `jensen_shannon` or a function like
    these another divergence.

    Giakoumoglou, Stathaki 2024 (ICD, arXiv:2407.11802), section 3; the direction is that of the published code
    (giakoumoglou/distillers, commit 1c0e48d).

    >>> invariance(torch.eye(3), torch.eye(3), 2.0).item()
    0.0
    """
    logits = _similarities(student, teacher, scale, bias)
    return divergences(divergence, logits.log_softmax(-1), logits.T.log_softmax(-1)).mean()


def _similarities(student: Tensor, teacher: Tensor, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """Return the scaled cosines of each student's features (rows) with each teacher's (columns)."""
    if len(student) == 0:
        raise DistillError(f"No example is left to compare: student {tuple(student.shape)}; skip this batch.")
    wild = next((each for each in (scale, bias) if not isinstance(each, Tensor) and not math.isfinite(each)), None)
    if wild is not None:
        raise DistillError(f"the similarities cannot be scaled or moved by {wild}; give a finite number: scale=10.0.")
    with torch.autocast(student.device.type, enabled=False):  # which would multiply in half precision
        cosines = einsum(widen(student), widen(teacher), "student width, teacher width -> student teacher")
    return scale * cosines + bias


@loss
def nce(positive: Float[Tensor, "..."], negative: Float[Tensor, "..."], n_data: int) -> Float[Tensor, ""]:
    """Noise-contrastive loss [nats / example] of telling an example's own pair from m pairs with drawn examples.

    −mean [log P⁺ / (P⁺ + m/N + ε) + Σ log (m/N) / (P⁻ + m/N + ε)] with N = n_data and ε = 1e-7.

    Args:
        positive: `[B, 1]`, P⁺, the probability of an example's own pair.
        negative: `[B, m]`, P⁻, those of m pairs with other examples.
        n_data: how many examples the negatives are drawn from.

    Tian, Krishnan, Isola 2019 (CRD, arXiv:1910.10699), section 3.2; ε is that of the published code.

    >>> nce(torch.tensor([[0.3]]), torch.full((1, 4), 0.02), n_data=100).item()  # −ln(.3 / .34) − 4 ln(.04 / .06)
    1.7470...
    """
    found = f"positive {tuple(positive.shape)}, negative {tuple(negative.shape)}"
    if positive.ndim != 2 or negative.ndim != 2 or positive.shape[1] != 1 or len(positive) != len(negative):
        raise DistillError(
            f"nce needs positive [batch, 1] and negative [batch, m]: {found}; add an axis by p[:, None]."
        )
    if negative.numel() == 0:
        raise DistillError(f"nce needs one example and one negative at least: {found}; draw some, or skip this batch.")
    if n_data < 1:
        raise DistillError(f"nce needs the number of examples in the data: n_data={n_data}; give len(data).")
    own, others = widen(positive), widen(negative)
    noise = others.shape[1] / n_data
    log_own = (own / (own + noise + EPSILON)).log().sum(1)
    log_others = (noise / (others + noise + EPSILON)).log().sum(1)
    return -(log_own + log_others).mean()
