"""Batches of rows of similar length: what the order keeps, and how little of a batch is padding."""

import os
from math import ceil
from pathlib import Path

import datasets
import pytest
import torch

from distill import KD, DistillError, Rows, Schedule, fit, steps
from distill.data.texts.lengths import grouped, lengths_of, refuse_empty_rows
from distill.training.schedule import lengths_to_group, order
from tests.distill.tiny_models import QUIET, gpt2, mlp, same, spread, text, vectors, weights

SST2 = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[5] / "shared" / "data")) / "sst2" / "train.tsv.gz"


def drawn(kind: str, rows: int) -> torch.Tensor:
    """Lengths of rows: alike, spread evenly, or with a long tail, as those of texts."""
    draw = torch.Generator().manual_seed(7)
    if kind == "even":
        return torch.randint(1, 200, (rows,), generator=draw)
    return torch.randn(rows, generator=draw).mul(0.8).add(2.5).exp().long().clamp(3, 2000)


def padded(lengths: torch.Tensor, batches: list[torch.Tensor]) -> float:
    """Tokens with padding for each without."""
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches) / int(lengths.sum())


@pytest.mark.parametrize("rows", [1, 7, 63, 64, 65, 1000, 4001])
@pytest.mark.parametrize("size", [1, 4, 32])
def test_every_epoch_has_every_row_once_in_batches_of_one_size(rows, size):
    lengths, schedule = drawn("tail", rows), Schedule(batch_size=size, seed=3)
    per_epoch = ceil(rows / size)
    for epoch in range(2):
        batches = list(order(rows, schedule, range(epoch * per_epoch, (epoch + 1) * per_epoch), lengths=lengths))
        assert [len(batch) for batch in batches] == [size] * (rows // size) + [rows % size] * (rows % size > 0)
        assert torch.cat(batches).sort().values.equal(torch.arange(rows))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_order_is_decided_by_seed_and_epoch_alone(processes):
    """Also from any step on, and with any number of processes."""
    lengths, schedule = drawn("tail", 402), Schedule(batch_size=4, seed=3)
    whole = [batch.tolist() for batch in order(402, schedule, range(210), lengths=lengths)]
    shares = [list(order(402, schedule, range(90, 210), p, processes, lengths=lengths)) for p in range(processes)]
    for number, parts in enumerate(zip(*shares, strict=True), 90):
        assert sorted(torch.cat(parts).tolist()) == sorted(whole[number])
        assert parts[0].tolist() == whole[number][::processes]
    assert whole[:101] != whole[101:202]
    other = Schedule(batch_size=4, seed=4)
    assert [batch.tolist() for batch in order(402, other, range(210), lengths=lengths)] != whole


@pytest.mark.parametrize("kind", ["even", "tail"])
@pytest.mark.parametrize("size", [8, 32])
def test_little_of_a_batch_is_padding(kind, size):
    lengths, schedule = drawn(kind, 8000), Schedule(batch_size=size)
    numbers = range(8000 // size)
    most = 1.2 if (kind, size) == ("tail", 32) else 1.1
    assert padded(lengths, list(order(8000, schedule, numbers, lengths=lengths))) <= most
    assert padded(lengths, list(order(8000, schedule, numbers))) > 1.6


@pytest.mark.skipif(not SST2.exists(), reason="needs ../shared/data/sst2")
def test_little_of_a_batch_of_sst2_is_padding():
    """By words, as tokens need a tokenizer: lengths of tokens have the same spread."""
    from distill.data.files import labelled

    lengths = torch.tensor([len(each.split()) for each in labelled(SST2, "sentence", "label", quoting=3)[0]])
    numbers = range(len(lengths) // 32)
    assert padded(lengths, list(order(len(lengths), Schedule(batch_size=32), numbers, lengths=lengths))) <= 1.1
    assert padded(lengths, list(order(len(lengths), Schedule(batch_size=32), numbers))) > 2


def test_the_place_of_a_step_says_nothing_about_its_length_and_rows_meet_others():
    lengths, schedule = drawn("tail", 8000), Schedule(batch_size=8)
    batches = list(order(8000, schedule, range(2000), lengths=lengths))
    means = torch.tensor([float(lengths[batch].float().mean()) for batch in batches[:1000]])
    assert abs(float(torch.corrcoef(torch.stack([means, torch.arange(1000.0)]))[0, 1])) < 0.1
    before = {number: set(batch.tolist()) for batch in batches[:1000] for number in batch.tolist()}
    kept = sum(len(before[number] & set(batch.tolist())) - 1 for batch in batches[1000:] for number in batch.tolist())
    assert kept < 0.05 * 7 * 8000


def test_the_short_batch_has_rows_of_any_length():
    lengths, draws = torch.arange(1000), [torch.Generator().manual_seed(i) for i in range(40)]
    last = [grouped(torch.randperm(1000, generator=draw), lengths, 16, draw)[-8:] for draw in draws]
    means = torch.tensor([float(lengths[batch].float().mean()) for batch in last])
    assert means.min() < 250
    assert means.max() > 750


def test_lengths_are_those_of_ragged_columns():
    rows = Rows.of({"input_ids": [[1, 2, 3], [4]], "attention_mask": [[1, 1, 1], [1]], "labels": [0, 1]})
    assert lengths_of(rows).tolist() == [6, 2]
    assert lengths_of(vectors()) is None
    assert lengths_of(Rows({"x": [torch.ones(2), torch.ones(2)], "y": torch.ones(2)})) is None
    assert lengths_of(object()) is None


def test_a_schedule_decides():
    rows = text(40)
    assert lengths_to_group(rows, Schedule()).equal(lengths_of(rows))
    assert lengths_to_group(rows, Schedule(group_by_length=True)).equal(lengths_of(rows))
    assert lengths_to_group(rows, Schedule(group_by_length=False)) is None
    assert lengths_to_group(vectors(), Schedule()) is None
    with pytest.raises(DistillError, match=r"group_by_length=True needs rows of several lengths, and all 12 have one"):
        list(
            steps(
                spread(mlp()), spread(mlp()), data=vectors(12), objective=KD(), schedule=Schedule(group_by_length=True)
            )
        )


def widths(model: torch.nn.Module, schedule: Schedule) -> tuple[list[torch.Tensor], list[float]]:
    """The weights after a training, and the widths of its batches."""
    seen: list[int] = []
    student = spread(gpt2(1), 1)
    handle = student.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]),
                                               with_kwargs=True)  # fmt: skip
    list(steps(model, student, data=text(64, 3, 20), objective=KD(), schedule=schedule))
    handle.remove()
    return weights(student), seen


