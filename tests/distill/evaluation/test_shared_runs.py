"""Runs that pairs share: the sums are those of runs of their own, and each row runs once."""

import pytest
import torch
from torch import nn

from distill import InContext, Kind, Rows, Scattered, Shuffle, Span, interchange_accuracy
from distill.evaluation import shared_runs
from distill.evaluation.interchange_accuracy import measurement_of
from distill.evaluation.measurement import Interchanges, measuring
from distill.evaluation.shared_runs import fitting, free_memory, planned
from distill.statistics.tally import joined
from interventions import Location
from tests.distill.every_site import FAMILIES
from tests.distill.tiny_models import bert, gpt2, gpt2_lm, images, masked_lm, mlp, spread, text, vectors, vit

MAPPING = {(Location(0), Location(1)): Location(0), Location(2): Location(1), Location(3): Location(2)}
COUNTS = (
    "total", "agree", "effect", "agree_on_effect", "do_nothing", "replace_all", "agree_on_base",
)  # fmt: skip


def even(rows):
    """The same rows, padded to one length."""
    return Rows(rows.batch(range(len(rows))), clusters=rows.clusters)


def couple(make, **settings):
    return spread(make(4, **settings), 3, 0.8), spread(make(3, **settings), 13, 0.8)


def both(models, rows, kind, *, mapping=MAPPING, pairs=40, size=7, labels=False):
    """The sums of a kind of interchange, with shared runs and with runs of their own for each batch."""
    measurement = measurement_of(*models, mapping, rows, pairs=pairs, seed=0, batch_size=size)
    placed = measurement.place("kind", kind)
    examples, interchanges = measurement.examples(kind), measurement._interchanges([placed])
    sources = torch.randperm(len(examples), generator=torch.Generator().manual_seed(1)) if labels else None
    found = []
    with measuring(interchanges):
        for make in (type(interchanges).tallies, Interchanges.tallies):
            parts = list(make(interchanges, examples, size, sources))
            order = torch.cat([places for places, _ in parts])
            assert sorted(order.tolist()) == list(range(pairs))
            found.append(joined([tally for _, tally in parts]).at(order.argsort()))
    return found


def check(shared, alone):
    assert shared.sums.keys() == alone.sums.keys()
    for name, expected in alone.sums.items():
        if name in COUNTS:
            assert torch.equal(shared[name], expected), name
        else:
            torch.testing.assert_close(shared[name], expected, rtol=1e-3, atol=1e-4, msg=name)
    assert bool(shared.kept.any())


@pytest.mark.parametrize("bases", [[0], [3, 5, 3, 5, 7, 3], [*range(9)] * 3, torch.randint(0, 11, (97,)).tolist()])
@pytest.mark.parametrize("size", [1, 2, 4, 200])
def test_every_pair_is_in_one_batch_with_the_bases_of_its_chunk(bases, size):
    plan = planned(torch.tensor(bases), size)
    assert sorted(place for batch in plan.batches for place in batch.places.tolist()) == list(range(len(bases)))
    distinct = [{bases[place] for place in chunk.tolist()} for chunk in plan.chunks]
    assert sorted(base for chunk in distinct for base in chunk) == sorted(set(bases))
    known = [batch.chunk for batch in plan.batches if batch.chunk is not None]
    assert known == sorted(known)
    assert {*known} == {*range(len(plan.chunks))}
    for batch in plan.batches:
        assert 0 < len(batch.places) <= size
        if batch.chunk is not None:
            own = [bases[place] for place in plan.chunks[batch.chunk].tolist()]
            assert [bases[place] for place in batch.places.tolist()] == own


def test_pairs_of_rows_in_turn_need_no_run_of_their_own():
    plan = planned(torch.cat([torch.randperm(12) for _ in range(5)]), 4)
    assert [batch.chunk for batch in plan.batches] == [0] * 5 + [1] * 5 + [2] * 5


