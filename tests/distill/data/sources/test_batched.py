"""Anything with `len` and `batch(numbers)` is data: for training, for measuring, and without being walked over."""

import pytest
import torch

import distill
from distill import Rows, Schedule, metrics
from distill.data.rows import batches
from tests.distill.tiny_models import (
    QUIET,
    bert,
    gpt2_lm,
    images,
    llama,
    same,
    spread,
    text,
    vit,
    weights,
)


class Own:
    """Rows of an object of the user, which remembers what was read."""

    def __init__(self, rows: Rows, length: int | None = None) -> None:
        self.rows, self.length, self.read = rows, length or len(rows), 0

    def __len__(self) -> int:
        return self.length

    def batch(self, numbers):
        self.read += len(numbers)
        return self.rows.batch([int(number) % len(self.rows) for number in numbers])


class Drawn(Own):
    """Rows with a token that is drawn whenever they are read."""

    def batch(self, numbers):
        batch = super().batch(numbers)
        batch["input_ids"][:, 0] = torch.randint(5, 9, (len(numbers),))
        return batch


def unlabelled(rows: int = 40) -> Rows:
    return text(rows, labels=False)


def trained(build, data, folder=None, **settings):
    teacher, student = spread(build(), 0), spread(build(), 1)
    schedule = Schedule(steps=4, batch_size=4, lr=1e-3, group_by_length=False, **settings)
    result = distill.fit(teacher, student, data=data, schedule=schedule, console=QUIET, output_dir=folder)
    return weights(student), result


@pytest.mark.parametrize(
    ("build", "rows"),
    [
        (gpt2_lm, unlabelled),
        pytest.param(llama, unlabelled, marks=pytest.mark.full),
        pytest.param(vit, images, marks=pytest.mark.full),
        (bert, text),
    ],
)
def test_a_training_on_batches_of_an_object_is_the_one_on_its_rows(build, rows):
    data = rows(40)
    whole, expected = trained(build, data)
    found, result = trained(build, Own(data))
    assert same(whole, found)
    assert [each.loss for each in result.records] == [each.loss for each in expected.records]


def test_figures_of_an_object_are_those_of_its_rows():
    data, teacher, student = unlabelled(20), spread(gpt2_lm(), 0), spread(gpt2_lm(), 1)
    assert metrics.perplexity(student, Own(data)) == metrics.perplexity(student, data)
    data = Rows({**data.table, "labels": data.table["input_ids"]})
    assert metrics.accuracy(student, Own(data)) == metrics.accuracy(student, data)
    measured = [distill.interchange_accuracy(teacher, student, "full", each, pairs=8) for each in (Own(data), data)]
    assert repr(measured[0]) == repr(measured[1])


def test_no_more_is_read_than_is_used(tmp_path):
    data = Own(unlabelled(), length=10**6)
    _, result = trained(gpt2_lm, data, tmp_path / "run")
    assert data.read < 40_000
    assert result.seen.among(Rows.of(unlabelled()).table).any()
    assert not result.seen.among(
        {"input_ids": [torch.tensor([3, 3, 3, 3, 3])], "attention_mask": [torch.ones(5)]}
    ).any()


def test_what_an_object_draws_the_seed_decides():
    one, other, last = (trained(gpt2_lm, Drawn(unlabelled()), seed=seed)[0] for seed in (1, 1, 2))
    assert same(one, other)
    assert not same(one, last)
    rows = Rows.of(Drawn(unlabelled()))
    assert not torch.equal(rows.drawn([0], 0, 0)["input_ids"], rows.drawn([0], 1, 0)["input_ids"]) or not torch.equal(
        rows.drawn([1], 0, 0)["input_ids"], rows.drawn([1], 1, 0)["input_ids"]
    )


def test_labels_are_renumbered_and_checked_as_they_are_read():
    rows = Rows.of(Own(text(8)), classes=["a", "b", "c"])
    swapped = rows.renumbered((2, 1, 0), ("c", "b", "a"))
    for places in batches(8, 3):
        assert swapped.batch(places)["labels"].equal(2 - rows.batch(places)["labels"])
    with pytest.raises(distill.DistillError, match=r"has label 2 and names 1 classes \(0 to 0\)"):
        rows.renumbered((0,), ("a",)).batch(range(8))


def test_rows_of_an_object_are_taken_and_indexed():
    data = text(12)
    taken, expected = Rows.of(Own(data)).take([7, 2, 7]).take([1, 0]), data.take([2, 7])
    assert taken.columns == expected.columns
    for one, other in zip(taken, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in one)
    assert taken.table["input_ids"][-1].equal(expected.table["input_ids"][-1])
    assert [len(taken.table["input_ids"][i]) for i in range(2)] == [len(row) for row in expected.table["input_ids"]]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda numbers: [1, 2], r"Bad\.batch of 1 rows is a list; return a dict"),
        (lambda numbers: {"x": [1]}, r"has a column 'x' that is a list; make it a tensor .*\[1, \.\.\.\]"),
        (lambda numbers: {"x": torch.zeros(3, 2)}, r"has a column 'x' that is of shape \[3, 2\]"),
        (lambda numbers: {"x": torch.zeros(())}, r"of shape \[\]"),
        (
            lambda numbers: 1 / 0,
            r"Bad\.batch of 1 rows fails: ZeroDivisionError: division by zero; look at data\.batch",
        ),
    ],
)
def test_batches_that_are_none_are_refused(batch, message):
    bad = type("Bad", (), {"__len__": lambda self: 4, "batch": lambda self, numbers: batch(numbers)})()
    with pytest.raises(distill.DistillError, match=message):
        Rows.of(bad)


def test_an_empty_object_and_one_that_loses_a_column_are_refused():
    with pytest.raises(distill.DistillError, match=r"Own has no rows; give at least one"):
        Rows.of(type("Own", (), {"__len__": lambda self: 0, "batch": lambda self, numbers: {}})())
    batch = lambda self, numbers: {"x" if len(numbers) == 1 else "y": torch.zeros(len(numbers), 2)}  # noqa: E731
    rows = Rows.of(type("Own", (), {"__len__": lambda self: 9, "batch": batch})())
    with pytest.raises(distill.DistillError, match=r"had a column 'x' at first and has y now"):
        rows.batch([0, 1])
