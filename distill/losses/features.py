"""Losses between hidden states of student and teacher: single vectors, feature maps and attention maps.

With hidden states h_s of the student and h_t of the teacher, both of width H, averaged over positions,

    cosine = 1 − cos(h_s, h_t)                               DistilBERT: Sanh et al. 2019 (arXiv:1910.01108), section 3
    patient = ‖h_s / ‖h_s‖ − h_t / ‖h_t‖‖² / H                     PKD: Sun et al. 2019 (arXiv:1908.09355), section 3.2
    hint = ‖h_s − h_t‖² / H, h_s behind a regressor          FitNets: Romero et al. 2014 (arXiv:1412.6550), equation 3

and for feature maps A with channels c, whose attention map is Q = Σ_c A_c², averaged over positions,

    attention_transfer = (Q_s / ‖Q_s‖₂ − Q_t / ‖Q_t‖₂)²     Zagoruyko, Komodakis 2016 (arXiv:1612.03928), section 3.1.
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional

from distill.errors import DistillError
from distill.losses.common import keep, kept_numbers, loss, same_shapes
from distill.precision import widen
from interventions import keep_on_host, on_host


@loss
@same_shapes
def cosine(
    student: Float[Tensor, "*batch width"],
    teacher: Float[Tensor, "*batch width"],
    mask: Shaped[Tensor, "*batch"] | None = None,
) -> Float[Tensor, ""]:
    """1 − cosine between the vectors of student and teacher, from 0 to 2, averaged over positions.

    Sanh et al. 2019 (DistilBERT, arXiv:1910.01108), section 3, on the last hidden state of the unmasked tokens.

    >>> cosine(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 3.0]])).item()  # (0 + 1) / 2
    0.5
    """
    return 1 - functional.cosine_similarity(keep(student, mask), keep(teacher, mask), dim=-1).mean()


@loss
@same_shapes
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
    student, teacher = (functional.normalize(widen(vectors), dim=-1) for vectors in (student_cls, teacher_cls))
    return functional.mse_loss(student, teacher)


@loss
def hint(
    student: Float[Tensor, "..."], teacher: Float[Tensor, "..."], mask: Shaped[Tensor, "..."] | None = None
) -> Float[Tensor, ""]:
    """Mean squared error between features, over all entries.

    Args:
        student: features behind the regressor, of any shape, as `[B, T, H]` or `[B, C, H, W]`.
        teacher: the same shape. It is not detached.
        mask: one entry a vector, all axes but the last, 0 or False where it does not count, as the attention mask.

    Romero et al. 2014 (FitNets, arXiv:1412.6550), equation 3, which writes half the sum.

    >>> hint(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])).item()  # (4 + 4) / 4
    2.0
    """
    found = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
    if student.shape != teacher.shape:
        regressor = "torch.nn.Linear(student.shape[-1], teacher.shape[-1])"
        if student.ndim == 4 and student.shape[1] != teacher.shape[1]:
            regressor = "torch.nn.Conv2d(student.shape[1], teacher.shape[1], 1)"
        raise DistillError(
            f"hint compares entry by entry: {found}; put a regressor first, as with {regressor}(student)."
        )
    if mask is not None and mask.shape != student.shape[:-1]:
        raise DistillError(
            f"hint needs one mask entry a vector, but mask is {tuple(mask.shape)}: {found}; pass one of shape "
            f"{tuple(student.shape[:-1])}, as inputs['attention_mask'] of the same inputs."
        )
    return functional.mse_loss(keep(student, mask), keep(teacher, mask))


@loss
def attention_transfer(
    student_map: Float[Tensor, "..."], teacher_map: Float[Tensor, "..."], mask: Shaped[Tensor, "..."] | None = None
) -> Float[Tensor, ""]:
    """Mean squared difference between spatial attention maps, Q / ‖Q‖₂ with Q = Σ_c A_c², over positions and batch.

    Args:
        student_map: `[B, C, H, W]`, or attention patterns `[B, heads, query, key]`.
        teacher_map: the same batch; another number of channels is fine. Where one is larger, height and width are
            averaged down to the smaller (adaptive pooling, before the squares).
        mask: `[B, H, W]`, 0 or False where a position does not count. Each example is then averaged over its own
            positions, so that padding changes nothing; an example without any is left out.

    Zagoruyko, Komodakis 2016 (AT, arXiv:1612.03928), section 3.1, with p = 2; mean and pooling are those of the
    published code.

    >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    >>> attention_transfer(student.reshape(1, 1, 1, 2), teacher.reshape(1, 1, 1, 2)).item()  # (1 + 1) / 2
    1.0
    """
    _refuse_mismatch(student_map, teacher_map, mask)
    student, teacher = widen(student_map), widen(teacher_map)
    if mask is None:
        if student.numel() == 0:
            raise DistillError(f"No example is left to compare: student_map {tuple(student.shape)}; skip this batch.")
        size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
        return functional.mse_loss(_attention_map(_pool(student, size)), _attention_map(_pool(teacher, size)))
    kept = mask.bool()
    student, teacher = (_attention_map(features.masked_fill(~kept[:, None], 0)) for features in (student, teacher))
    errors = (student - teacher).square().sum(-1)
    positions = torch.count_nonzero(kept.flatten(1), dim=1)
    is_left = keep_on_host(positions > 0, on_host(mask).bool().flatten(1).any(1))
    if not on_host(is_left).any():
        raise DistillError(
            f"No position is left to average over: 0 of {kept.numel()} are kept of student_map "
            f"{tuple(student_map.shape)}; skip this batch, or check that the mask is 1 where a position counts."
        )
    return (kept_numbers(errors, is_left) / kept_numbers(positions, is_left)).mean()


def _attention_map(features: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch positions"]:
    """Q / ‖Q‖₂ with Q = Σ_c A_c²."""
    energy = features.square().sum(1)
    return functional.normalize(rearrange(energy, "batch height width -> batch (height width)"), dim=-1)


def _pool(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a feature map averaged down to a height and a width."""
    return features if features.shape[2:] == size else functional.adaptive_avg_pool2d(features, size)


def _refuse_mismatch(student: Tensor, teacher: Tensor, mask: Any) -> None:
    """Raise DistillError if the maps are not of the same examples, or the mask is not of their positions."""
    found = f"student_map {tuple(student.shape)}, teacher_map {tuple(teacher.shape)}"
    if student.ndim != 4 or teacher.ndim != 4:
        raise DistillError(
            f"attention_transfer compares maps [batch, channels, height, width]: {found}; add the axes that are "
            "missing, as with features[..., None], or compare vectors with hint."
        )
    if len(student) != len(teacher):
        raise DistillError(
            f"attention_transfer compares example by example, but the batches differ: {found}; run both on the same "
            "inputs."
        )
    if mask is None:
        return
    if student.shape[2:] != teacher.shape[2:]:
        raise DistillError(
            f"attention_transfer has one mask for both maps, but their sizes differ: {found}; pool the larger first, "
            "as with torch.nn.functional.adaptive_avg_pool2d(teacher_map, student_map.shape[2:])."
        )
    if mask.shape != (len(student), *student.shape[2:]):
        raise DistillError(
            f"attention_transfer needs one mask entry a position, but mask is {tuple(mask.shape)}: {found}; pass one "
            f"of shape {(len(student), *student.shape[2:])}, without channels."
        )
