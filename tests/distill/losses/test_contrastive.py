"""Contrastive losses against hand-computed values and loops (methods.md, section 3)."""

import math

import pytest
import torch
from torch.nn import functional

from distill.errors import DistillError
from distill.losses import contrast, invariance, nce, reverse_kl
from tests.distill.losses.pairs import gradient, pair


def features(*shape, dtype=torch.float64):
    return tuple(functional.normalize(x, dim=-1) for x in pair(*shape, dtype=dtype))


class TestContrast:
    @pytest.mark.parametrize("scale", [math.e, torch.tensor(math.e)])
    def test_orthonormal_features(self, scale):
        value = contrast(torch.eye(5), torch.eye(5), scale).item()
        assert value == pytest.approx(math.log(1 + 4 * math.exp(-math.e)))
        assert value == pytest.approx(0.234243, abs=1e-6)

    def test_equals_a_loop(self):
        student, teacher = features(4, 6)
        values = [-(2.5 * torch.stack([s @ t for t in teacher])).log_softmax(0)[i] for i, s in enumerate(student)]
        torch.testing.assert_close(contrast(student, teacher, 2.5), torch.stack(values).mean())
        assert (contrast(student, teacher, 2.5) - contrast(teacher, student, 2.5)).abs() > 1e-3

    def test_the_scale_is_learned(self):
        scale = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
        student, teacher = features(4, 6)
        step = 1e-6
        slope = (contrast(student, teacher, 2.5 + step) - contrast(student, teacher, 2.5 - step)) / (2 * step)
        torch.testing.assert_close(gradient(contrast(student, teacher, scale), scale), slope.detach())


class TestInvariance:
    def test_equals_a_loop(self):
        student, teacher = features(4, 6)
        logits = 2.5 * student @ teacher.T
        rows, columns = logits.softmax(1), logits.softmax(0).T
        expected = (columns * (columns / rows).log()).sum() / 4
        torch.testing.assert_close(invariance(student, teacher, 2.5), expected)
        assert expected > 1e-3
        turned = (rows * (rows / columns).log()).sum() / 4
        assert (turned - expected).abs() > 1e-4

    def test_symmetric_similarities_cost_nothing(self):
        student, _ = features(4, 6)
        value = invariance(student, student, 9.0)
        assert value.item() == pytest.approx(0, abs=1e-15)

    def test_both_distributions_have_gradients(self):
        """Detached, P₂ would leave a gradient of (P₁ − P₂) only."""
        student, teacher = features(4, 6)
        logits = (2.5 * student @ teacher.T).detach().requires_grad_()
        half = functional.kl_div(logits.log_softmax(1), logits.softmax(0).T.detach(), reduction="batchmean")
        given = student.detach().requires_grad_()
        detached = gradient(half, logits) @ teacher * 2.5
        assert not torch.allclose(gradient(invariance(given, teacher, 2.5), given), detached, rtol=0.1)


@pytest.mark.parametrize("loss", [contrast, invariance])
@pytest.mark.parametrize("bias", [-10.0, torch.tensor(7.0, dtype=torch.float64, requires_grad=True)])
def test_a_bias_changes_nothing(loss, bias):
    student, teacher = features(4, 6)
    value = loss(student, teacher, 2.5, bias=bias)
    torch.testing.assert_close(value, loss(student, teacher, 2.5))
    if isinstance(bias, torch.Tensor):
        assert gradient(value, bias).abs() < 1e-15


@pytest.mark.parametrize("loss", [contrast, invariance])
class TestBoth:
    def test_autocast_multiplies_in_single_precision(self, loss):
        student, teacher = features(8, 128, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(student, teacher, 10.0)
        assert torch.equal(value, loss(student, teacher, 10.0))

    def test_refuses_other_shapes(self, loss):
        with pytest.raises(DistillError, match=r"same width on both sides: student \(4, 6\), teacher \(4, 5\)"):
            loss(torch.zeros(4, 6), torch.zeros(4, 5), 1.0)
        with pytest.raises(DistillError, match=r"batches differ: student \(4, 6\), teacher \(3, 6\)"):
            loss(torch.zeros(4, 6), torch.zeros(3, 6), 1.0)
        with pytest.raises(DistillError, match=r"No example is left .* \(0, 6\); skip this batch"):
            loss(torch.zeros(0, 6), torch.zeros(0, 6), 1.0)


class TestNCE:
    def test_value_by_hand(self):
        value = nce(torch.tensor([[0.3]]), torch.full((1, 4), 0.02), 100).item()
        assert value == pytest.approx(1.747024, abs=1e-5)

    def test_is_the_mean_over_the_batch(self):
        positive, negative = (x.sigmoid() for x in (pair(3, 1)[0], pair(3, 7)[1]))
        values = []
        for p, q in zip(positive, negative, strict=True):
            values.append(-(p / (p + 0.07)).log().sum() - (0.07 / (q + 0.07)).log().sum())
        torch.testing.assert_close(nce(positive, negative, 100), torch.stack(values).mean(), rtol=1e-5, atol=0)

    def test_improbable_negatives_cost_less(self):
        none, some = (nce(torch.full((1, 1), 0.5), torch.full((1, 4), q), 100).item() for q in (0.0, 0.5))
        assert none == pytest.approx(math.log(0.54 / 0.5), abs=1e-4)
        assert some == pytest.approx(none + 4 * math.log(0.54 / 0.04), abs=1e-4)

    def test_refuses_other_shapes(self):
        with pytest.raises(DistillError, match=r"positive \(2,\), negative \(2, 3\); add an axis by p\[:, None\]"):
            nce(torch.ones(2), torch.ones(2, 3), 100)
        with pytest.raises(DistillError, match=r"positive \(2, 1\), negative \(4, 3\)"):
            nce(torch.ones(2, 1), torch.ones(4, 3), 100)
        with pytest.raises(DistillError, match=r"one example and one negative at least: .* \(2, 0\)"):
            nce(torch.ones(2, 1), torch.ones(2, 0), 100)
        with pytest.raises(DistillError, match=r"n_data=0; give len\(data\)"):
            nce(torch.ones(2, 1), torch.ones(2, 3), 0)


def test_the_direction_of_the_invariance_is_that_of_the_published_code():
    """kl_div(log P₁, P₂) = KL(P₂ ‖ P₁); P₁ over the teachers of a student, P₂ over the students of a teacher."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = (functional.normalize(torch.randn(5, 4, generator=draw), dim=1) for _ in range(2))
    logits = 3 * student @ teacher.T
    rows, columns = logits.log_softmax(1), logits.softmax(0).T
    published = functional.kl_div(rows, columns, reduction="batchmean")
    torch.testing.assert_close(invariance(student, teacher, 3.0), published)
    other = functional.kl_div(columns.log(), rows.exp(), reduction="batchmean")
    torch.testing.assert_close(invariance(student, teacher, 3.0, divergence=reverse_kl), other)
    assert not torch.isclose(published, other)
