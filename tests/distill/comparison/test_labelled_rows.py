"""Accuracies compared row by row: by hand, against the test of paired differences, and on rows with several answers."""

import pytest
import torch
from scipy import stats

from distill import Rows, compare
from distill.comparison.labelled_rows import LabelledRows, labelled_rows
from distill.comparison.trained_students import TrainedStudent
from distill.statistics.over_runs import difference_of_runs
from distill.statistics.sharing import Sharing
from interventions import Location
from tests.distill.tiny_models import bert_with, mlp, spread, text, vectors


def of_rows(right, rows=None, clusters=None):
    """The right answers of two students, to these rows."""
    first = next(iter(right.values()))[0]
    rows = torch.arange(len(first)) if rows is None else rows
    numbers = rows.unique()
    return LabelledRows(rows, Sharing(numbers, numbers, clusters, clusters), right)


def flags(*values):
    return (torch.tensor(values, dtype=torch.bool),)


def test_rows_with_several_answers_by_hand():
    """Three rows of two, one and three answers; b wins one answer and loses two."""
    found = of_rows({"a": flags(1, 0, 1, 1, 1, 0), "b": flags(1, 1, 0, 1, 0, 0)}, torch.tensor([0, 0, 1, 2, 2, 2]))
    ((above, below),) = found.sums("b")
    assert (above.tolist(), below.tolist()) == ([2, 0, 1], [2, 1, 3])
    assert [each.value for each in found.figures("a")] == [pytest.approx(4 / 6)]
    (test,) = found.discordance("a", "b")
    assert (test.won, test.lost) == (1, 2)


def test_without_clusters_it_is_the_interval_of_paired_differences():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.rand(200, generator=generator) < share for share in (0.8, 0.7))
    found = of_rows({"a": (one,), "b": (other,)})
    estimate = difference_of_runs(found.figures("b"), found.figures("a"), found.sharing).estimate
    expected = stats.ttest_rel(other.double().numpy(), one.double().numpy()).confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(expected), rel=1e-3)


def test_rows_of_one_cluster_are_one_piece_of_evidence():
    """Ten copies of each row: the interval of the rows once."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.rand(60, generator=generator) < share for share in (0.8, 0.6))
    single = of_rows({"a": (one,), "b": (other,)})
    copies = of_rows({"a": (one.repeat(10),), "b": (other.repeat(10),)}, clusters=torch.arange(60).repeat(10)[:, None])
    widths = []
    for found in (single, copies):
        estimate = difference_of_runs(found.figures("b"), found.figures("a"), found.sharing).estimate
        widths.append(estimate.high - estimate.low)
    assert widths[0] == pytest.approx(widths[1], rel=0.05)


def test_tokens_with_labels_are_counted_and_others_are_not():
    """Of a token classifier, the labelled tokens of each row."""
    models = [spread(bert_with("TokenClassification", 2, num_labels=3), seed, 0.8) for seed in (1, 2)]
    ids = text(12, 6, 6).table["input_ids"]
    ids = ids if isinstance(ids, torch.Tensor) else torch.stack(list(ids))
    labels = torch.randint(0, 3, ids.shape, generator=torch.Generator().manual_seed(0))
    labels[:, ::2] = -100
    rows = Rows({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    students = {name: (TrainedStudent(model),) for name, model in zip("ab", models, strict=True)}
    found = labelled_rows(students, rows, models[0], None, 5)
    expected = (models[1](input_ids=ids).logits.argmax(-1) == labels) & (labels >= 0)
    assert found.sums("b")[0][0].tolist() == expected.sum(1).tolist()
    assert found.sums("b")[0][1].tolist() == (labels >= 0).sum(1).tolist()


@pytest.mark.parametrize("size", [7, 128])
def test_clusters_of_rows_are_those_of_the_data(size):
    """And the batch size decides nothing."""
    data = vectors(24)
    clusters = torch.arange(24) // 4
    rows = Rows.of(data, clusters=clusters)
    teacher, one, other = (spread(mlp(), seed) for seed in range(3))
    part = Location(module="2", dims=range(3))
    found = compare(teacher, {"a": one, "b": other}, {part: part}, rows, pairs=20, batch_size=size)
    assert found.settings["shared"]["clusters"] == 6
    right = [(each(data.table["inputs"]).argmax(-1) == data.table["labels"]) for each in (one, other)]
    wanted = of_rows({"a": (right[0],), "b": (right[1],)}, clusters=clusters[:, None])
    expected = difference_of_runs(wanted.figures("b"), wanted.figures("a"), wanted.sharing)
    assert found.find("accuracy", "b").difference == expected
