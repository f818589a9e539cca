"""What is done with columns is the same for those in memory and those that are read when they are used."""

import pytest
import torch

from distill import Rows
from distill.data.sources.lazy_columns import (
    SAMPLED,
    LazyColumn,
    in_memory,
    is_floating,
    is_lazy,
    is_ragged,
    lengths_of,
    parts_of_table,
    read_columns,
    sampled,
    some_rows,
    take_columns,
)
from tests.distill.tiny_models import text


class Counted:
    """A store that counts how often it is read, and how many rows."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.readings, self.read_rows = rows, 0, 0

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, names, numbers):
        self.readings, self.read_rows = self.readings + 1, self.read_rows + len(numbers)
        return {name: read_columns(self.rows.table, numbers)[name] for name in names}

    def lengths(self, name):
        return lengths_of(self.rows.table[name])


def lazy(rows: Rows) -> tuple[dict, Counted]:
    store = Counted(rows)
    return {name: LazyColumn(store, name) for name in rows.columns}, store


def test_columns_of_one_store_are_read_together_also_after_they_were_taken():
    rows = text(30)
    table, store = lazy(rows)
    table |= {"weight": torch.arange(30.0)}
    taken = take_columns(take_columns(table, torch.tensor([9, 4, 4, 1])), torch.tensor([2, 0]))
    found = read_columns(taken, torch.tensor([1, 0]))
    assert (store.readings, store.read_rows) == (1, 2)
    assert list(found) == list(table)
    assert found["weight"].tolist() == [9.0, 4.0]
    assert [row.tolist() for row in found["input_ids"]] == [
        rows[9]["input_ids"].tolist(),
        rows[4]["input_ids"].tolist(),
    ]


def test_a_table_in_parts_is_the_table():
    rows = text(30)
    table, store = lazy(rows)
    parts = list(parts_of_table(table, 7))
    assert [len(part["labels"]) for part in parts] == [7, 7, 7, 7, 2]
    assert store.readings == 5
    assert all(
        one.equal(other)
        for one, other in zip(
            (row for part in parts for row in part["input_ids"]), rows.table["input_ids"], strict=True
        )
    )


@pytest.mark.parametrize("name", ["labels", "input_ids"])
def test_a_column_is_a_sequence_of_its_rows(name):
    rows = text(30)
    table, store = lazy(rows)
    column, expected = table[name], list(rows.table[name])
    for one, other in zip(column, expected, strict=True):
        assert one.equal(other)
    assert store.readings == 1
    assert column[-1].equal(expected[-1])
    assert column[3:3] == []
    assert all(one.equal(other) for one, other in zip(column[4:20:3], expected[4:20:3], strict=True))
    with pytest.raises(IndexError):
        column[30]
    assert all(one.equal(other) for one, other in zip(in_memory(column), expected, strict=True))
    assert is_lazy(table)
    assert not is_lazy(rows.table)
    assert is_ragged(column) == is_ragged(rows.table[name]) == (name == "input_ids")
    assert not is_floating(column)
    assert lengths_of(column).equal(lengths_of(rows.table[name]))


def test_changes_are_applied_in_order_to_what_is_read():
    table, _ = lazy(text(30))
    changed = table["labels"].changed(lambda each: each + 1).changed(lambda each: each * 10)
    assert changed.read(torch.tensor([3])).tolist() == [(int(table["labels"][3]) + 1) * 10]
    ragged = table["input_ids"].changed(lambda each: -each)
    assert ragged[5].equal(-table["input_ids"][5])


def test_a_sample_is_evenly_spaced_and_bounded():
    for rows in (1, 2, SAMPLED, 10**7 + 1):
        found = sampled(rows)
        assert len(found.unique()) == len(found) == min(rows, SAMPLED)
        assert (int(found[0]), int(found[-1])) == (0, rows - 1)
    table, store = lazy(text(3000))
    assert len(some_rows(table["input_ids"])) == SAMPLED == store.read_rows
    assert len(some_rows(text(3000).table["input_ids"])) == 3000
