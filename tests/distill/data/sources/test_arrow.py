"""Large data sets of Hugging Face are read from Arrow by number, with the values that small ones have in memory."""

import time

import datasets
import numpy as np
import psutil
import pyarrow
import pytest
import torch
from datasets import Array2D, ClassLabel, Features, List, Value

import distill
from distill import Rows, Schedule
from distill.data.sources import arrow
from distill.data.sources.lazy_columns import LazyColumn, in_memory, lengths_of
from tests.distill.tiny_models import QUIET, gpt2_lm, same, spread, weights

ROWS = 50


def table(**columns) -> datasets.Dataset:
    """Rows of several lengths in every type that models are given."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (ROWS,), generator=draw).tolist()
    ids = [torch.randint(1, 30, (length,), generator=draw).tolist() for length in lengths]
    whole = {
        "input_ids": ids,
        "attention_mask": [[1] * length for length in lengths],
        "mask": [[bool(each % 2) for each in row] for row in ids],
        "reals": [[each / 7 for each in row] for row in ids],
        "grid": torch.randn(ROWS, 3, 2, generator=draw).tolist(),
        "fixed": torch.randn(ROWS, 4, generator=draw).tolist(),
        "weight": torch.randn(ROWS, generator=draw).tolist(),
        "missing": [None if i % 5 == 0 else i / 2 for i in range(ROWS)],
        "label": [i % 3 for i in range(ROWS)],
    }
    features = Features(
        {
            "input_ids": List(Value("int32")),
            "attention_mask": List(Value("int8")),
            "mask": List(Value("bool")),
            "reals": List(Value("float64")),
            "grid": Array2D((3, 2), "float32"),
            "fixed": List(Value("float32"), length=4),
            "weight": Value("float64"),
            "missing": Value("float32"),
            "label": ClassLabel(names=["a", "b", "c"]),
        }
    )
    return datasets.Dataset.from_dict({**whole, **columns}, features=features)


def on_disk(data: datasets.Dataset, folder) -> datasets.Dataset:
    data.save_to_disk(folder)
    return datasets.load_from_disk(folder)


WAYS = {
    "whole": lambda data: data,
    "selected": lambda data: data.select([7, 3, 3, 20, 49, 0]),
    "shuffled": lambda data: data.shuffle(seed=0, load_from_cache_file=False),
    "joined": lambda data: datasets.concatenate_datasets([data, data.select(range(9))]),
    "columns": lambda data: data.with_format("torch", columns=["input_ids", "attention_mask", "label"]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mapped", [False, True], ids=["in memory", "mapped"])
def test_rows_of_a_large_data_set_are_those_of_a_small_one(way, mapped, tmp_path, monkeypatch):
    data = WAYS[way](on_disk(table(), tmp_path / "data") if mapped else table())
    small = Rows.of(data)
    monkeypatch.setattr(arrow, "IN_MEMORY", 0)
    monkeypatch.setattr(arrow, "LET_GO", 0)
    large = Rows.of(data)
    assert isinstance(large.table["input_ids"], LazyColumn)
    assert isinstance(large.table["labels"], torch.Tensor)
    assert (small.columns, small.classes, len(small)) == (large.columns, large.classes, len(large))
    for numbers in ([0], [3, 1, 3, -1], range(len(small))):
        for name, column in small.batch(numbers).items():
            found = large.batch(numbers)[name]
            assert found.dtype == column.dtype, name
            assert torch.equal(found.nan_to_num(9), column.nan_to_num(9)), name
    for name, column in small.table.items():
        for one, other in zip(column, in_memory(large.table[name]), strict=True):
            assert torch.equal(one.nan_to_num(9), other.nan_to_num(9)), name
    assert (
        large.take([4, 2])
        .take([1])[0]["reals" if way != "columns" else "input_ids"]
        .equal(small[2]["reals" if way != "columns" else "input_ids"])
    )
    assert lengths_of(large.table["input_ids"]).equal(lengths_of(small.table["input_ids"]))


def test_rows_of_one_length_need_no_mask_and_others_do(monkeypatch):
    monkeypatch.setattr(arrow, "IN_MEMORY", 0)
    even = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4]]})
    assert Rows.of(even).batch([1])["input_ids"].tolist() == [[3, 4]]
    with pytest.raises(distill.DistillError, match="no 'attention_mask'"):
        Rows.of(datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]}))


def test_labels_of_text_are_the_classes(monkeypatch):
    monkeypatch.setattr(arrow, "IN_MEMORY", 0)
    data = datasets.Dataset.from_dict({"x": [[1.0], [2.0, 3.0], [4.0]], "label": ["no", "yes", "no"]})
    rows = Rows.of(data)
    assert rows.classes == ("no", "yes")
    assert rows.table["labels"].tolist() == [0, 1, 0]


def test_files_that_are_mapped_are_let_go(tmp_path, monkeypatch):
    store = arrow.ArrowStore(on_disk(table(), tmp_path / "data"))
    assert len(store._mapped) == 1
    assert not arrow.ArrowStore(table())._mapped
    advised = []
    monkeypatch.setattr(arrow, "_advise", lambda *where: advised.append(where))
    for _ in range(3 * arrow.LET_GO // (arrow.AROUND * 2 * ROWS)):
        store.read(["input_ids", "reals"], torch.arange(ROWS))
    assert 2 <= len(advised) <= 3


def test_a_training_on_mapped_rows_is_the_one_on_rows_in_memory(tmp_path, monkeypatch):
    data = on_disk(table().select_columns(["input_ids", "attention_mask"]), tmp_path / "data")

    def trained(folder, **more):
        teacher, student = spread(gpt2_lm(), 0), spread(gpt2_lm(), 1)
        result = distill.fit(
            teacher, student, data=data, output_dir=folder, mapping={}, console=QUIET,
            schedule=Schedule(steps=8, batch_size=4, lr=1e-3), every=4, **more
        )  # fmt: skip
        return weights(student), result

    expected, small = trained(tmp_path / "small")
    monkeypatch.setattr(arrow, "IN_MEMORY", 0)
    found, large = trained(tmp_path / "large")
    assert same(expected, found)
    assert [each.loss for each in small.records] == [each.loss for each in large.records]
    rows = Rows.of(data)
    seen = large.seen.among(rows.table)
    assert int(seen.sum()) == 32
    assert torch.equal(seen, large.seen.remembered().among(rows.table))
    again, _ = trained(tmp_path / "large", resume="auto")
    assert same(again, found)
    other = datasets.Dataset.from_dict({**data.to_dict(), "input_ids": [[9] * len(row) for row in data["input_ids"]]})
    with pytest.raises(distill.DistillError, match="data column 'input_ids'"):
        distill.fit(
            spread(gpt2_lm(), 0), spread(gpt2_lm(), 1), {}, other, output_dir=tmp_path / "large", console=QUIET,
            schedule=Schedule(steps=8, batch_size=4, lr=1e-3), every=4, resume=True,
        )  # fmt: skip


def write_tokens(folder, megabytes: float) -> None:
    """Write a data set of so many megabytes of tokens, in rows of 8 to 24, with their masks."""
    draw = np.random.default_rng(0)
    for part in range(max(1, round(megabytes / 20))):
        lengths = draw.integers(8, 25, int(min(megabytes, 20) * 1e6 / 5 / 16))
        offsets = pyarrow.array(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
        values = draw.integers(5, 40, lengths.sum()).astype(np.int32), np.ones(lengths.sum(), np.int8)
        columns = [pyarrow.ListArray.from_arrays(offsets, pyarrow.array(each)) for each in values]
        table = pyarrow.table(columns, ["input_ids", "attention_mask"])
        datasets.Dataset(table).save_to_disk(f"{folder}/{part}")


@pytest.mark.parametrize("megabytes", [18, pytest.param(200, marks=pytest.mark.full)])
def test_memory_does_not_grow_with_the_data_and_the_first_step_takes_seconds(megabytes, tmp_path):
    write_tokens(tmp_path, megabytes)
    schedule, process = Schedule(steps=60, batch_size=32, lr=1e-3), psutil.Process()

    def grown_by(data) -> tuple[float, float]:
        """The megabytes by which a training lets memory grow, and the processor time until its first step."""
        before, began, first = process.memory_info().rss, time.process_time(), 0.0
        teacher, student = spread(gpt2_lm(1), 0), spread(gpt2_lm(1), 1)
        for _ in distill.steps(teacher, student, {}, data, objective=distill.KD(), schedule=schedule):
            first = first or time.process_time() - began
        return (process.memory_info().rss - before) / 1e6, first

    parts = [datasets.load_from_disk(folder) for folder in sorted(tmp_path.iterdir())]
    data = datasets.concatenate_datasets(parts)
    grown_by(data.select(range(64)))
    memory, first = grown_by(data)
    assert memory < min(150, 3 * megabytes)  # in memory it takes more than ten times as much
    assert first < 5