def test_a_training_reads_narrower_batches_unless_the_schedule_says_no():
    teacher = spread(gpt2(2))
    by_default, narrow = widths(teacher, Schedule(steps=16, batch_size=4))
    wanted, same_widths = widths(teacher, Schedule(steps=16, batch_size=4, group_by_length=True))
    without, wide = widths(teacher, Schedule(steps=16, batch_size=4, group_by_length=False))
    assert same(by_default, wanted)
    assert narrow == same_widths
    assert sum(narrow) < 0.85 * sum(wide)
    assert not same(by_default, without)


def test_a_resumed_run_has_the_bits_of_a_whole_one(tmp_path):
    teacher, settings = spread(gpt2(2)), {"objective": KD(), "console": QUIET, "every": 5}
    schedule = Schedule(steps=24, batch_size=4, seed=2)
    whole = spread(gpt2(1), 1)
    fit(teacher, whole, {}, text(64, 3, 20), schedule=schedule, **settings)
    stopped = spread(gpt2(1), 1)

    def stop(*_):
        stop.count += 1
        if stop.count > 16:
            raise KeyboardInterrupt

    stop.count = 0
    handle = stopped.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        fit(teacher, stopped, {}, text(64, 3, 20), schedule=schedule, output_dir=tmp_path / "run", **settings)
    handle.remove()
    again = spread(gpt2(1), 1)
    fit(teacher, again, {}, text(64, 3, 20), schedule=schedule, output_dir=tmp_path / "run", resume=True, **settings)
    assert same(weights(whole), weights(again))


@pytest.mark.parametrize("form", [dict, datasets.Dataset.from_dict])
def test_rows_without_tokens_are_named(form):
    data = form({"input_ids": [[1], [], [2, 3]], "attention_mask": [[1], [], [1, 1]]})
    rows = Rows.of(data)
    assert rows.table["input_ids"][1].dtype == torch.int64
    with pytest.raises(DistillError, match=r"1 of 3 rows have no token \(first: row 1\)"):
        refuse_empty_rows(rows)
    with pytest.raises(DistillError, match="1 of 3 rows have no token"):
        fit(gpt2(), gpt2(), {}, data, objective=KD(), console=QUIET)
    refuse_empty_rows(rows.take([0, 2]))
    refuse_empty_rows(Rows({"x": torch.zeros(2, 0)}))
