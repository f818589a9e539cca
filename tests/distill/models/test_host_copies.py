"""What is drawn and what masks hold, on the host."""

from unittest import mock

import pytest
import torch

from distill.models.host_copies import Columns, host_columns, host_generator, on_both, rows_of_columns, sliced
from distill.models.inputs import to_device
from interventions import host_copies, keep_on_host, on_host


def elsewhere(copies: list[list[int]]) -> tuple[torch.Tensor, mock._patch]:
    """A column of another device, and a patch by which it is copied from there, one value of the list each time."""
    column = torch.empty(2, device="meta")
    return column, mock.patch.object(torch.Tensor, "cpu", side_effect=[torch.tensor(each) for each in copies])


def test_columns_are_made_when_they_are_read_and_once():
    made: list[str] = []
    columns = Columns(["a", "b"], lambda name: made.append(name) or torch.ones(1))
    assert "a" in columns
    assert "c" not in columns
    assert (list(columns), len(columns), made) == (["a", "b"], 2, [])
    assert columns["a"] is columns["a"]
    assert made == ["a"]
    with pytest.raises(KeyError):
        columns["c"]


def test_a_batch_of_the_host_is_its_own_copy():
    batch = {"inputs": torch.zeros(2, 3)}
    assert host_columns(batch) is batch


def test_a_column_is_copied_once_and_again_when_it_was_written():
    column, copying = elsewhere([[1, 2], [3, 4]])
    with copying:
        for _ in range(2):
            found = host_columns({"mask": column, "here": torch.zeros(2)})
            assert found["mask"].tolist() == [1, 2]
            assert found["here"].tolist() == [0, 0]
        column.add_(1)
        assert host_columns({"mask": column})["mask"].tolist() == [3, 4]


def test_a_column_whose_changes_are_not_counted_is_copied_anew():
    with torch.inference_mode():
        column, copying = elsewhere([[1], [2]])
        with copying:
            assert [host_columns({"mask": column})["mask"].item() for _ in range(2)] == [1, 2]


def test_a_column_that_was_moved_is_read_where_it_came_from():
    """Without a wait, unless one of the two was written since."""
    here, column = torch.tensor([1, 2]), torch.empty(2, device="meta")
    keep_on_host(column, here)
    assert host_columns({"mask": column})["mask"] is here
    here.add_(1)
    with mock.patch.object(torch.Tensor, "cpu", return_value=torch.tensor([5])):
        assert host_columns({"mask": column})["mask"].tolist() == [5]


def test_what_was_not_moved_is_its_own_copy():
    column = torch.tensor([1, 2])
    batch = to_device({"mask": column}, torch.device("cpu"))
    assert batch["mask"] is column
    assert host_columns(batch) is batch


def test_a_copy_goes_with_its_column():
    before = len(host_copies._copies)
    column, copying = elsewhere([[1]])
    with copying:
        assert len(host_columns({"mask": column})["mask"]) == 1
    assert len(host_copies._copies) == before + 1
    del column
    assert len(host_copies._copies) == before


def test_rows_of_columns():
    batch = {"a": torch.arange(6).reshape(3, 2), "b": torch.arange(3)}
    taken = rows_of_columns(batch, torch.tensor([2, 0, 0]))
    assert {name: column.tolist() for name, column in taken.items()} == {"a": [[4, 5], [0, 1], [0, 1]], "b": [2, 0, 0]}


def moved(**columns):
    """Columns on another device, with their copies on the host."""
    return {name: keep_on_host(column.to("meta"), column) for name, column in columns.items()}


def test_what_is_computed_on_a_device_is_known_on_the_host_when_somebody_reads_it():
    calls = []

    def compute(columns):
        calls.append(columns)
        return {"both": columns["a"].bool() & columns["b"].bool(), "a": columns["a"], "none": None}

    batch = moved(a=torch.tensor([1, 1, 0]), b=torch.tensor([1, 0, 0]))
    made = on_both(compute, batch)
    assert len(calls) == 1
    assert made["both"].is_meta
    assert on_host(made["both"]).tolist() == [True, False, False]
    assert on_host(made["both"]) is on_host(made["both"])
    assert on_host(made["a"]) is on_host(batch["a"])
    assert len(calls) == 2


def test_on_the_host_nothing_is_computed_twice():
    calls = []
    batch = {"a": torch.tensor([1, 0])}
    made = on_both(lambda columns: calls.append(1) or columns["a"] == 1, batch)
    assert on_host(made) is made
    assert calls == [1]


def test_rows_that_are_cut_out_are_known_on_the_host():
    batch = moved(a=torch.arange(6).reshape(3, 2))
    part = sliced(batch, slice(1, 3))["a"]
    assert part.is_meta
    assert on_host(part).tolist() == [[2, 3], [4, 5]]


class Distant(torch.Generator):
    """A generator of another device."""

    device = torch.device("cuda")


def test_a_generator_of_the_host_is_itself_and_another_one_is_decided_by_the_seed():
    own = torch.Generator().manual_seed(3)
    assert host_generator(own) is own
    first, second, other = (Distant().manual_seed(seed) for seed in (1, 1, 2))
    draws = [torch.rand(4, generator=host_generator(each)).tolist() for each in (first, second, other)]
    assert draws[0] == draws[1] != draws[2]
    assert host_generator(first) is host_generator(first)  # goes on where it was
    assert torch.rand(4, generator=host_generator(first)).tolist() != draws[0]
