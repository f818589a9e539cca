"""Attribution patching: gradients by hooks, sweeps of linear networks, finite differences, completeness."""

import pytest
import torch
from torch import nn

from interventions import (
    Add,
    Interpolate,
    InterventionError,
    Location,
    Mean,
    Rotation,
    Zero,
    attribution_patch,
    heads,
    kl,
    logit_difference,
    metrics,
    run,
    sweep,
)  # fmt: skip
from tests.interventions.analysis.test_sweeps import padded
from tests.interventions.tiny_models import LAYERS, TRANSFORMERS, answer, batch, make, middle, trace

METRIC = logit_difference(0, 1)
BLOCKS = [Location(i) for i in range(LAYERS)]
PAIR = [Location(1, "mlp_output"), Location(1, "attention_heads", heads=1), Location(1, dims=[0, 3])]


def both(name: str) -> tuple[nn.Module, object, object]:
    return make(name), batch(name), batch(name, seed=2)


def by_hooks(model: nn.Module, base: object, source: object, place: Location) -> torch.Tensor:
    """Gradient × difference at the output of a block, `[batch, token]`."""
    block = model.get_submodule(next(path for path, each in model.named_modules() if each is block_of(model, place)))
    kept: list[torch.Tensor] = []

    def keep(_module: nn.Module, _args: object, output: object) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)
        if kept[-1].requires_grad:
            kept[-1].retain_grad()

    handle = block.register_forward_hook(keep)
    try:
        METRIC(answer(model, base)).sum().backward()
        with torch.no_grad():
            answer(model, source)
    finally:
        handle.remove()
    model.zero_grad()
    return (kept[0].grad * (kept[1] - kept[0])).sum(-1).detach()


def block_of(model: nn.Module, place: Location) -> nn.Module:
    from interventions import architecture

    return architecture(model).place(place).block


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_it_is_gradient_times_difference(name):
    """That of hooks by hand, for all layers from one backward; and nothing stays on the model."""
    model, base, source = both(name)
    before = trace(model)
    grid = attribution_patch(model, base, source, BLOCKS, METRIC)
    assert trace(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    for row, place in enumerate(BLOCKS):
        expected = by_hooks(model, base, source, place)
        found = (grid.per_example - grid.baseline)[row].T
        assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max() + 1)), place
        assert expected.abs().max() > 1e-3
    measured = sweep(model, base, source, BLOCKS, metric=METRIC)
    assert (grid.positions, grid.locations) == (measured.positions, measured.locations)
    assert torch.equal(grid.baseline, measured.baseline)
    assert torch.allclose(grid.source, measured.source, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2", "cnn"])
@pytest.mark.parametrize("op", [None, Zero()], ids=["swap", "zero"])
def test_it_is_the_derivative_of_the_patch(name, op):
    """Central differences of a small share of each write, at heads, dims, a subspace, patterns and feature maps."""
    model, base, source = both(name)
    model = model.double()
    if name == "cnn":
        at = [Location(module="layer1.0", dims=range(3)), Location(module="layer2.0")]
        base, source = base.double(), source.double()
    else:
        at = [*PAIR, Location(1, subspace=Rotation(2, 16)), Location(1, "attention_pattern")]
    given = source if op is None else None
    grid = attribution_patch(model, base, given, at, METRIC, op=op)
    step = 1e-4

    def moved(share):
        towards = (lambda x, s, _: x + share * (s - x)) if op is None else (lambda x, _s, _: x - share * x)
        return sweep(model, base, given, at, metric=METRIC, op=towards).per_example

    slope = (moved(step) - moved(-step)) / (2 * step)
    assert torch.allclose(grid.per_example - grid.baseline, slope, atol=1e-4 * float(slope.abs().max()))
    assert slope.abs().max() > 1e-3


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)).double().eval()


def test_of_a_linear_network_it_is_the_sweep():
    """For every operator that is linear in the share, every form of row, and with points on the way."""
    model, base, source = linear(), torch.randn(5, 4).double(), torch.randn(5, 4).double()
    rows = {"one": "module:0", "dims": Location(module="1", dims=[1, 2]), "two": ["module:0", "module:1@input"]}
    rows.pop("two")
    for op in (None, Interpolate(0.3), Mean()):
        measured = sweep(model, base, source, rows, metric=METRIC, op=op, positions=None)
        for more in ({}, {"steps": 3, "along": Location(module="0", io="input")}):
            grid = attribution_patch(model, base, source, rows, METRIC, op=op, positions=None, **more)
            assert torch.allclose(grid.per_example, measured.per_example)
    for op in (Zero(), Add(torch.ones(2).double())):
        measured = sweep(model, base, None, rows["dims"], metric=METRIC, op=op, positions=None)
        grid = attribution_patch(model, base, None, rows["dims"], METRIC, op=op, positions=None)
        assert torch.allclose(grid.per_example, measured.per_example)


