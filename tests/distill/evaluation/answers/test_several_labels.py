"""F1 and exact matches of several labels a row, beside scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from distill import DistillError
from distill.evaluation.answers.several_labels import several_labels


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rare", [False, True])
def test_the_figures_are_those_of_scikit_learn(seed, rare):
    draw = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(23, 4, generator=draw), torch.randint(0, 2, (23, 4), generator=draw)
    if rare:
        labels[:, 1], logits[:, 1] = 0, -1.0  # F1 of a label that nothing has is 0
    found = several_labels(list(zip(logits.split(5), labels.split(5), strict=True)))
    assert found is not None
    given = (logits > 0).int().numpy()
    assert found.micro_f1 == pytest.approx(f1_score(labels, given, average="micro"), abs=1e-12)
    assert found.macro_f1 == pytest.approx(f1_score(labels, given, average="macro", zero_division=0), abs=1e-12)
    assert found.exact_match.value == pytest.approx(accuracy_score(labels, given), abs=1e-12)
    assert found.exact_match.count == 23


def test_unknown_labels_count_for_nothing():
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, 3, generator=draw), torch.randint(0, 2, (9, 3), generator=draw).float()
    labels[0], labels[1, 0], labels[2, 2] = -100, -100, -100
    found = several_labels([(logits, labels)])
    assert found is not None
    assert found.exact_match.count == 8
    known = (labels != -100).numpy()
    given, wanted = (logits > 0).numpy(), (labels == 1).numpy()
    hits, wrong, lost = ((x & y & known).sum(0) for x, y in ((given, wanted), (given, ~wanted), (~given, wanted)))
    assert found.micro_f1 == pytest.approx(2 * hits.sum() / (2 * hits.sum() + wrong.sum() + lost.sum()))
    assert found.macro_f1 == pytest.approx(np.mean(2 * hits / np.maximum(2 * hits + wrong + lost, 1)))
    assert several_labels([(logits, torch.full((9, 3), -100))]) is None


def test_labels_that_are_neither_are_refused():
    with pytest.raises(DistillError, match=r"counts labels of 0 and 1, and one is 0\.25"):
        several_labels([(torch.zeros(1, 2), torch.tensor([[1.0, 0.25]]))])
