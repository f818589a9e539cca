"""Batches: every counterfactual once, none too large, and together as cheap as any way to cut them."""

import platform
import resource
from itertools import chain, pairwise
from typing import ClassVar

import pytest
import torch

from interventions import Add, Interpolate, InterventionError, Location, Mean, Mixup, Noise, Swap, Zero, run
from interventions.analysis import batches as module
from interventions.analysis.batches import (
    Batches,
    bytes_of_a_counterfactual,
    cells_a_pass,
    cost_of,
    draw_nothing,
    keep_freed_memory,
)
from interventions.execution.cells import Cell
from tests.interventions.tiny_models import LAYERS, batch, make


def rule(most=6, each=10.0, order=True, joins=lambda row: True, shares=lambda row: True):
    """Eight blocks; a pass costs 5, a call 1, and a counterfactual in it `each`."""
    return Batches(
        most,
        lambda row: min(at.layer for at in row),
        joins,
        shares,
        order,
        lambda skipped, count: 5 + (8 - skipped) * (1 + count * each),
    )


def price(given, batches):
    return sum(given.cost(min(given.first(each.locations) for each in batch), len(batch)) for batch in batches)


ROWS = [(Location(layer),) for layer in (3, 0, 7, 1, 2, 2)]
CELLS = [[Cell(number) for number in range(count)] for count in (1, 2, 1, 3, 1, 2)]


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("each", [0.01, 0.3, 10.0])
@pytest.mark.parametrize("most", [1, 2, 3, 6, 100])
def test_every_counterfactual_is_in_one_batch(most, each, order):
    given = rule(most, each, order)
    found = given.of(ROWS, CELLS)
    assert max(map(len, found)) <= most
    assert min(map(len, found)) > 0
    numbers = [(one.row, one.cell.column) for one in chain(*found)]
    expected = [(row, cell.column) for row, cells in enumerate(CELLS) for cell in cells]
    assert sorted(numbers) == expected
    assert order or numbers == expected
    for one in chain(*found):
        assert one.locations == ROWS[one.row]


@pytest.mark.parametrize("each", [0.001, 0.05, 0.3, 1.0, 10.0])
def test_no_other_way_to_cut_them_is_cheaper(each):
    """Against all ways to cut a list of rows, sorted by where they resume."""
    given = rule(most=5, each=each)
    rows = [(Location(layer),) for layer in (0, 1, 1, 3, 4, 6, 7)]
    found = given.of(rows, [[Cell(0)]] * len(rows))
    alike = {first: [row for row in rows if given.first(row) == first] for first in (0, 1, 3, 4, 6, 7)}
    ways = []
    for cut in range(2 ** (len(alike) - 1)):
        bounds = [0, *(i + 1 for i in range(len(alike) - 1) if cut >> i & 1), len(alike)]
        groups = [list(chain(*list(alike.values())[start:stop])) for start, stop in pairwise(bounds)]
        if max(map(len, groups)) <= 5:
            ways.append(sum(given.cost(min(map(given.first, group)), len(group)) for group in groups))
    assert price(given, found) == pytest.approx(min(ways))


def test_rows_that_may_not_share_do_not():
    heads = [(Location(2, "attention_heads", heads=head),) for head in range(3)]
    one = [[Cell(0), Cell(1)]] * 3
    assert [len(each) for each in rule(each=0.0).of(heads, one)] == [6]
    assert [len(each) for each in rule(each=0.0, joins=lambda row: row != heads[1]).of(heads, one)] == [2, 2, 2]
    assert [len(each) for each in rule(each=0.0, shares=lambda row: row != heads[1]).of(heads, one)] == [2, 1, 1, 2]
    assert [len(each) for each in rule(each=0.0, order=False).of(heads, one)] == [6]  # parts of one place
    assert [len(each) for each in rule(each=0.0, order=False).of(ROWS[:3], one)] == [2, 2, 2]


def test_what_draws_is_known():
    vector = torch.ones(2)
    assert draw_nothing(
        {Location(i): op for i, op in enumerate([Swap(), Zero(), Mean(), Add(vector), Interpolate(0.5)])}
    )
    for op in (Noise(1.0), Mixup(1.0), lambda base, source, generator: base):
        assert not draw_nothing({Location(0): Swap(), Location(1): op})

    class Loud(Swap):
        loud: ClassVar[bool] = True

    assert not draw_nothing({Location(0): Loud()})


def test_costs_grow_with_blocks_and_counterfactuals():
    cost = cost_of(run(make("gpt2"), batch("gpt2")))
    assert cost(0, 1) > cost(1, 1) > cost(LAYERS, 1) > 0
    assert cost(0, 2) > cost(0, 1)
    assert 2 * cost(0, 1) > cost(0, 2)  # one pass saves


def test_memory_decides_how_many_share_a_pass(monkeypatch):
    model = make("gpt2")
    few, many = run(model, batch("gpt2", size=1)), run(model, batch("gpt2", size=4))
    one = bytes_of_a_counterfactual(few)
    assert bytes_of_a_counterfactual(many) == pytest.approx(4 * one)
    assert bytes_of_a_counterfactual(few, kept=0.2) < one
    blocks = sum(call.raw.numel() for call in few.recording.calls) * 4
    assert one > few.logits.numel() * 4 + blocks
    monkeypatch.setattr(module, "BYTES_ON_CPU", int(8.5 * one))
    assert (cells_a_pass(few, None), cells_a_pass(many, None)) == (8, 2)
    assert cells_a_pass(few, None, kept=0.2) > 8
    monkeypatch.setattr(module, "BYTES_ON_CPU", 1)
    assert cells_a_pass(few, None) == 1
    assert cells_a_pass(many, 9) == 2  # a number of the caller's is taken
    with pytest.raises(InterventionError, match=r"batch_size=3 rows do not hold one counterfactual of 4 examples"):
        cells_a_pass(many, 3)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries decide otherwise what they keep")
def test_memory_that_a_pass_frees_is_there_for_the_next():
    """Pages that the system hands out anew are counted: each would be one where freed tensors went back to it.

    What lies free at the end of the heap may go back once, so one time in three is enough.
    """
    keep_freed_memory(run(make("gpt2"), batch("gpt2")))
    size = 2**22

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        held = [torch.zeros(size, dtype=torch.uint8) for _ in range(10)]
        del held
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()  # the first time they come from the system
    pages = 10 * size // resource.getpagesize()
    assert min(faults() for _ in range(3)) < pages / 4
