"""Counterfactuals share passes, and see nothing of each other."""

import pytest
import torch
from torch import nn

from interventions import InterventionError, Location, Mean, Noise, Zero, interchange, run
from interventions.analysis.sweeps import sweep
from tests.interventions.analysis.test_sweeps import BLOCKS, METRIC, counted, naive
from tests.interventions.tiny_models import LAYERS, batch, make

BLOCK_PATHS = {"bert": "bert.encoder.layer", "gpt2": "transformer.h", "llama": "model.layers", "t5": "decoder.block"}


@pytest.mark.parametrize("name", BLOCK_PATHS)
def test_each_run_is_made_once_and_cells_share_passes(name):
    model, inputs, others = make(name), batch(name), batch(name, seed=2)
    columns = 4 if name == "t5" else 5
    places = [Location(0), Location(1), Location(LAYERS - 2, "block_input")]
    for rows, cells in ((3, 1), (6, 2), (64, 21)):
        passes = 3 * -(-columns // cells)
        with counted(model, BLOCK_PATHS[name]) as calls:
            sweep(model, inputs, others, places, metric=METRIC, batch_size=rows)
        # The base, the source, and the base with its examples repeated for each size of a pass run in full.
        full = 2 + len({min(cells, columns), columns - min(cells, columns) * (passes // 3 - 1)} - {1})
        assert calls == {"model": full + passes, "first": full, "last": full + passes}
    base, source = run(model, inputs), run(model, others)
    with counted(model, BLOCK_PATHS[name]) as calls:
        sweep(model, base, source, BLOCKS, metric=METRIC, batch_size=64)
    assert calls["model"] == 1 + 3  # the base repeated, and the passes


class Odd(nn.Module):
    """A block whose second value shows in no shape how it goes with the examples."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.linear, self.value = nn.Linear(8, 8), value

    def forward(self, x: torch.Tensor) -> tuple:
        return x + self.linear(x).tanh(), self.value(x)


class Odds(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Odd(value) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x, other = block(x)
            x = x + (other.mean() * 0 if isinstance(other, torch.Tensor) else 0)
        return x.sum(1)


@pytest.mark.parametrize(
    "value",
    [
        lambda x: (x.new_zeros(1, 2), [x.new_zeros(3, 3)]),  # three rows, and none of them an example
        lambda x: x.transpose(0, 1),
        lambda x: x.new_zeros(len(x), len(x)),
        lambda x: iter(x),
    ],
    ids=["shared", "second axis", "two axes", "an object"],
)
def test_whatever_a_block_returns_passes_resume(value):
    torch.manual_seed(0)
    model = Odds(value).eval()
    base, source = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    at = [Location(0), Location(1), Location(1, "block_input")]
    with counted(model, "blocks") as calls:
        grid = sweep(model, base, source, at, metric=METRIC, batch_size=6)
    assert calls == {"model": 3 + 6, "first": 3, "last": 3 + 6}
    assert torch.allclose(grid.per_example, naive(model, run(model, base), source, at, range(4)), atol=1e-6)


class Contrast(Odds):
    """Compares every example with every other, as contrastive models do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return x @ x.T


def test_examples_that_see_each_other_share_no_pass():
    torch.manual_seed(0)
    model, base, source = Contrast(lambda x: None).eval(), torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    asked = dict(at=[Location(0)], metric=lambda logits: logits.diagonal())
    with pytest.raises(InterventionError, match=r"has another shape among more of them.*pass batch_size=3"):
        sweep(model, base, source, **asked, batch_size=6)
    each = sweep(model, base, source, **asked, batch_size=3).per_example
    assert each.isfinite().all()
    assert torch.equal(sweep(model, base, source, **asked).per_example, each)  # who names no size gets passes of one


def test_inputs_that_are_no_rows_are_not_repeated():
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    inputs["position_ids"] = others["position_ids"] = torch.arange(5)[None]
    with counted(model, "transformer.h") as calls:
        grid = sweep(model, inputs, others, BLOCKS, metric=METRIC)
    assert calls["model"] == 2 + 15
    assert torch.equal(grid.per_example, naive(model, run(model, inputs), run(model, others), BLOCKS, range(5)))


@pytest.mark.parametrize("size", [3, 4, 9, 100])
def test_the_batch_size_changes_nothing(size):
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    expected = naive(model, run(model, inputs), run(model, others), BLOCKS, range(5))
    found = sweep(model, inputs, others, BLOCKS, metric=METRIC, batch_size=size).per_example
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_loss_has_one_counterfactual_a_pass():
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    inputs["labels"] = inputs["input_ids"]
    grid = sweep(model, inputs, others, BLOCKS, metric=lambda output: output.loss)
    done = interchange(model, inputs, others, BLOCKS[1], positions=2)
    assert torch.allclose(grid.values[1, 2], done.output.loss)


def mixing(base, source, generator):
    return base + source.mean(0)  # what one counterfactual of a pass gets must not depend on the others


def test_operators_see_one_counterfactual_at_a_time():
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    base, source = run(model, inputs), run(model, others)
    operators = [
        (Zero(), None), (Mean(), source), (mixing, source), (Noise(1.0, normal=torch.randn(3, 16)), None),
        (Mean(torch.randn(16)), None),
    ]  # fmt: skip
    for op, its in operators:
        grid = sweep(model, base, its, BLOCKS, metric=METRIC, op=op)
        assert torch.allclose(grid.per_example, naive(model, base, its, BLOCKS, range(5), op=op), atol=1e-6), op
    bag = run(model, batch("gpt2", seed=2, size=7))
    grid = sweep(model, base, bag, BLOCKS, metric=METRIC, op=Mean())
    assert torch.allclose(grid.per_example, naive(model, base, bag, BLOCKS, range(5), op=Mean()), atol=1e-6)


def test_the_same_generator_draws_the_same_noise_as_the_loop():
    model = make("gpt2")
    base = run(model, batch("gpt2"))
    draw = [torch.Generator().manual_seed(3) for _ in range(2)]
    grid = sweep(model, base, None, BLOCKS, metric=METRIC, op=Noise(1.0), generator=draw[0])
    expected = naive(model, base, None, BLOCKS, range(5), op=Noise(1.0), generator=draw[1])
    assert torch.allclose(grid.per_example, expected, atol=1e-5)
    assert torch.equal(draw[0].get_state(), draw[1].get_state())