@pytest.mark.parametrize(("rows", "pairs", "size"), [(1, 2000, 512), (6, 2000, 512), (6, 60, 512), (200, 2000, 512)])
def test_few_rows_fill_batches_and_their_run_is_small(rows, pairs, size):
    """A base that is in a run several times costs at most 64 rows, or an eighth of the pairs."""
    plan = planned(torch.arange(pairs) % rows, size)
    made = sum(map(len, plan.chunks)) + sum(len(batch.places) for batch in plan.batches if batch.chunk is None)
    assert len(plan.batches) <= 2 * pairs / min(size, pairs, max(64, rows, pairs // 8)) + 2
    assert made <= max(rows, 2 * max(64, pairs / 8))


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        Kind(), Kind(Scattered(2)), Kind(None, dims=0.5), Kind(site="attention_heads"), Kind(site="mlp_output"),
        Kind(dims=0.5), Kind(sources=InContext(0.4)), Kind(site="attention_pattern"),
    ],
    ids=str,
)  # fmt: skip
def test_sums_are_those_of_runs_of_their_own(kind, labels):
    rows = even(text(14, 6, 6) if kind.positions is None else text(14))
    check(*both(couple(bert), rows, kind, labels=labels))


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (bert, text(14)), (gpt2, even(text(14))), (vit, images(14)), (gpt2_lm, even(text(14, labels=False))),
        (gpt2_lm, text(14, labels=False)), (masked_lm, even(text(14, labels=False))),
    ],
)  # fmt: skip
def test_sums_of_every_kind_of_answer(make, rows):
    check(*both(couple(make), rows, Kind(Span(0.4))))


def test_sums_of_real_values_and_of_models_without_blocks():
    numbers = Rows({**even(text(12, labels=False)).table, "labels": torch.linspace(0, 1, 12)})
    check(*both(couple(bert, labels=1), numbers, Kind()))
    mapping = {Location(module="1", dims=range(4)): Location(module="1", dims=range(4))}
    check(*both((spread(mlp()), spread(mlp(), 1)), vectors(12), Kind(), mapping=mapping))


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_of_every_family(family):
    make, rows, stack = FAMILIES[family].make, FAMILIES[family].data(14), FAMILIES[family].stack
    models = spread(make(4), 3, 0.8), spread(make(3), 13, 0.8)
    check(*both(models, rows, Kind(), mapping={Location(1, stack=stack): Location(1, stack=stack)}))


def rows_run(part, function):
    """How many rows a part of a block runs on while a function runs."""
    rows = []
    hook = part.register_forward_hook(lambda module, given, output: rows.append(len(output[0])))
    try:
        function()
    finally:
        hook.remove()
    return sum(rows)


@pytest.mark.parametrize("sources", [Shuffle(), InContext(0.4)])
def test_every_row_runs_once(sources):
    """The first block runs on the few rows that show what answers depend on, and once on every row."""
    models, rows = couple(bert), even(text(30))
    mapping = {Location(1): Location(1)}

    def measure(pairs):
        interchange_accuracy(*models, mapping, rows, pairs=pairs, sources=sources, batch_size=8)

    for model in models:
        part = model.bert.encoder.layer[0].attention
        more = rows_run(part, lambda: measure(120)) - rows_run(part, lambda: measure(60))
        assert more == (0 if isinstance(sources, Shuffle) else 60)  # sources that were made for a pair run for it alone


def test_without_memory_the_sums_are_the_same(monkeypatch):
    models, rows = couple(bert), even(text(14))
    kept, _ = both(models, rows, Kind())
    monkeypatch.setattr(shared_runs, "free_memory", lambda device: 0)
    check(kept, both(models, rows, Kind())[0])


def test_bases_run_again_where_memory_holds_the_sources_alone(monkeypatch):
    models, rows = couple(bert), even(text(14))
    kept, _ = both(models, rows, Kind())
    monkeypatch.setattr(shared_runs, "size_whole", lambda run: 2**50)
    check(kept, both(models, rows, Kind())[0])


def test_the_size_of_a_forward_is_that_which_memory_holds(monkeypatch):
    model, batch = spread(bert(3)), even(text(8)).batch(range(8))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    sizes = []
    for free in (0, 2**22, 2**24, 2**26, 2**40):
        monkeypatch.setattr(shared_runs, "free_memory", lambda device, free=free: free)
        sizes.append(fitting([model], [inputs], torch.device("cpu")))
    assert sizes[0] == 1
    assert sizes == sorted(sizes)
    assert all(size & (size - 1) == 0 for size in sizes)  # so that a little less memory rarely changes it
    assert sizes[1] < sizes[-1] == 512


def test_memory_is_free():
    assert free_memory(torch.device("cpu")) > 2**20
    assert free_memory(torch.device("meta")) == 2**31


def test_examples_along_another_axis_are_not_kept():
    """Activations with time first have no row for each example on their first axis, so every batch has its own runs."""

    class TimeFirst(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.lstm, self.head = nn.LSTM(6, 6), nn.Linear(6, 4)

        def forward(self, inputs):
            return self.head(self.lstm(inputs[:, :, None].expand(-1, -1, 6).transpose(0, 1))[0][-1])

    at = Location(module="lstm", dims=range(3))
    check(*both((TimeFirst(0).eval(), TimeFirst(1).eval()), vectors(12), Kind(), mapping={at: at}))
