"""A stream is read in order, its state says where it is, and no more of it is in memory than is needed."""

import re

import pytest
import torch
from datasets import Dataset as HubDataset
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from distill.data.sources.stream import FILE, Stream, is_stream
from distill.errors import DistillError

ROWS = 10


class Own(IterableDataset):
    """Numbers in order; the state is the place, which a new iteration begins at."""

    def __init__(self, rows: int = ROWS) -> None:
        self.rows, self.at, self.read = rows, 0, []

    def __iter__(self):
        while self.at < self.rows:
            self.at += 1
            self.read.append(self.at - 1)
            yield {"x": self.at - 1}

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class InBatches(Own):
    """The same as a loader, in batches of three."""

    batch_size = 3

    @property
    def dataset(self):
        return iter(())

    def __iter__(self):
        rows = list(super().__iter__()) if self.at == 0 else [{"x": x} for x in range(self.at, self.rows)]
        for first in range(self.rows - len(rows), self.rows, 3):
            self.at = min(first + 3, self.rows)
            yield {"x": torch.arange(first, self.at)}


class Speechless(Own):
    """Its state fails at some places."""

    def __init__(self, first: int, last: int = ROWS + 1) -> None:
        super().__init__()
        self.fails = range(first, last)

    def state_dict(self):
        if self.at in self.fails:
            raise RuntimeError("no state\nhere")
        return super().state_dict()


class Stateless(IterableDataset):
    def __iter__(self):
        yield {"x": 1}


def hub():
    return HubDataset.from_dict({"x": range(ROWS)}).to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=4)


def columns(rows, first):
    return {"x": torch.tensor([int(row["x"]) for row in rows])}, range(first, first + len(rows))


def stream(data, read=columns):
    return Stream(data, read)


def taken(source, sizes):
    return [source.take(size)["x"].tolist() for size in sizes]


@pytest.mark.parametrize("make", [Own, InBatches, hub])
@pytest.mark.parametrize("looked_at", [0, 4, 50])
def test_a_state_at_any_step_leads_to_the_rows_of_the_whole(make, looked_at, tmp_path):
    whole = stream(make())
    steps = taken(whole, [4] * 8)
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2, 4, 4]
    assert all(sorted(row for step in steps[i : i + 3] for row in step) == list(range(ROWS)) for i in (0, 3))
    for done in range(8):
        first = stream(make())
        first.first(looked_at or 1)
        assert taken(first, [4] * done) == steps[:done]
        first.save(tmp_path)
        again = stream(make())
        again.first(3)
        again.load(tmp_path)
        assert taken(again, [4] * (8 - done)) == steps[done:]


def test_a_resumed_stream_reads_the_rows_after_the_place_alone(tmp_path):
    first = stream(Own())
    taken(first, [3, 3])
    first.save(tmp_path)
    data = Own()
    again = stream(data)
    data.read.clear()
    again.load(tmp_path)
    assert taken(again, [3]) == [[6, 7, 8]]
    assert data.read == [6, 7, 8]


def test_a_rewound_stream_gives_the_data_set_back_as_it_was():
    data = Own()
    data.at = 2
    source = stream(data)
    assert taken(source, [3, 3]) == [[2, 3, 4], [5, 6, 7]]
    source.rewind()
    assert data.at == 2
    assert taken(source, [3]) == [[2, 3, 4]]


class Row:
    """A row that is counted as long as it is in memory."""

    held = 0

    def __init__(self) -> None:
        Row.held += 1

    def __del__(self) -> None:
        Row.held -= 1


def test_rows_in_memory_are_those_of_a_step():
    class Objects(Own):
        def __iter__(self):
            for row in super().__iter__():
                yield {**row, "held": Row()}

    most = []

    def read(rows, first):
        most.append(Row.held)
        return columns(rows, first)

    source = stream(Objects(5000), read)
    taken(source, [16] * 20)
    assert len(most) == 20
    assert max(most) <= 17  # that of a step, and one that the generator still holds


def test_rows_that_teach_nothing_are_made_up_for_within_the_epoch():
    def odd(rows, first):
        kept = [(number, row) for number, row in enumerate(rows, first) if row["x"] % 2]
        return {"x": torch.tensor([row["x"] for _, row in kept])}, [number for number, _ in kept]

    assert taken(stream(Own(), odd), [3, 3, 3]) == [[1, 3, 5], [7, 9], [1, 3, 5]]
    none = stream(Own(), lambda rows, first: ({}, []))
    with pytest.raises(DistillError, match="epoch 1 of the Own has no rows to learn from"):
        none.take(2)


