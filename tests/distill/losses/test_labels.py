"""Losses under labels against loops, torch and hand-computed values."""

import math

import pytest
import torch
from torch.nn import functional

from distill.errors import DistillError
from distill.losses import binary_cross_entropy, cross_entropy, mean_squared_error
from tests.distill.losses.pairs import gradient, pair


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


def test_cross_entropy_of_half_precision_is_single():
    logits, _ = pair(4, 6, dtype=torch.bfloat16)
    labels = torch.arange(4)
    assert cross_entropy(logits, labels).dtype == torch.float32
    assert cross_entropy(logits, labels) == functional.cross_entropy(logits.float(), labels)


class TestSmoothing:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
    def test_shares_out_a_part_of_the_label(self, smoothing):
        logits, _ = pair(4, 6)
        labels = torch.tensor([0, 5, -100, 2])
        chances = logits.log_softmax(-1)[[0, 1, 3]]
        hit, spread = chances[range(3), [0, 5, 2]].mean(), chances.mean()
        expected = -(1 - smoothing) * hit - smoothing * spread
        torch.testing.assert_close(cross_entropy(logits, labels, smoothing), expected)

    @pytest.mark.parametrize("smoothing", [-0.1, 1.5, math.nan])
    def test_refuses_shares_that_are_none(self, smoothing):
        with pytest.raises(DistillError, match=rf"smoothing={smoothing}.*; (smoothing=0.1|write smoothing=0.0)"):
            cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), smoothing)


def test_cross_entropy_refuses_labels_that_are_no_numbers_of_classes():
    with pytest.raises(
        DistillError, match=r"they are torch.float32; give labels.long\(\), or use binary_cross_entropy"
    ):
        cross_entropy(torch.zeros(2, 3), torch.tensor([0.0, 1.0]))


class TestBinaryCrossEntropy:
    def test_value_by_hand(self):
        logits, labels = torch.tensor([[0.0, math.log(3)], [math.log(3), 50.0]]), torch.tensor([[1, 1], [0, -100]])
        expected = -(math.log(0.5) + math.log(0.75) + math.log(0.25)) / 3
        assert binary_cross_entropy(logits, labels).item() == pytest.approx(expected)
        assert binary_cross_entropy(logits, labels.float()).item() == pytest.approx(expected)

    @pytest.mark.parametrize("content", [1e30, math.nan])
    def test_what_does_not_count_has_no_gradient(self, content):
        logits = torch.tensor([[0.5, content], [-0.5, 2.0]], requires_grad=True)
        value = binary_cross_entropy(logits, torch.tensor([[1.0, -100.0], [0.0, 0.5]]))
        assert gradient(value, logits)[0, 1] == 0
        assert gradient(binary_cross_entropy(logits, torch.tensor([[1.0, -100], [0, 0.5]])), logits).isfinite().all()

    def test_probabilities_are_labels_too(self):
        logits = torch.tensor([[0.3, -2.0]], requires_grad=True)
        value = binary_cross_entropy(logits, logits.detach().sigmoid())
        torch.testing.assert_close(gradient(value, logits), torch.zeros(1, 2), rtol=0, atol=1e-7)

    def test_sure_logits_stay_finite(self):
        logits = torch.tensor([[400.0, -400.0]], requires_grad=True)
        value = binary_cross_entropy(logits, torch.tensor([[0.0, 0.0]]))
        assert value.item() == pytest.approx(200)
        torch.testing.assert_close(gradient(value, logits), torch.tensor([[0.5, 0.0]]))

    def test_refuses_what_is_no_label(self):
        with pytest.raises(DistillError, match=r"logits \(2, 3\), labels \(2,\); for one class .* cross_entropy"):
            binary_cross_entropy(torch.zeros(2, 3), torch.zeros(2))
        with pytest.raises(DistillError, match=r"met label 2.0, which is not from 0 to 1; set -100"):
            binary_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.0, 2.0]]))
        with pytest.raises(DistillError, match=r"met label nan"):
            binary_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.0, math.nan]]))
        with pytest.raises(DistillError, match=r"No label is left .* \(1, 2\).* skip this batch"):
            binary_cross_entropy(torch.zeros(1, 2), torch.full((1, 2), -100))

    def test_half_precision_is_widened(self):
        logits, _ = pair(4, 6, dtype=torch.bfloat16)
        value = binary_cross_entropy(logits, torch.ones(4, 6, dtype=torch.bfloat16))
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, functional.softplus(-logits.float()).mean())


class TestMeanSquaredError:
    @pytest.mark.parametrize("shape", [(2,), (2, 1)])
    @pytest.mark.parametrize("other", [(2,), (2, 1)])
    def test_one_value_an_example_in_either_shape(self, shape, other):
        """Broadcast, [2, 1] and [2] would be four differences with a mean of 6.5."""
        values, labels = torch.tensor([1.0, 2.0]).reshape(shape), torch.tensor([1.0, 5.0]).reshape(other)
        assert mean_squared_error(values, labels).item() == 4.5

    def test_every_label_counts(self):
        assert mean_squared_error(torch.tensor([0.0, 0.0]), torch.tensor([-100, 0])).item() == 5000

    def test_mean_over_all_entries(self):
        values, labels = pair(4, 3)
        torch.testing.assert_close(mean_squared_error(values, labels), (values - labels).square().sum() / 12)
        assert mean_squared_error(values.bfloat16(), labels).dtype == torch.float32

    def test_refuses_other_shapes(self):
        with pytest.raises(DistillError, match=r"values \(4, 3\), labels \(4,\); give labels of shape \(4, 3\)"):
            mean_squared_error(torch.zeros(4, 3), torch.zeros(4))
        with pytest.raises(DistillError, match=r"values \(0, 1\), labels \(0,\); skip this batch"):
            mean_squared_error(torch.zeros(0, 1), torch.zeros(0))
