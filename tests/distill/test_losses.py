"""Losses against closed forms, per-position loops and hand-computed values (methods.md, section 1.1)."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional

from distill.errors import DistillError
from distill.losses import (
    cosine,
    cross_entropy,
    forward_kl,
    jensen_shannon,
    kd,
    patient,
    reverse_kl,
    squared_error,
)

DIVERGENCES = [forward_kl, reverse_kl, jensen_shannon, partial(jensen_shannon, beta=0.1)]
BETWEEN_LOGITS = [kd, *(partial(kd, divergence=divergence) for divergence in DIVERGENCES[1:]), squared_error]
MASKED = [*BETWEEN_LOGITS, cosine]


def pair(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return student.requires_grad_(), teacher


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of)[0]


class TestKD:
    def test_value_by_hand(self):
        student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
        assert kd(student, teacher).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-7)
        assert kd(student, teacher).item() == pytest.approx(0.130812, abs=1e-6)

    def test_direction(self):
        student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
        expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
        assert kd(student, teacher, divergence=reverse_kl).item() == pytest.approx(expected, abs=1e-7)

    def test_gradient_size_does_not_depend_on_a_high_temperature(self):
        student, teacher = pair(16, 5, scale=3)
        tau = 10 * max(student.abs().max().item(), teacher.abs().max().item())
        one, ten = (gradient(kd(student, teacher, tau * times), student).norm() for times in (1, 10))
        assert abs(ten / one - 1) < 0.05
        one, ten = (gradient(kd(student, teacher, tau * times, scale_t2=False), student).norm() for times in (1, 10))
        assert ten / one == pytest.approx(0.01, rel=0.05)

    @pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
    def test_infinite_temperature_is_the_squared_error_of_centred_logits(self, divergence):
        student, teacher = pair(16, 5)
        centred = (logits - logits.mean(-1, keepdim=True) for logits in (student, teacher))
        expected = squared_error(*centred) / (2 * 5)
        assert kd(student, teacher, 1e5, divergence=divergence).item() == pytest.approx(expected.item(), rel=1e-3)
        assert kd(student, teacher, 1.0, divergence=divergence).item() != pytest.approx(expected.item(), rel=0.05)

    @pytest.mark.parametrize("divergence", DIVERGENCES)
    @pytest.mark.parametrize("temperature", [1, 4.0])
    def test_equal_logits_cost_nothing(self, divergence, temperature):
        student, teacher = pair(4, 6)
        same = student.detach().clone()
        assert kd(student, same, temperature, divergence=divergence).item() == pytest.approx(0, abs=1e-13)
        assert gradient(kd(student, same, temperature, divergence=divergence), student).abs().max() < 1e-13
        assert gradient(kd(student, teacher, temperature, divergence=divergence), student).abs().max() > 1e-3

    @pytest.mark.parametrize("divergence", DIVERGENCES)
    def test_a_constant_added_to_all_logits_changes_nothing(self, divergence):
        student, teacher = pair(4, 6)
        shifted = kd(student + 7, teacher - 3, 2.0, divergence=divergence)
        torch.testing.assert_close(shifted, kd(student, teacher, 2.0, divergence=divergence), rtol=1e-12, atol=0)
        bent = kd(student + torch.arange(6), teacher, 2.0, divergence=divergence)
        assert (bent - shifted).abs() > 1e-2

    def test_masked_tokens_equal_a_loop(self):
        student, teacher = pair(3, 5, 7)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1]])
        values = [
            functional.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="sum") * 4
            for s, t, kept in zip(student.flatten(0, 1), teacher.flatten(0, 1), mask.flatten(), strict=True)
            if kept
        ]
        torch.testing.assert_close(kd(student, teacher, 2.0, mask=mask), torch.stack(values).mean())

    def test_reductions(self):
        student, teacher = pair(3, 5, 7)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1]]).bool()
        each = kd(student, teacher, 2.0, "none")
        assert each.shape == (3, 5)
        torch.testing.assert_close(kd(student, teacher, 2.0), each.mean())
        torch.testing.assert_close(kd(student, teacher, 2.0, "mean"), each.mean() / 7)
        torch.testing.assert_close(kd(student, teacher, 2.0, "none", mask=mask), each * mask)
        torch.testing.assert_close(kd(student, teacher, 2.0, "mean", mask=mask), each[mask].mean() / 7)
        torch.testing.assert_close(kd(student, teacher, 2.0, "none", False), each / 4)
        assert kd(student[0, 0], teacher[0, 0], 2.0, "none").item() == pytest.approx(each[0, 0].item())

    def test_batchmean_is_torch_kl_div(self):
        student, teacher = pair(8, 3)
        expected = functional.kl_div(
            student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True
        )
        torch.testing.assert_close(kd(student, teacher), expected)

    @pytest.mark.parametrize("divergence", DIVERGENCES)
    def test_classes_that_neither_model_can_predict_add_nothing(self, divergence):
        student, teacher = pair(4, 6)
        barred = torch.tensor([0.0, 0.0, 0.0, 0.0, -math.inf, -math.inf])
        loss = kd(student + barred, teacher + barred, divergence=divergence)
        torch.testing.assert_close(loss, kd(student[:, :4], teacher[:, :4], divergence=divergence))
        assert gradient(loss, student).isfinite().all()
        assert gradient(kd(student, teacher + barred), student).isfinite().all()

    def test_refuses_other_settings(self):
        student, teacher = pair(4, 6)
        with pytest.raises(DistillError, match=r"temperature=0; temperature=1 softens nothing"):
            kd(student, teacher, 0)
        with pytest.raises(DistillError, match=r"temperature=nan"):
            kd(student, teacher, math.nan)
        with pytest.raises(DistillError, match=r"reduction='sum'; use reduction='batchmean', 'mean' or 'none'"):
            kd(student, teacher, reduction="sum")


class TestJensenShannon:
    def test_definition(self):
        student, teacher = (logits.softmax(-1) for logits in pair(4, 6))
        mixture = 0.3 * teacher + 0.7 * student
        expected = 0.3 * (teacher * (teacher / mixture).log()).sum(-1) + 0.7 * (
            student * (student / mixture).log()
        ).sum(-1)
        torch.testing.assert_close(jensen_shannon(student.log(), teacher.log(), 0.3), expected)

    def test_limits_are_the_two_kullback_leibler_divergences(self):
        student, teacher = (logits.log_softmax(-1) for logits in pair(4, 6))
        forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
        torch.testing.assert_close(jensen_shannon(student, teacher, 1e-6) / 1e-6, forward, rtol=1e-4, atol=0)
        torch.testing.assert_close(jensen_shannon(student, teacher, 1 - 1e-6) / 1e-6, reverse, rtol=1e-4, atol=0)
        assert not torch.allclose(forward, reverse, rtol=0.01)

    def test_half_is_symmetric_and_bounded(self):
        student, teacher = (logits.log_softmax(-1) for logits in pair(4, 6, scale=100))
        value = jensen_shannon(student, teacher)
        torch.testing.assert_close(value, jensen_shannon(teacher, student))
        assert (value <= math.log(2) + 1e-12).all()
        assert (forward_kl(student, teacher) > math.log(2)).all()

    @pytest.mark.parametrize("beta", [0, 1, -0.5, math.nan])
    def test_refuses_a_beta_where_it_vanishes(self, beta):
        student, teacher = (logits.log_softmax(-1) for logits in pair(4, 6))
        with pytest.raises(DistillError, match=rf"beta={beta}; for the limits use divergence=forward_kl .*reverse_kl"):
            jensen_shannon(student, teacher, beta)


class TestSquaredError:
    def test_value_by_hand(self):
        student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])
        assert squared_error(student, teacher).item() == 7

    def test_sums_over_classes_and_averages_over_positions(self):
        student, teacher = pair(4, 6)
        assert squared_error(student, teacher).item() == pytest.approx((student - teacher).square().sum().item() / 4)
        torch.testing.assert_close(
            squared_error(student.repeat(3, 1), teacher.repeat(3, 1)), squared_error(student, teacher)
        )


class TestCrossEntropy:
    def test_equals_a_loop_over_counted_positions(self):
        logits, _ = pair(2, 3, 5)
        labels = torch.tensor([[4, -100, 0], [-100, -100, 2]])
        counted = [(0, 0, 4), (0, 2, 0), (1, 2, 2)]
        expected = -torch.stack([logits[b, t].log_softmax(-1)[c] for b, t, c in counted]).mean()
        torch.testing.assert_close(cross_entropy(logits, labels), expected)
        torch.testing.assert_close(cross_entropy(logits, labels.int()), expected)

    @pytest.mark.parametrize(("label", "classes"), [(5, "5 classes \\(0 to 4\\)"), (-1, "5 classes \\(0 to 4\\)")])
    def test_refuses_labels_outside_the_classes(self, label, classes):
        with pytest.raises(DistillError, match=rf"label {label}, but the logits have {classes}; map the labels"):
            cross_entropy(torch.zeros(2, 5), torch.tensor([0, label]))

    def test_refuses_labels_of_another_shape(self):
        with pytest.raises(DistillError, match=r"logits \(2, 5\), labels \(2, 1\); give labels of shape \(2,\)"):
            cross_entropy(torch.zeros(2, 5), torch.zeros(2, 1, dtype=torch.long))

    def test_refuses_a_batch_without_labels(self):
        with pytest.raises(DistillError, match=r"No position is left .* 0 of 2 are kept of \(2, 5\); skip this batch"):
            cross_entropy(torch.zeros(2, 5), torch.full((2,), -100))


class TestVectors:
    def test_cosine_is_zero_orthogonal_one_opposite_two(self):
        student = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
        teacher = torch.tensor([[9.0, 0.0], [0.0, 1.0], [-3.0, 0.0]])
        values = [cosine(s, t).item() for s, t in zip(student.split(1), teacher.split(1), strict=True)]
        assert values == pytest.approx([0, 1, 2], abs=1e-6)
        assert cosine(student, teacher, mask=torch.tensor([1, 1, 0])).item() == pytest.approx(0.5)

    def test_cosine_equals_torch_cosine_embedding_loss(self):
        student, teacher = pair(5, 8)
        torch.testing.assert_close(
            cosine(student, teacher), functional.cosine_embedding_loss(student, teacher, torch.ones(5))
        )

    @pytest.mark.parametrize("shape", [(5, 8), (5, 3, 8)])
    def test_patient_is_two_minus_two_cosines_over_the_width(self, shape):
        student, teacher = pair(*shape)
        torch.testing.assert_close(patient(student, teacher), 2 * cosine(student, teacher) / 8)
        torch.testing.assert_close(patient(3 * student, 0.1 * teacher), patient(student, teacher))

    def test_patient_keeps_small_differences_of_half_precision(self):
        """Squares of float16 differences of unit vectors underflow; in float32 they do not."""
        teacher = functional.normalize(torch.randn(4, 768, generator=torch.Generator().manual_seed(0)), dim=-1)
        student = teacher.half().clone()
        student[:, ::2] += 2.0**-13
        assert patient(student, teacher.half()).item() == pytest.approx(2.0**-27, rel=0.2)


@pytest.mark.parametrize("loss", [*MASKED, patient])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_half_precision_is_finite_and_returned_in_single(loss, dtype, scale):
    student, teacher = pair(4, 6, scale=scale, dtype=dtype)
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student.float(), teacher.float()), rtol=1e-6, atol=1e-6)
    assert gradient(value, student).dtype == dtype
    assert gradient(loss(student, teacher), student).isfinite().all()


def test_cross_entropy_of_half_precision_is_single():
    logits, _ = pair(4, 6, dtype=torch.bfloat16)
    labels = torch.arange(4)
    assert cross_entropy(logits, labels).dtype == torch.float32
    assert cross_entropy(logits, labels) == functional.cross_entropy(logits.float(), labels)


@pytest.mark.parametrize("loss", [*MASKED, patient])
def test_gradients_of_both_sides_match_finite_differences(loss):
    student, teacher = pair(3, 4)
    assert gradcheck(loss, (student, teacher.requires_grad_()))


@pytest.mark.parametrize("loss", MASKED)
@pytest.mark.parametrize("content", [0.0, 1e4, math.nan])
def test_padding_changes_neither_value_nor_gradient(loss, content):
    student, teacher = pair(3, 5, 7)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1]])
    padded = functional.pad(student, (0, 0, 0, 4), value=content)
    value = loss(padded, functional.pad(teacher, (0, 0, 0, 4), value=content), mask=functional.pad(mask, (0, 4)))
    expected = loss(student, teacher, mask=mask)
    assert torch.equal(value, expected)
    assert torch.equal(gradient(value, student), gradient(expected, student))
    assert not torch.allclose(expected, loss(student, teacher))


@pytest.mark.parametrize("loss", MASKED)
def test_inputs_are_not_written(loss):
    student, teacher = pair(3, 5, 7)
    before = student.detach().clone(), teacher.clone()
    loss(student, teacher, mask=torch.ones(3, 5)).backward()
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


class TestMismatch:
    @pytest.mark.parametrize("loss", [*BETWEEN_LOGITS, *DIVERGENCES])
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