class Sums(nn.Module):
    """A linear network over tokens: its answer is a sum over positions, with other weights at each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16, bias=False) for _ in range(3)])
        self.embed, self.weights = nn.Embedding(30, 16), nn.Parameter(torch.randn(5, 3))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids) * attention_mask[..., None]
        for block in self.blocks:
            x = block(x)
        return torch.einsum("btd,tc->bc", x, self.weights)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_those_of_a_sweep(side):
    """Overlapping columns, source positions, rows that share a place, and examples of several lengths."""
    torch.manual_seed(0)
    model = Sums().double().eval()
    base, source = padded(batch("gpt2"), [5, 3, 2], side), padded(batch("gpt2", seed=2), [4, 5, 2], side)
    at = {"a": Location(module="blocks.0"), "b": (Location(module="blocks.1"),), "a again": "module:blocks.0"}
    for more in (
        {"positions": "each"},
        {"positions": [0, -1, slice(0, 2), [1]]},
        {"positions": {"last": -1, "also": -1}, "source_positions": [0, 1]},
        {"positions": [1, 0], "source_positions": -1},
        {"positions": None},
    ):
        measured = sweep(model, base, source, at, metric=METRIC, **more)
        grid = attribution_patch(model, base, source, at, METRIC, **more)
        assert grid.positions == measured.positions
        assert torch.allclose(grid.per_example, measured.per_example, equal_nan=True), more
    whole = sweep(model, base, source, at, metric=lambda output: METRIC(output).sum())
    one = attribution_patch(model, base, source, at, lambda output: METRIC(output).sum())
    assert torch.allclose(one.per_example, whole.per_example, equal_nan=True)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_integrated_gradients_are_complete(name):
    """Along the way, the attributions of all embeddings sum to the difference of source and base."""
    model, base, source = both(name)
    grid = attribution_patch(model, base, source, "embedding", METRIC, positions=None, steps=40)
    reach = float((grid.source - grid.baseline).abs().max())
    assert torch.allclose(grid.per_example[0, 0], grid.source, atol=0.02 * reach)
    once, at_base = (
        attribution_patch(model, base, source, BLOCKS[:1], METRIC, positions=None, steps=steps) for steps in (1, None)
    )
    assert not torch.allclose(once.values, at_base.values)


@pytest.mark.parametrize("name", ["cnn", "lstm", "lstm-time-first", "mlp"])
def test_models_without_blocks(name):
    model, base, source = both(name)
    positions = "each" if name != "mlp" else None
    grid = attribution_patch(model, base, source, middle(name), METRIC, positions=positions)
    assert grid.effects.abs().max() > 1e-4
    if name == "cnn":
        return  # its stages are blocks, the first of which has an input
    with pytest.raises(InterventionError, match=r"steps=… joins base and source at the embedding.*along=Location"):
        attribution_patch(model, base, source, middle(name), METRIC, positions=positions, steps=2)


def test_no_gradient_is_needed_around_it():
    model, base, source = both("gpt2")
    expected = attribution_patch(model, base, source, BLOCKS, METRIC).values
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(attribution_patch(model, base, source, BLOCKS, METRIC).values, expected)
    with torch.inference_mode():
        runs = run(model, base), run(model, source)
        assert torch.allclose(attribution_patch(model, *runs, BLOCKS, METRIC).values, expected, atol=1e-6)


def test_what_has_no_derivative_is_refused():
    model, base, source = both("gpt2")
    with pytest.raises(InterventionError, match=r"the metric accuracy has no derivative .* step function"):
        attribution_patch(model, base, source, BLOCKS, metrics.accuracy(0))
    with pytest.raises(InterventionError, match=r"steps=0 is no number of points; write steps=8"):
        attribution_patch(model, base, source, BLOCKS, METRIC, steps=0)
    with pytest.raises(InterventionError, match=r"no source was given; pass source="):
        attribution_patch(model, base, None, BLOCKS, METRIC, op=Zero(), steps=2)
    with pytest.raises(InterventionError, match=r"train mode"):
        attribution_patch(model.train(), base, source, BLOCKS, METRIC)
    flat = attribution_patch(model.eval(), base, source, BLOCKS, kl(run(model, base)))
    assert flat.effects.abs().max() < 1e-5  # at the base the divergence is at its minimum


def test_heads_of_a_model_from_one_backward():
    model, base, source = both("gpt2")
    found = heads(model)
    grid = attribution_patch(model, base, source, found, METRIC, positions=None)
    alone = attribution_patch(model, base, source, found["1.1"], METRIC, positions=None)
    assert torch.allclose(grid.values[list(found).index("1.1")], alone.values[0], atol=1e-6)
    assert grid.by_head().values.shape == (LAYERS, 2)
