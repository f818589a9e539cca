"""What rows share: read from a column or a tensor, kept beside the columns, and given to no model."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import Dataset

from distill import DistillError, Rows
from distill.training.fingerprints import of_data

X = [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]


def partition(rows):
    """Which rows share something, whatever the numbers are."""
    each = [{number for number in row if number >= 0} for row in rows.clusters.tolist()]
    return [[bool(one & other) for other in each] for one in each]


@pytest.mark.parametrize(
    "column",
    [
        ["a", "b", "a", "c"],
        [3, 1, 3, 0],
        [0.5, 0.25, 0.5, 1.0],
        torch.tensor([7, 2, 7, 5]),
        torch.tensor([[7], [2], [7], [5]]),
        [("a",), ("b", "c"), ("a",), ("d",)],
    ],
)
def test_equal_values_of_a_column_are_one_cluster(column):
    rows = Rows.of({"x": X, "shared": column}, clusters="shared")
    assert rows.columns == ("x",)
    assert partition(rows) == [[i == j or {i, j} == {0, 2} for j in range(4)] for i in range(4)]


def test_a_row_may_be_in_several_clusters_of_several_columns():
    data = {"x": X, "speaker": ["a", "b", "a", None], "images": [[5, 6], [6, 7], [8], [-1, 5]], "labels": [0, 1, 0, 1]}
    rows = Rows.of(data, clusters=["speaker", "images"])
    assert rows.columns == ("x", "labels")
    # a 5 6 | b 6 7 | a 8 | 5
    assert rows.clusters.tolist() == [[0, 2, 3], [1, 3, 4], [0, 5, -1], [2, -1, -1]]


def test_numbers_of_two_columns_are_different_clusters():
    rows = Rows.of({"x": X, "one": [0, 1, 2, 3], "other": [3, 2, 1, 0]}, clusters=("one", "other"))
    assert partition(rows) == [[i == j for j in range(4)] for i in range(4)]


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3)])
def test_a_tensor_is_kept_as_it_is(shape):
    given = torch.arange(12)[: torch.Size(shape).numel()].view(shape)
    assert torch.equal(Rows.of({"x": X}, clusters=given).clusters, given.view(4, -1))


def test_no_clusters_unless_they_are_named():
    assert Rows.of({"x": X, "template": [0, 0, 1, 1]}).clusters is None
    assert Rows.of({"x": X, "template": [0, 0, 1, 1]}).columns == ("x", "template")


def test_they_follow_their_rows():
    rows = Rows.of({"x": X, "labels": ["no", "yes", "no", "no"]}, clusters=torch.tensor([4, 3, 4, 1]))
    assert rows.take([3, 0]).clusters.tolist() == [[1], [4]]
    assert rows.renumbered([1, 0], ("yes", "no")).clusters.tolist() == rows.clusters.tolist()
    assert Rows.of(rows, classes=["yes", "no"]).clusters.tolist() == rows.clusters.tolist()
    assert replace(rows, table={"x": rows.table["x"]}).clusters.tolist() == rows.clusters.tolist()


def test_rows_are_read_again_with_clusters():
    rows = Rows.of({"x": X, "template": [1, 0, 1, 2]})
    found = Rows.of(rows, clusters="template")
    assert (found.columns, found.clusters.tolist()) == (("x",), [[0], [1], [0], [2]])
    assert Rows.of(rows, clusters=torch.arange(4)).columns == ("x", "template")


def test_neither_models_nor_fingerprints_see_them():
    plain, clustered = Rows.of({"x": X}), Rows.of({"x": X}, clusters=torch.arange(4))
    assert of_data(plain) == of_data(clustered)
    assert list(clustered.batch([0, 1])) == list(clustered[0]) == ["x"]


class Drawn(Dataset):
    """Rows that are read anew in each epoch, with a column that says what they share."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {"x": torch.rand(2), "template": "ab"[i % 2]}


def test_rows_that_are_drawn_anew_leave_the_column_out_each_time():
    rows = Rows.of(Drawn(), clusters="template")
    assert rows.clusters.tolist() == [[0], [1], [0], [1]]
    assert list(rows.drawn([0, 3], epoch=1, seed=0)) == ["x"]
    assert list(rows.take([1, 2]).drawn([0], epoch=1, seed=0)) == ["x"]


@pytest.mark.parametrize(
    ("clusters", "match"),
    [
        ("speaker", r"clusters='speaker' must name columns .* has 'x', 'template'"),
        (["x", "template"], "beside those that models are given"),
        ([], "must name columns"),
        (torch.arange(3), r"shape \[3, 1\] and the data 4 rows"),
        (torch.zeros(4), "must be whole numbers"),
        (torch.zeros(4, 1, 1).long(), r"\[4, 1, 1\]\S* must be whole numbers"),
    ],
)
def test_what_names_no_clusters_is_refused(clusters, match):
    with pytest.raises(DistillError, match=match):
        Rows.of({"x": X, "template": [0, 0, 1, 1]}, clusters=clusters)


@pytest.mark.parametrize(
    ("column", "match"), [([{}, {}, {}, {}], "names no cluster by"), ([0, 1, 2], r"shape \[3, 1\]")]
)
def test_a_column_that_names_no_clusters_is_refused(column, match):
    with pytest.raises(DistillError, match=match):
        Rows.of({"x": X, "template": column}, clusters="template")
