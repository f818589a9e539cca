"""The figures of real values, beside SciPy's."""

import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from distill import DistillError
from distill.evaluation.answers.real_values import real_values


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("width", [1, 3])
def test_the_figures_are_those_of_scipy(seed, width):
    draw = torch.Generator().manual_seed(seed)
    answers = torch.randn(21, width, generator=draw)
    labels = (answers + torch.randn(21, width, generator=draw)).round(decimals=1)  # with equal values
    given = labels[:, 0] if width == 1 else labels
    found = real_values(list(zip(answers.split(4), given.split(4), strict=True)))
    assert found is not None
    one, other = answers.double().numpy(), labels.double().numpy()
    assert found.mse == pytest.approx(((one - other) ** 2).mean(), rel=1e-12)
    for name, measure in (("pearson", pearsonr), ("spearman", spearmanr)):
        expected = sum(measure(one[:, i], other[:, i]).statistic for i in range(width)) / width
        assert getattr(found, name) == pytest.approx(expected, abs=1e-12)


def test_what_has_no_correlation():
    found = real_values([(torch.ones(3, 1), torch.tensor([1.0, 2.0, 3.0]))])
    assert found is not None
    assert found.pearson is None
    assert found.spearman is None
    assert found.mse == pytest.approx(5 / 3)
    assert real_values([(torch.ones(2, 1), torch.tensor([-100, -100]))]) is None
    known = real_values([(torch.tensor([[1.0], [9.0], [2.0]]), torch.tensor([1, -100, 3]))])
    assert known is not None
    assert known.mse == 0.5
    assert known.pearson == pytest.approx(1)
    with pytest.raises(DistillError, match=r"one label a value: answers \[2, 2\], labels \[2\]"):
        real_values([(torch.zeros(2, 2), torch.zeros(2))])
