"""A shuffle buffer of `datasets` gives the rows that it always gave, and its state holds the rows in it."""

import io

import datasets
import pytest
import torch

from distill.data.sources.shuffle_buffers import Held, plain, with_kept_buffers

ROWS = 23


def shuffled(shards: int = 1, buffer: int = 6, *, maps: bool = False):
    data = datasets.Dataset.from_dict({"x": range(ROWS)}).to_iterable_dataset(num_shards=shards)
    data = data.shuffle(seed=3, buffer_size=buffer)
    return data.map(lambda batch: {"y": [2 * x for x in batch["x"]]}, batched=True, batch_size=4) if maps else data


def through_a_file(state):
    file = io.BytesIO()
    torch.save(plain(state), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize(
    "data", [shuffled(), shuffled(3), shuffled(buffer=100), shuffled(buffer=1), shuffled(2, maps=True)]
)
def test_rows_after_any_place_are_those_of_the_whole(data, epoch):
    data.set_epoch(epoch)
    whole = [row["x"] for row in data]
    assert sorted(whole) == list(range(ROWS))
    for place in range(1, ROWS + 1):
        before, after = with_kept_buffers(data), with_kept_buffers(data)
        rows = iter(before)
        assert [next(rows)["x"] for _ in range(place)] == whole[:place]
        after.load_state_dict(through_a_file(before.state_dict()))
        assert [row["x"] for row in after] == whole[place:]
    data.set_epoch(0)


def test_the_original_keeps_its_epoch_and_state():
    data = shuffled()
    copied = with_kept_buffers(data)
    copied.set_epoch(5)
    copied.load_state_dict(plain(copied.state_dict()))
    assert (data.epoch, data._starting_state_dict) == (0, None)


def test_a_copy_of_a_state_shares_the_rows_of_its_buffer():
    data = with_kept_buffers(shuffled())
    rows = iter(data)
    next(rows)
    first, second = (data.state_dict()["examples_iterable"]["buffer"] for _ in range(2))
    assert isinstance(first, Held)
    assert first is second
