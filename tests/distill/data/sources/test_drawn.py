"""Data sets that are larger than memory is meant for: rows made by number, the same ones as in memory."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import distill
from distill import DistillError, Rows, metrics
from distill.data.sources import drawn
from distill.data.sources.lazy_columns import LazyColumn
from tests.distill.tiny_models import bert

ROWS = 48


class Images(Dataset[Any]):
    """Images of 64 KiB, drawn anew each time, that count how many bytes of them are alive."""

    def __init__(self, rows: int = ROWS, side: int = 128) -> None:
        self.rows, self.side, self.alive, self.most, self.read = rows, side, 0, 0, 0

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> Any:
        image = torch.randn(1, self.side, self.side) + i
        self.alive += image.nbytes
        self.read += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(image, self._freed, image.nbytes)
        return {"input": image, "label": torch.tensor(i % 3, dtype=torch.int16), "name": f"row {i}"}

    def _freed(self, size: int) -> None:
        self.alive -= size


class Texts(Dataset[Any]):
    """Tokens of different lengths."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> Any:
        ids = torch.randint(5, 40, (1 + i % 7,))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ["yes", "no", "no"][i % 3]}


def limited(monkeypatch: pytest.MonkeyPatch, limit: int, data: Any) -> Rows:
    monkeypatch.setattr(drawn, "IN_MEMORY", limit)
    return Rows.of(data)


@pytest.mark.filterwarnings("ignore:the columns 'name'")
def test_no_more_of_the_rows_is_in_memory_than_the_limit(monkeypatch):
    size = 4 * 128**2
    data = Images()
    whole = Images()
    kept = Rows.of(whole)
    assert isinstance(kept.table["input"], torch.Tensor)
    assert kept.table["input"].nbytes == ROWS * size
    rows = limited(monkeypatch, 6 * size, data)
    assert isinstance(rows.table["input"], LazyColumn)
    gc.collect()
    assert data.alive == 0
    assert data.most <= 12 * size < ROWS * size  # those of the limit, and the few that are drawn twice for a check
    data.most = 0
    model = nn.Sequential(nn.Flatten(), nn.Linear(128**2, 3))
    plan = distill.Schedule(batch_size=4, epochs=2)
    for _ in distill.steps(None, model, {}, rows, objective=distill.Labels(), schedule=plan):
        pass
    metrics.accuracy(model, rows, batch_size=4)
    gc.collect()
    assert data.most <= 16 * size


@pytest.mark.filterwarnings("ignore:the columns 'name'")
def test_the_rows_are_those_that_are_kept_in_memory(monkeypatch):
    kept, rows = Rows.of(Images(12, 4)), limited(monkeypatch, 0, Images(12, 4))
    assert rows.columns == kept.columns
    for number in ([0, 1, 2], [11, 3, 3], [7]):
        for name, column in kept.batch(number).items():
            assert rows.batch(number)[name].equal(column)
            assert rows.batch(number)[name].dtype == column.dtype
    assert rows.take([5, 2]).batch([1])["input"].equal(kept.table["input"][2:3])
    for epoch in (0, 1):
        one, other = (each.drawn([4, 9], epoch, 7)["input"] for each in (kept, rows))
        assert one.equal(other)
    assert not rows.drawn([4], 0, 7)["input"].equal(rows.drawn([4], 1, 7)["input"])


@pytest.mark.filterwarnings("ignore:the model does not name its classes")
def test_tokens_and_names_of_classes(monkeypatch):
    kept, rows = Rows.of(Texts()), limited(monkeypatch, 0, Texts())
    assert rows.classes == kept.classes == ("no", "yes")
    assert rows.table["labels"].equal(kept.table["labels"])
    one, other = kept.batch(list(range(9))), rows.batch(list(range(9)))
    assert all(one[name].equal(other[name]) for name in one)
    model = bert(labels=2)
    assert metrics.accuracy(model, rows) == metrics.accuracy(model, kept)
    plan = distill.Schedule(batch_size=8, steps=3)
    losses = []
    for data in (kept, rows):
        torch.manual_seed(0)
        student = bert(1, labels=2)
        losses.append([r.loss for r in distill.steps(model, student, {}, data, objective=distill.KD(), schedule=plan)])
    assert losses[0] == losses[1]


def _stack(rows: list[Any]) -> dict[str, torch.Tensor]:
    return {"x": torch.stack([x for x, _ in rows]) + torch.rand(1), "labels": torch.tensor([y for _, y in rows])}


class Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, i: int) -> Any:
        return torch.rand(5) + i, i % 2


@pytest.mark.parametrize("collate", [None, _stack])
def test_a_loader_and_pairs(collate, monkeypatch):
    loader: Any = DataLoader(Pairs(), batch_size=4, collate_fn=collate)
    kept, rows = Rows.of(loader), limited(monkeypatch, 0, loader)
    assert isinstance(rows.table[rows.columns[0]], LazyColumn)
    assert all(kept.batch([9, 0, 3])[name].equal(column) for name, column in rows.batch([9, 0, 3]).items())


def test_rows_of_other_columns_are_refused(monkeypatch):
    class Odd(Pairs):
        def __getitem__(self, i: int) -> Any:
            return {"x": torch.zeros(2), **({"y": torch.zeros(2)} if i == 6 else {})}

    with pytest.raises(DistillError, match=r"rows 0 and 6 of the data have different columns: \['x'\]"):
        limited(monkeypatch, 0, Odd())
