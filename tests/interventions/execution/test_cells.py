"""What a column may be, and which examples have its tokens."""

import pytest
import torch

from interventions import InterventionError, run
from interventions.analysis.sweeps import sweep
from interventions.execution.cells import columns_of
from interventions.metrics import logit_difference
from tests.interventions.analysis.test_sweeps import BLOCKS, METRIC, naive, padded
from tests.interventions.tiny_models import LAYERS, batch, make


def test_what_a_column_may_be():
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    base, source = run(model, inputs), run(model, others)
    own = [[0], [1, 2], [3]]
    mask = torch.arange(5).expand(3, 5) > 1
    listed = [2, -1, slice(1, 3), [0, 4], own, mask, torch.tensor([[0], [1], [2]])]
    grid = sweep(model, inputs, others, BLOCKS, metric=METRIC, positions=listed)
    assert grid.positions == (
        2,
        -1,
        "slice(1, 3, None)",
        "[0, 4]",
        "[[0], [1, 2], [3]]",
        "tensor[3, 5]",
        "tensor[3, 1]",
    )
    expected = naive(model, base, source, BLOCKS, listed)
    assert torch.allclose(grid.per_example, expected, rtol=1e-5, atol=1e-6)
    named = sweep(model, inputs, others, BLOCKS, metric=METRIC, positions={"subject": own, "last": -1})
    assert named.positions == ("subject", "last")
    assert torch.allclose(named.per_example, expected[:, [4, 1]], atol=1e-6)
    for numbers in (range(1, 3), (1, 2), torch.tensor([1, 2])):
        grid = sweep(model, inputs, others, BLOCKS, metric=METRIC, positions=numbers)
        assert grid.positions == (1, 2)


def test_source_positions():
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2, length=7)
    base, source = run(model, inputs), run(model, others)
    taken = [6, 5, 0, 1, -1]
    grid = sweep(model, inputs, others, BLOCKS, metric=METRIC, source_positions=taken)
    for column, its in enumerate(taken):
        one = naive(model, base, source, BLOCKS, [column], source_positions=its)[:, 0]
        assert torch.allclose(grid.per_example[:, column], one, atol=1e-6)
    last = sweep(model, inputs, others, BLOCKS, metric=METRIC, source_positions=-1)
    assert torch.allclose(last.per_example[:, 4], grid.per_example[:, 4], atol=1e-6)
    assert torch.allclose(last.per_example[:, 0], naive(model, base, source, BLOCKS, [0], source_positions=-1)[:, 0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_padding_is_no_position(name, side):
    model, lengths = make(name), [2, 5, 4]
    inputs, others = (padded(batch(name, seed), lengths, side) for seed in (1, 2))
    metric = logit_difference([0, 1, 2], [2, 0, 1], mask=inputs["attention_mask"])
    grid = sweep(model, inputs, others, BLOCKS, metric=metric)
    assert grid.positions == tuple(range(5))
    has = torch.tensor([[p < length for length in lengths] for p in range(5)])
    assert torch.equal(~grid.per_example.isnan(), has.expand(LAYERS, 5, 3))
    for p in range(5):
        rows = has[p].nonzero()[:, 0]
        base, source = (run(model, {key: value[rows] for key, value in each.items()}) for each in (inputs, others))
        part = logit_difference(rows, (rows + 2) % 3, mask=base.inputs["attention_mask"])
        expected = naive(model, base, source, BLOCKS, [p], part)[:, 0]
        assert torch.allclose(grid.per_example[:, p, rows], expected, rtol=1e-4, atol=1e-5)
        assert torch.allclose(grid.values[:, p], expected.mean(-1), rtol=1e-4, atol=1e-5)
    last = sweep(model, inputs, others, BLOCKS, metric=metric, positions=-1)
    for row, length in enumerate(lengths):
        assert torch.allclose(last.per_example[:, 0, row], grid.per_example[:, length - 1, row], atol=1e-5)


def test_tokens_that_the_source_lacks_are_empty():
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    shorter = padded(others, [5, 3, 2], "right")
    grid = sweep(model, inputs, shorter, BLOCKS, metric=METRIC)
    assert grid.per_example.isnan()[0].tolist() == [[p >= n for n in (5, 3, 2)] for p in range(5)]
    assert "nan" not in repr(grid)


@pytest.mark.parametrize(
    "positions",
    [[], True, [0, None], ["a"], torch.ones(3, 5, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.long)],
    ids=repr,
)
def test_what_is_no_list_of_columns_raises(positions):
    with pytest.raises(InterventionError, match="is not understood; write 'each', None for all at once, or a list"):
        columns_of(positions, None, 5)