@pytest.mark.parametrize(
    ("data", "is_one"),
    [
        (Own(), True),
        (hub(), True),
        (InBatches(), True),
        (Stateless(), False),
        (DataLoader(TensorDataset(torch.arange(3))), False),
        (torch.nn.Linear(1, 1), False),
        ([1, 2], False),
        (Own, False),
    ],
)
def test_what_is_a_stream(data, is_one):
    assert is_stream(data) == is_one


class Forgetful(Own):
    def load_state_dict(self, state):
        pass


class Opaque(Own):
    def state_dict(self):
        return {"at": self.at, "function": print}


class Fails(Own):
    def load_state_dict(self, state):
        raise KeyError("at")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Forgetful, r"the state of the Forgetful does not say where it is: after its first row comes .*correct these"),
        (Opaque, r"the state of the Opaque holds an object that a checkpoint cannot"),
        (Fails, r"load_state_dict of the Fails refuses what its state_dict returned, \{'at': 1\} \(KeyError"),
        (lambda: Own(0), "the Own has no rows; give at least one"),
        (lambda: Speechless(0), r"state_dict of the Speechless fails after row 0 \(RuntimeError: no state here\): no"),
        (lambda: Speechless(0, 1), r"has no state before its first row, and begins with \[\{'x': 0\}\] once and with"),
    ],
)
def test_states_that_do_not_hold_are_refused_before_training(make, message):
    with pytest.raises(DistillError, match=message):
        stream(make()).first(1)


@pytest.mark.parametrize("at", [0, 5, 7])
def test_a_row_that_cannot_be_read_is_named(at):
    class Broken(Own):
        def __iter__(self):
            for row in super().__iter__():
                if row["x"] == at:
                    raise ValueError("a broken line")
                yield row

    with pytest.raises(DistillError, match=re.escape(f"row {at} of the Broken cannot be read: ValueError: a broken")):
        taken(stream(Broken()), [4, 4])


@pytest.mark.parametrize("at", [1, 6])
def test_a_row_that_cannot_become_tensors_is_named(at):
    def read(rows, first):
        if any(row["x"] == at for row in rows):
            raise DistillError("no number")
        return columns(rows, first)

    with pytest.raises(DistillError, match=f"row {at} of the Own: no number"):
        taken(stream(Own(), read), [4, 4])


def test_a_label_without_a_class_is_named_and_others_are_renumbered():
    def labelled(rows, first):
        table, numbers = columns(rows, first)
        return {**table, "labels": table["x"] % 3}, numbers

    source = stream(Own(), labelled)
    source.renumber([1, 2, 0])
    source.renumber([0, 2, 1])
    assert source.take(4)["labels"].tolist() == [2, 1, 0, 2]
    source = stream(Own(), lambda rows, first: labelled(rows, first))
    source.classes = 2
    with pytest.raises(DistillError, match=r"row 2 of the Own has label 2 and there are 2 classes \(0 to 1\)"):
        source.take(4)


def test_draws_of_default_generators_belong_to_the_row():
    class Noisy(Own):
        def __iter__(self):
            for row in super().__iter__():
                yield {"x": row["x"] + 1000 * torch.rand(()).item()}

    once, again = stream(Noisy()), stream(Noisy())
    rows = taken(once, [4, 4, 2, 4])
    assert taken(again, [3, 5, 2, 4]) == [rows[0][:3], rows[0][3:] + rows[1], rows[2], rows[3]]
    assert rows[0] != rows[3]


def test_a_checkpoint_without_a_stream_is_refused(tmp_path):
    with pytest.raises(DistillError, match="holds no state of a stream"):
        stream(Own()).load(tmp_path)
    assert not (tmp_path / FILE).exists()


def test_a_state_that_fails_later_is_an_error_of_one_line(tmp_path):
    source = stream(Speechless(5))
    assert taken(source, [4]) == [[0, 1, 2, 3]]
    source.save(tmp_path)
    source.take(2)
    with pytest.raises(
        DistillError, match=r"fails after row 6 \(RuntimeError: no state here\): no run could be resumed"
    ):
        source.save(tmp_path)
