import pytest
import torch

from distill.statistics.tally import Tally, compare_classes, joined, stacked, sum_predictions


def tally(**sums):
    return Tally({name: torch.tensor(each, dtype=torch.float64) for name, each in sums.items()})


def test_what_each_prediction_adds():
    """Five answers by hand: right without effect, right on effect, wrong on effect as on the base, and so on."""
    wanted, unchanged = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([0, 0, 0, 2, 1])
    after, base, source = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([0, 0, 0, 2, 0]), torch.tensor([1, 1, 1, 2, 2])
    found = {
        name: each.int().tolist() for name, each in compare_classes(wanted, unchanged, after, base, source).items()
    }
    assert found == {
        "agree": [1, 1, 0, 0, 1], "effect": [0, 1, 1, 0, 1], "agree_on_effect": [0, 1, 0, 0, 1],
        "do_nothing": [1, 0, 0, 1, 1], "replace_all": [0, 1, 1, 1, 0], "agree_on_base": [1, 1, 1, 1, 0],
    }  # fmt: skip


def test_predictions_that_do_not_count_add_nothing_whatever_they_are():
    values = {"agree": torch.tensor([[1.0, float("nan"), 1.0], [float("inf"), 1.0, 0.0]])}
    found = sum_predictions(values, torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64))
    assert found["total"].tolist() == [2, 2]
    assert found["agree"].tolist() == [2, 1]


def test_entries_and_pairs_are_put_together_in_order():
    entries = [{"total": torch.tensor([1.0, 0.0]), "agree": torch.tensor([1.0, 0.0])},
               {"total": torch.tensor([2.0, 3.0]), "agree": torch.tensor([0.0, 2.0])}]  # fmt: skip
    both = stacked(entries)
    assert both["total"].tolist() == [[1, 2], [0, 3]]
    twice = joined([both, both])
    assert twice["agree"].tolist() == [[1, 0], [0, 2], [1, 0], [0, 2]]
    assert twice.of(1)["agree"].tolist() == [[0], [2], [0], [2]]
    assert twice.of(1, 0)["total"].tolist() == [[2, 1], [3, 0], [2, 1], [3, 0]]


def test_what_is_left_out_is_not_what_was_never_wanted():
    found = tally(total=[[1, 1], [0, 1], [1, 0]], agree=[[1, 0], [0, 1], [1, 0]])
    assert found.kept.tolist() == [[True, True], [False, True], [True, False]]
    assert found.left_out == 2
    wanted = found.where(torch.tensor([[True, False], [True, True], [False, False]]))
    assert wanted["total"].tolist() == [[1, 0], [0, 1], [0, 0]]
    assert wanted["agree"].tolist() == [[1, 0], [0, 1], [0, 0]]
    assert wanted.left_out == 1
    assert wanted.of(1).left_out == 0


@pytest.mark.parametrize(("name", "regression"), [("agree", False), ("error", True)])
def test_real_values_have_errors(name, regression):
    assert tally(total=[[1]], **{name: [[0.5]]}).regression is regression
