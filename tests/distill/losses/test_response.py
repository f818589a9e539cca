"""Losses between answers against closed forms, loops and hand-computed values (methods.md, section 1.1)."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from distill.errors import DistillError
from distill.losses import (
    forward_kl,
    jensen_shannon,
    kd,
    multi_label_kd,
    response,
    reverse_kl,
    soft_cross_entropy,
    squared_error,
)
from tests.distill.losses.pairs import gradient, pair, real_tokens


class Operations(TorchDispatchMode):
    """Note the name of each operation that torch computes in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


DIVERGENCES = [forward_kl, reverse_kl, jensen_shannon, partial(jensen_shannon, beta=0.1)]


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

    @pytest.mark.parametrize("divergence", DIVERGENCES)
    @pytest.mark.parametrize("odd", [0.0, -math.inf, math.nan])
    def test_the_mask_of_impossible_classes_is_left_out_where_there_are_none(self, divergence, odd, monkeypatch):
        """Values and gradients are those with the mask, bit for bit; the mask is what costs most in a vocabulary."""
        student, teacher = pair(4, 6, dtype=torch.float32)
        teacher[1, 2] += odd
        found = []
        for readable in (True, False):
            with monkeypatch.context() as patch, Operations() as made:
                if not readable:  # as on a device
                    patch.setattr(response, "is_readable", lambda values: False)
                each = student.detach().requires_grad_()
                loss = kd(each, teacher, 2.0, "none", divergence=divergence)
                found.append((loss, gradient(loss.nansum(), each)))
            assert ("masked_fill" in made.names) == (not readable or (odd != 0 and made.names.count("isneginf") > 0))
        for one, other in zip(*found, strict=True):
            assert one.view(torch.int32).equal(other.view(torch.int32))

    def test_losses_are_computed_inside_transforms_of_torch(self):
        student, teacher = (each.detach() for each in pair(4, 6))
        one_by_one = torch.stack([kd(each[None], other[None]) for each, other in zip(student, teacher, strict=True)])
        at_once = torch.vmap(lambda each, other: kd(each[None], other[None]))(student, teacher)
        torch.testing.assert_close(at_once, one_by_one)

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
        with pytest.raises(
            DistillError,
            match=rf"beta={beta}.*; (for the limits use divergence=forward_kl .*reverse_kl|write beta=0.5)",
        ):
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


class TestMultiLabelKD:
    def test_value_by_hand(self):
        """Two labels: as the two-class example of methods.md, and equal; the mean is half."""
        student, teacher = torch.tensor([[0.0, 2.0]]), torch.tensor([[math.log(3), 2.0]])
        assert multi_label_kd(student, teacher).item() == pytest.approx(0.130812 / 2, abs=1e-6)
        assert multi_label_kd(teacher, student).item() == pytest.approx(0.143841 / 2, abs=1e-6)

    def test_equals_a_loop_of_two_class_kd(self):
        student, teacher = pair(4, 6)
        values = [
            kd(torch.stack([s, 0 * s])[None], torch.stack([t, 0 * t])[None], 3.0)
            for s, t in zip(student.flatten(), teacher.flatten(), strict=True)
        ]
        torch.testing.assert_close(multi_label_kd(student, teacher, 3.0), torch.stack(values).mean())
        torch.testing.assert_close(multi_label_kd(student, teacher, 3.0, "mean"), torch.stack(values).mean())
        each = multi_label_kd(student, teacher, 3.0, "none", False)
        torch.testing.assert_close(each, torch.stack(values).reshape(4, 6).mean(-1) / 9)

    def test_masked_positions_are_zero(self):
        student, teacher = pair(3, 5, 7)
        each = multi_label_kd(student, teacher, 2.0, "none", mask=real_tokens())
        assert torch.equal(each == 0, real_tokens() == 0)
        torch.testing.assert_close(multi_label_kd(student, teacher, 2.0, mask=real_tokens()), each.sum() / 10)

    @pytest.mark.parametrize("size", [400.0, 4e4])
    def test_sure_labels_stay_finite(self, size):
        student, teacher = torch.tensor([[size, -size, size]], requires_grad=True), torch.tensor([[-size, -size, size]])
        value = multi_label_kd(student, teacher)
        assert value.item() == pytest.approx(size / 3)
        torch.testing.assert_close(gradient(value, student), torch.tensor([[1 / 3, 0, 0]]))

    def test_refuses_other_settings(self):
        with pytest.raises(DistillError, match=r"^multi_label_kd needs a temperature above 0: temperature=-1"):
            multi_label_kd(*pair(4, 6), -1)
        with pytest.raises(DistillError, match=r"^multi_label_kd has no reduction='sum'; use reduction='batchmean'"):
            multi_label_kd(*pair(4, 6), reduction="sum")


class TestSoftCrossEntropy:
    def test_value_by_hand(self):
        student = torch.zeros(1, 4)
        assert soft_cross_entropy(student, torch.randn(1, 4)).item() == pytest.approx(math.log(4))
        student, teacher = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)
        expected = -0.5 * math.log(0.75) - 0.5 * math.log(0.25)
        assert soft_cross_entropy(student, teacher).item() == pytest.approx(expected)

    @pytest.mark.parametrize("temperature", [1, 4.0])
    def test_is_kd_plus_the_entropy_of_the_teacher(self, temperature):
        student, teacher = pair(4, 6)
        entropy = torch.distributions.Categorical(logits=teacher / temperature).entropy().mean()
        value, divergence = soft_cross_entropy(student, teacher, temperature), kd(student, teacher, temperature)
        torch.testing.assert_close(value, divergence + entropy * temperature**2)
        torch.testing.assert_close(gradient(value, student), gradient(divergence, student))

    def test_classes_that_neither_model_can_predict_add_nothing(self):
        student, teacher = pair(4, 6)
        barred = torch.tensor([0.0, 0.0, 0.0, 0.0, -math.inf, -math.inf])
        loss = soft_cross_entropy(student + barred, teacher + barred)
        torch.testing.assert_close(loss, soft_cross_entropy(student[:, :4], teacher[:, :4]))
        assert gradient(loss, student).isfinite().all()

    def test_refuses_a_temperature_of_zero(self):
        with pytest.raises(DistillError, match=r"^soft_cross_entropy needs a temperature above 0: temperature=0;"):
            soft_cross_entropy(*pair(4, 6), 0)
