"""A data set that draws its rows is drawn anew in each epoch, exactly as the seed says; what is read once says so."""

import os
import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

import distill
from distill import Rows, Schedule
from distill.data.draws import DRAWN_TWICE, seeded
from distill.training.checkpoints import Checkpoints
from distill.training.readings import readings
from tests.distill.tiny_models import QUIET, mlp, same, spread, text, vectors

ROWS = 10
OWN = np.random.default_rng(0), torch.Generator().manual_seed(0), random.Random(0)


class Jittered(Dataset):
    """Rows that Python, NumPy and torch add noise to whenever they are asked for."""

    def __init__(self, rows: int = ROWS, *, pairs: bool = False) -> None:
        self.table, self.rows, self.pairs, self.asked = vectors(rows).table, rows, pairs, 0

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int):
        self.asked += 1
        noise = torch.randn(6) + random.random() + float(np.random.rand())
        x, y = self.table["inputs"][i] + noise, int(self.table["labels"][i])
        return (x, y) if self.pairs else {"inputs": x, "label": y}


class Batches:
    """An object that makes batches with noise, and remembers in which processes; in others it is a copy."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.here = rows, set()

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers):
        self.here.add(os.getpid())
        return {name: column + torch.rand(()) for name, column in self.rows.batch(numbers).items()}


class Stream(IterableDataset):
    def __iter__(self):
        return (({"inputs": row["inputs"], "labels": row["labels"]}) for row in vectors(ROWS))


def read(data, epochs: int = 2, *, first: int = 0, **settings) -> list:
    rows, schedule = Rows.of(data), Schedule(epochs=epochs, batch_size=4, seed=3, **settings)
    numbers = range(first, schedule.total(len(rows)))
    return list(readings(rows, schedule, numbers, schedule.per_epoch(len(rows))))


def alike(one: list, other: list) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.rows, b.rows) and same(a.batch, b.batch) for a, b in zip(one, other, strict=True)
    )


def test_draws_leave_the_default_generators_as_they_were():
    """That of Python by itself: beartype draws from it in tests, to choose which part of a container it checks."""
    before = random.getstate()
    with seeded(3, 1):
        drawn = random.random()
    assert random.getstate() == before
    with seeded(3, 1):
        assert random.random() == drawn
    with seeded(3, 2):
        assert random.random() != drawn


@pytest.mark.parametrize("pairs", [False, True])
def test_each_epoch_draws_anew_and_every_draw_is_the_seeds(pairs):
    torch.manual_seed(1)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    found = read(Jittered(pairs=pairs))
    assert np.random.get_state()[1].tolist() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    by_row = [{int(n): x for each in half for n, x in zip(each.rows, each.batch["inputs"], strict=True)}
              for half in (found[:3], found[3:])]  # fmt: skip
    assert sorted(by_row[0]) == sorted(by_row[1]) == list(range(ROWS))
    assert not any(torch.equal(by_row[0][n], by_row[1][n]) for n in range(ROWS))
    assert all(torch.equal(each.batch["labels"], vectors(ROWS).table["labels"][each.rows]) for each in found)
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    assert alike(found, read(Jittered(pairs=pairs)))
    assert alike(found[4:], read(Jittered(pairs=pairs), first=4))
    assert not alike(found, read(Jittered(pairs=pairs), epochs=3)[:3] + found[:3])


def test_workers_read_the_same():
    assert alike(read(Jittered()), read(Jittered(), workers=2))
    assert alike(read(text(ROWS)), read(text(ROWS), workers=2))
    drawn = Batches(vectors(ROWS))
    assert alike(read(drawn), read(drawn, workers=2))
    assert drawn.here == {os.getpid()}
    with pytest.raises(distill.DistillError, match="workers=-1 cannot be; use 0"):
        Schedule(workers=-1)


def test_what_is_measured_is_read_once_in_order():
    data = Jittered()
    one, other = Rows.of(data), Rows.of(Jittered())
    assert data.asked == ROWS + DRAWN_TWICE
    assert same(dict(one.table), dict(other.table))
    assert torch.equal(one.take([2, 5]).drawn([1], 0, 0)["inputs"], one.drawn([5], 0, 0)["inputs"])


def test_lists_and_tensors_are_read_once_without_a_word():
    for data in (list(vectors(4)), TensorDataset(*vectors(4).table.values()), dict(vectors(4).table)):
        assert Rows.of(data).source is None


def test_a_run_that_is_resumed_is_that_run(tmp_path):
    schedule = Schedule(epochs=3, batch_size=4, lr=1e-2)
    settings = dict(objective=[distill.KD(), distill.Labels()], schedule=schedule)
    teacher, whole, parts = spread(mlp()), spread(mlp(), 1), spread(mlp(), 1)
    records = list(distill.steps(teacher, whole, {}, Jittered(), **settings))
    fixed = list(distill.steps(teacher, spread(mlp(), 1), {}, Rows.of(Jittered()).batch(range(ROWS)), **settings))
    assert [each.loss for each in records] != [each.loss for each in fixed]
    first = distill.steps(teacher, parts, {}, Jittered(), checkpoints=Checkpoints(tmp_path, every=4), **settings)
    for _ in range(5):
        next(first)
    first.close()
    rest = list(
        distill.steps(
            teacher,
            spread(mlp(), 1),
            {},
            Jittered(),
            checkpoints=Checkpoints(tmp_path, every=4, resume=True),
            **settings,
        )
    )
    assert rest == records[4:]


class Own(Jittered):
    """Rows that another generator than the default ones decides, or the clock, or how often they were asked for."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.draw = draw

    def __getitem__(self, i: int):
        self.asked += 1
        return {"inputs": self.table["inputs"][i] + self.draw(self), "label": 0}


