"""What every loss keeps to: precision, gradients, padding, errors."""

import math
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional

from distill.errors import DistillError
from distill.losses import (
    attention_transfer,
    binary_cross_entropy,
    contrast,
    cosine,
    dkd,
    forward_kl,
    hint,
    invariance,
    jensen_shannon,
    kd,
    multi_label_kd,
    nce,
    nckd,
    patient,
    reverse_kl,
    soft_cross_entropy,
    squared_error,
    tckd,
)
from tests.distill.losses.pairs import gradient, pair, real_tokens

DIVERGENCES = [forward_kl, reverse_kl, jensen_shannon, partial(jensen_shannon, beta=0.1)]
BETWEEN_LOGITS = [
    kd,
    *(partial(kd, divergence=divergence) for divergence in DIVERGENCES[1:]),
    squared_error,
    multi_label_kd,
    soft_cross_entropy,
]
MASKED = [*BETWEEN_LOGITS, cosine]
CLASSES = torch.tensor([3, 0, 5, -100])
DECOUPLED = [partial(tckd, labels=CLASSES), partial(nckd, labels=CLASSES), partial(dkd, labels=CLASSES)]


def maps(student, teacher):
    return attention_transfer(student.reshape(2, 2, 2, 3), teacher.reshape(2, 2, 2, 3))


def seek(loss, student, teacher):
    return loss(functional.normalize(student, dim=-1), functional.normalize(teacher, dim=-1), 2.5)


def told_apart(student, teacher):
    return nce((student / 100).sigmoid()[:, :1], (teacher / 100).sigmoid(), 100)


def learned(student, teacher):
    return binary_cross_entropy(student, teacher.sigmoid())


NORMALISED_BEFORE = [partial(seek, contrast), partial(seek, invariance), told_apart, learned]
OTHERS = [*DECOUPLED, hint, maps, *NORMALISED_BEFORE]
ALL = [*MASKED, patient, *OTHERS]


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_half_precision_is_finite_and_returned_in_single(loss, dtype, scale):
    student, teacher = pair(4, 6, scale=scale, dtype=dtype)
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    if loss not in NORMALISED_BEFORE:
        torch.testing.assert_close(value, loss(student.float(), teacher.float()), rtol=1e-6, atol=1e-6)
    assert gradient(value, student).dtype == dtype
    assert gradient(loss(student, teacher), student).isfinite().all()


@pytest.mark.parametrize("loss", ALL)
def test_double_precision_is_kept(loss):
    student, teacher = pair(4, 6)
    assert loss(student, teacher).dtype == torch.float64


@pytest.mark.parametrize("loss", ALL)
def test_autocast_changes_nothing(loss):
    student, teacher = pair(4, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    torch.testing.assert_close(value, loss(student, teacher), rtol=1e-6, atol=1e-7)
    assert gradient(value, student).isfinite().all()


@pytest.mark.parametrize("loss", ALL)
def test_gradients_of_both_sides_match_finite_differences(loss):
    student, teacher = pair(4, 6)
    assert gradcheck(loss, (student, teacher.requires_grad_()))


@pytest.mark.parametrize("loss", [*MASKED, hint])
@pytest.mark.parametrize("content", [0.0, 1e4, math.nan])
def test_padding_changes_neither_value_nor_gradient(loss, content):
    student, teacher = pair(3, 5, 7)
    mask = real_tokens()
    padded = functional.pad(student, (0, 0, 0, 4), value=content)
    value = loss(padded, functional.pad(teacher, (0, 0, 0, 4), value=content), mask=functional.pad(mask, (0, 4)))
    expected = loss(student, teacher, mask=mask)
    assert torch.equal(value, expected)
    assert torch.equal(gradient(value, student), gradient(expected, student))
    assert not torch.allclose(expected, loss(student, teacher))


@pytest.mark.parametrize("loss", [*MASKED, hint])
def test_inputs_are_not_written(loss):
    student, teacher = pair(3, 5, 7)
    before = student.detach().clone(), teacher.clone()
    loss(student, teacher, mask=torch.ones(3, 5)).backward()
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


class TestMismatch:
    @pytest.mark.parametrize("loss", [*BETWEEN_LOGITS, *DIVERGENCES, *DECOUPLED])
    def test_classes(self, loss):
        with pytest.raises(DistillError, match=r"same classes on both sides: \w+ \(4, 6\), \w+ \(4, 5\); .* label set"):
            loss(torch.zeros(4, 6), torch.zeros(4, 5))

    @pytest.mark.parametrize("loss", [cosine, patient])
    def test_width(self, loss):
        with pytest.raises(DistillError, match=r"same width on both sides: \w+ \(4, 6\), \w+ \(4, 5\); project one"):
            loss(torch.zeros(4, 6), torch.zeros(4, 5))

    @pytest.mark.parametrize("loss", [*MASKED, patient])
    def test_batch(self, loss):
        """Sizes that broadcast are refused too."""
        with pytest.raises(
            DistillError, match=r"batches differ: \w+ \(4, 6\), \w+ \(1, 6\); run both on the same inputs"
        ):
            loss(torch.zeros(4, 6), torch.zeros(1, 6))

    def test_names_and_keywords(self):
        with pytest.raises(DistillError, match=r"^kd needs .*: student_logits \(2, 3\), teacher_logits \(2, 4\)"):
            kd(student_logits=torch.zeros(2, 3), teacher_logits=torch.zeros(2, 4))

    @pytest.mark.parametrize("loss", MASKED)
    def test_mask(self, loss):
        with pytest.raises(DistillError, match=r"mask is \(2, 4\): .* \(2, 5, 3\), .*; pass one of shape \(2, 5\)"):
            loss(torch.zeros(2, 5, 3), torch.zeros(2, 5, 3), mask=torch.ones(2, 4))

    @pytest.mark.parametrize("loss", MASKED)
    def test_mask_that_keeps_nothing(self, loss):
        with pytest.raises(
            DistillError, match=r"No position is left .* 0 of 10 are kept of \(2, 5, 3\); skip this batch"
        ):
            loss(torch.zeros(2, 5, 3), torch.zeros(2, 5, 3), mask=torch.zeros(2, 5))

    @pytest.mark.parametrize("loss", MASKED)
    def test_empty_batch(self, loss):
        with pytest.raises(DistillError, match="No position is left"):
            loss(torch.zeros(0, 3), torch.zeros(0, 3))

    def test_errors_are_one_line(self):
        with pytest.raises(DistillError) as caught:
            kd(torch.zeros(2, 3), torch.zeros(2, 4))
        assert "\n" not in str(caught.value)
