import pytest
import torch

from distill import DistillError, Rows, accuracy
from distill.evaluation.calibration import calibration, expected_calibration_error
from distill.models.inputs import evaluating
from tests.distill.tiny_models import bert, masked_lm, mlp, same, spread, text, vectors, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("confidences", "correct", "bins", "error"),
    [
        ([0.9, 0.9, 0.6, 0.6], [1, 0, 1, 1], 10, 0.4),
        ([0.9, 0.9, 0.6, 0.6], [1, 0, 1, 1], 1, 0.0),  # |0.75 − 0.75|
        ([1.0, 1.0, 1.0, 0.0], [1, 1, 0, 0], 15, 0.25),  # 0 lies in the first bin, 1 in the last
        ([0.55], [1], 15, 0.45),
    ],
)
def test_calibration_error_by_hand(dtype, confidences, correct, bins, error):
    found = expected_calibration_error(torch.tensor(confidences, dtype=dtype), torch.tensor(correct), bins)
    assert found.item() == pytest.approx(error, abs=1e-6 if dtype != torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("edge", [i / 10 for i in range(1, 10)])
def test_an_edge_belongs_to_the_bin_below(dtype, edge):
    """In one bin with what is below, over- and underconfidence cancel; with what is above they do not."""
    on = torch.tensor([edge], dtype=dtype)
    below, above = on - 0.02, on + 0.02
    right, wrong = torch.tensor([1]), torch.tensor([0])

    def error(one, other, bins):
        return expected_calibration_error(torch.cat([one, other]), torch.cat([right, wrong]), bins).item()

    together, apart = (lambda a, b: abs(1 - a - b) / 2), (lambda a, b: (1 - a + b) / 2)
    assert error(on, below, 10) == pytest.approx(together(edge, edge - 0.02), abs=1e-6)
    assert error(on, above, 10) == pytest.approx(apart(edge, edge + 0.02), abs=1e-6)


@pytest.mark.parametrize("bins", [1, 7, 15, 100])
def test_calibration_error_is_that_of_a_slow_loop(bins):
    draws = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=draws, dtype=torch.float64)
    correct = torch.rand(500, generator=draws, dtype=torch.float64) < confidence**2
    expected = 0.0
    for low, high in ((i / bins, (i + 1) / bins) for i in range(bins)):
        inside = [i for i, p in enumerate(confidence.tolist()) if low < p <= high]
        if inside:
            gap = sum(float(correct[i]) for i in inside) - sum(float(confidence[i]) for i in inside)
            expected += abs(gap) / 500
    assert expected_calibration_error(confidence, correct, bins).item() == pytest.approx(expected)
    assert bins > 1 or expected == pytest.approx(abs(correct.double().mean().item() - confidence.mean().item()))


@pytest.mark.parametrize(
    ("confidences", "correct", "bins", "message"),
    [
        ([0.5], [1], 0, r"0 bins of 1 confidences and 1 answers have no calibration error"),
        ([], [], 15, r"15 bins of 0 confidences and 0 answers"),
        ([0.5], [1, 0], 15, r"15 bins of 1 confidences and 2 answers"),
        ([0.5, 1.5], [1, 0], 15, r"a confidence is 1.5, which is no probability; take the softmax"),
        ([0.5, float("nan")], [1, 0], 15, r"a confidence is nan"),
    ],
)
def test_what_has_no_calibration_error_is_said(confidences, correct, bins, message):
    with pytest.raises(DistillError, match=message):
        expected_calibration_error(torch.tensor(confidences), torch.tensor(correct), bins)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_calibration_of_a_model_is_that_of_its_probabilities(batch_size):
    model, rows = spread(bert(2)).train(), text(20)
    before = weights(model)
    found = calibration(model, rows, bins=5, batch_size=batch_size)
    assert same(before, weights(model))
    assert model.training
    batch = rows.batch(range(20))
    with evaluating(model), torch.no_grad():
        chances = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.softmax(-1)
    confidence, answers = chances.max(-1)
    expected = expected_calibration_error(confidence, answers == batch["labels"], 5)
    assert found.error == pytest.approx(expected.item(), abs=1e-5)
    assert found.accuracy == accuracy(model, rows)
    assert found.confidence == pytest.approx(confidence.mean().item(), abs=1e-5)


def test_calibration_counts_labelled_tokens():
    rows = text(8, 5, 5)
    labels = torch.full((8, 5), -100)
    labels[:, 1] = 3
    found = calibration(spread(masked_lm(2)), Rows({**rows.table, "labels": labels}))
    assert found.accuracy.count == 8
    with pytest.raises(DistillError, match="calibration needs a column 'labels'"):
        calibration(mlp(), Rows({"inputs": torch.zeros(2, 6)}))
    with pytest.raises(DistillError, match="calibration needs a label that is not -100, and none of the 2 rows"):
        calibration(mlp(), Rows({"inputs": torch.zeros(2, 6), "labels": torch.tensor([-100, -100])}))


@pytest.mark.parametrize("bins", [1, 4, 15, 100])
def test_the_bins_of_the_diagram_add_up_to_the_error(bins):
    """Each holds the answers between its edges: their gaps, weighted by their number, are the error."""
    found = calibration(spread(mlp()), vectors(200), bins=bins)
    total = sum(each.count for each in found.bins)
    assert total == found.accuracy.count == 200
    gaps = sum(each.count / total * abs(each.accuracy - each.confidence) for each in found.bins)
    assert gaps == pytest.approx(found.error)
    assert sum(each.count * each.accuracy for each in found.bins) / total == pytest.approx(found.accuracy.value)
    assert all(each.count and each.low < each.confidence <= each.high for each in found.bins)
    assert all(each.high - each.low == pytest.approx(1 / bins) for each in found.bins)
    assert [each.low for each in found.bins] == sorted({each.low for each in found.bins})
    assert bins == 1 or len(found.bins) > 1