@pytest.mark.parametrize(
    "draw",
    [
        lambda data: OWN[0].random(),
        lambda data: torch.rand(1, generator=OWN[1]),
        lambda data: OWN[2].random(),
        lambda data: random.SystemRandom().random(),
        lambda data: data.asked,
    ],
)
def test_draws_that_the_seed_does_not_decide_are_said(draw):
    for data in (Own(draw), DataLoader(Own(draw), batch_size=2, collate_fn=default_collate)):
        with pytest.warns(UserWarning, match="rows of Own differ when they are drawn twice under one seed.*torch.rand"):
            Rows.of(data)


class Broken(Jittered):
    """Rows of which one cannot be read, from a reading on."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def __getitem__(self, i: int):
        if i == 7 and self.asked >= self.after:
            raise OSError("image file is truncated")
        return super().__getitem__(i)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("after", [0, ROWS + DRAWN_TWICE])
def test_a_row_that_cannot_be_read_is_named(after, workers):
    match = r"^row 7 of the data \(a Broken with 10 rows\) cannot be read: OSError: image file is truncated; .*Subset"
    with pytest.raises(distill.DistillError, match=match):
        read(Broken(after), workers=workers)


def test_columns_that_go_are_named():
    class Going(Jittered):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            return row if self.asked <= ROWS + DRAWN_TWICE else {"inputs": row["inputs"]}

    with pytest.raises(distill.DistillError, match="had a column 'labels' at first and has inputs now; give every row"):
        read(Going())
    with pytest.raises(distill.DistillError, match="the data has no rows"):
        Rows.of(Jittered(0))


@pytest.mark.parametrize("text", [True, False])
def test_labels_that_are_drawn_have_the_models_numbers(text):
    names = ("cat", "dog", "emu")

    class Drawn(Dataset):
        def __init__(self):
            self.class_to_idx = {name: number for number, name in enumerate(names)}

        def __len__(self):
            return ROWS

        def __getitem__(self, i):
            drawn = random.randrange(3)
            return {"inputs": torch.tensor([float(drawn)]), "label": names[drawn] if text else drawn}

    order_of_the_model = ("emu", "cat", "dog")
    rows = distill.models.numbering.renumbered(
        Rows.of(Drawn()), [order_of_the_model.index(name) for name in names], order_of_the_model
    )
    for epoch in range(3):
        batch = rows.drawn(range(ROWS), epoch, 0)
        found = [order_of_the_model[number] for number in batch["labels"].tolist()]
        assert found == [names[int(x)] for x in batch["inputs"][:, 0]]


# --- DataLoader ------------------------------------------------------------------------------------------------------


def doubled(items):
    """A collation of one's own: pairs, twice as large, and noise."""
    return torch.stack([item["inputs"] for item in items]) * 2 + torch.rand(()), torch.tensor(
        [i["label"] for i in items]
    )


def test_of_a_loader_the_data_set_and_its_collation_count():
    plain, loaded = read(Jittered()), read(DataLoader(Jittered(), batch_size=3, shuffle=True))
    assert alike(plain, loaded)
    own = read(DataLoader(Jittered(), batch_size=3, collate_fn=doubled))
    assert alike(own, read(DataLoader(Jittered(), batch_size=3, collate_fn=doubled)))
    assert not torch.equal(own[0].batch["inputs"], plain[0].batch["inputs"] * 2)
    assert torch.equal(own[0].batch["labels"], plain[0].batch["labels"])


def test_its_batch_size_counts_where_none_is_named():
    loader = DataLoader(Jittered(), batch_size=5)
    settings = dict(objective=distill.KD(), epochs=1, console=QUIET)
    assert len(distill.fit(spread(mlp()), mlp(), {}, loader, **settings).records) == 2
    assert len(distill.fit(spread(mlp()), mlp(), {}, loader, batch_size=2, **settings).records) == 5


def test_the_sampler_and_the_size_of_a_batch_sampler_count():
    """`loader.sampler` and `loader.batch_size` say nothing where a batch sampler was given."""
    chosen = BatchSampler(SubsetRandomSampler([1, 2, 3]), 2, drop_last=False)
    with pytest.warns(UserWarning, match="is read once"):
        rows = Rows.of(DataLoader(Jittered(), batch_sampler=chosen))
    assert len(rows) == 3
    loader = DataLoader(Jittered(), batch_sampler=BatchSampler(SequentialSampler(range(ROWS)), 5, drop_last=False))
    records = distill.fit(spread(mlp()), mlp(), {}, loader, objective=distill.KD(), epochs=1, console=QUIET).records
    assert len(records) == 2


def test_what_of_a_loader_does_not_count_is_said():
    with pytest.warns(UserWarning, match=r"drop_last=True of a DataLoader is not used.*Subset\(data, range\(8\)\)"):
        Rows.of(DataLoader(Jittered(), batch_size=4, drop_last=True))
    with pytest.raises(distill.DistillError, match="batch_size=None does not say .* rows or batches; .*loader.dataset"):
        Rows.of(DataLoader(Jittered(), batch_size=None))


@pytest.mark.parametrize(
    ("collate", "match"),
    [
        (lambda rows: default_collate(rows[1:]), "made 3 rows of 4 .* rows are identified by their numbers; .*Rows.of"),
        (lambda rows: default_collate(rows * 2), "made 8 rows of 4"),
        (
            lambda rows: torch.stack([row["inputs"] for row in rows]),
            "is a Tensor; make it a dict of columns, or a pair",
        ),
        (lambda rows: (1, 2, 3), "is a tuple of 3; make it a dict of columns"),
        (
            lambda rows: {"inputs": [row["inputs"] for row in rows]},
            "column 'inputs' of a batch is a list and no tensor",
        ),
        (lambda rows: rows["inputs"], "^collate_fn fails on 4 rows: TypeError: .*; correct it"),
    ],
)
def test_a_collation_that_makes_no_rows_is_refused(collate, match):
    with pytest.raises(distill.DistillError, match=match):
        Rows.of(DataLoader(Jittered(), batch_size=4, collate_fn=collate))


def test_a_step_that_fails_is_said_in_one_line():
    network = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    with pytest.raises(distill.DistillError, match="^step 3 has 1 row, and batch norm needs two .*; choose a batch"):
        distill.fit(
            spread(mlp()), network, {}, Jittered(9), objective=distill.KD(), batch_size=4, epochs=1, console=QUIET
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Jittered(), batch_size=4, sampler=WeightedRandomSampler(torch.ones(ROWS), 8)),
        lambda: DataLoader(Stream(), batch_size=4),
        Stream,
        lambda: ({"inputs": row["inputs"], "labels": row["labels"]} for row in vectors(ROWS)),
    ],
)
def test_what_must_be_read_once_says_so(make):
    with pytest.warns(UserWarning, match=r"is read once: every epoch sees the same rows.*give a Dataset with"):
        rows = Rows.of(make())
    assert rows.source is None
    assert set(rows.columns) == {"inputs", "labels"}
    with pytest.warns(UserWarning, match="is read once"):
        result = distill.fit(spread(mlp()), mlp(), {}, make(), objective=distill.KD(), epochs=1, console=QUIET)
    assert result.seen.among(rows.table).all()


def test_a_loader_that_pads():
    texts = [{"input_ids": torch.arange(1, n), "labels": n % 2} for n in (3, 6, 4, 5)]

    class Texts(Dataset):
        def __len__(self):
            return len(texts)

        def __getitem__(self, i):
            return texts[i]

    def pad(items):
        ids = torch.nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
        return {
            "input_ids": ids,
            "attention_mask": (ids > 0).long(),
            "labels": torch.tensor([i["labels"] for i in items]),
        }

    rows = Rows.of(DataLoader(Texts(), batch_size=2, collate_fn=pad))
    assert rows.drawn([0, 2], 0, 0)["input_ids"].tolist() == [[1, 2, 0], [1, 2, 3]]
    assert rows.batch([0, 2])["attention_mask"].sum(1).tolist() == [2, 3]


def test_a_hugging_face_data_set_with_a_transform():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(
        {"x": [[float(i)] * 6 for i in range(ROWS)], "label": [i % 3 for i in range(ROWS)]}
    )
    plain = table.with_transform(
        lambda rows: {"inputs": [torch.tensor(x) + torch.rand(6) for x in rows["x"]], "labels": rows["label"]}
    )
    found = read(plain)
    assert found[0].batch["inputs"].shape == (4, 6)
    assert alike(found, read(plain))
    assert not torch.equal(Rows.of(plain).table["inputs"][0], Rows.of(plain).drawn([0], 0, 0)["inputs"][0])
