"""A sweep is a loop of interchanges, in fewer passes: same numbers, counted forwards, nothing silent."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from interventions import InterventionError, Location, Mean, Noise, Swap, Zero, interchange, intervene, run, run_to
from interventions.metrics import kl, logit_difference, normalised, probability
from interventions.sweeps import sweep
from tests.interventions.models import LAYERS, batch, make

METRIC = logit_difference([0, 1, 2], [2, 0, 1])
BLOCKS = [Location(i) for i in range(LAYERS)]
PLACES = {
    "bert": ["embedding", *BLOCKS],
    "gpt2": [Location(0, "block_input"), *BLOCKS, Location(module="transformer.h.1.mlp")],
    "llama": BLOCKS,
    "t5": [*BLOCKS, *(Location(i, stack="encoder") for i in range(LAYERS))],
    "vit": [*BLOCKS, Location(module="vit.layers.1.mlp", io="input")],
    "cnn": [Location(module="conv1"), Location(module="layer1.0", dims=range(3)), Location(module="layer2.1")],
}
BLOCK_PATHS = {"bert": "bert.encoder.layer", "gpt2": "transformer.h", "llama": "model.layers", "t5": "decoder.block"}


@torch.no_grad()
def naive(model, base, source, at, positions, metric=METRIC, **options):
    """One interchange for each cell."""
    return torch.stack(
        [
            torch.stack(
                [metric(interchange(model, base, source, place, positions=p, **options).output) for p in positions]
            )
            for place in at
        ]
    )


def inner(block: nn.Module) -> nn.Module:
    """A part that runs when the block computes, and does not where it returns what was recorded."""
    return next(part for part in block.modules() if not list(part.children()) and list(part.parameters()))


@contextmanager
def counted(model: nn.Module, path: str):
    """How often the first and the last block of a list computed, and how often the model was called."""
    calls, blocks = Counter(), model.get_submodule(path)
    parts = {"first": inner(blocks[0]), "last": inner(blocks[-1]), "model": model}
    handles = [
        part.register_forward_hook(lambda module, args, output, name=name: calls.update([name]))
        for name, part in parts.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def padded(inputs: dict, lengths: list[int], side: str) -> dict:
    width = inputs["input_ids"].shape[1]
    columns = torch.arange(width)
    real = torch.stack([columns < n if side == "right" else columns >= width - n for n in lengths])
    return {"input_ids": inputs["input_ids"] * real, "attention_mask": real.long()}


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [lambda model, inputs: inputs, torch.no_grad()(run)], ids=["inputs", "runs"])
@pytest.mark.parametrize("name", PLACES)
def test_a_sweep_is_a_loop_of_interchanges(name, given):
    model, inputs, others, places = make(name), batch(name), batch(name, seed=2), PLACES[name]
    with torch.no_grad():  # another kernel computes what autograd is to follow
        base, source = run(model, inputs), run(model, others)
    for place in places:
        positions = range(base.vectors(place).shape[1])
        expected = naive(model, base, source, [place], positions)
        alone = sweep(model, given(model, inputs), given(model, others), place, metric=METRIC, batch_size=3)
        assert torch.equal(alone.per_example, expected), place
        assert alone.positions == tuple(positions)
        together = sweep(model, given(model, inputs), given(model, others), place, metric=METRIC)
        assert torch.allclose(together.per_example, expected, rtol=1e-5, atol=1e-6), place
        assert expected.std() > 1e-3
    assert torch.equal(alone.baseline, METRIC(base))
    assert torch.equal(alone.source, METRIC(source))


@pytest.mark.parametrize("name", PLACES)
def test_rows_of_the_grid_do_not_see_each_other(name):
    model, inputs, others, places = make(name), batch(name), batch(name, seed=2), PLACES[name]
    whole = sweep(model, inputs, others, places, metric=METRIC, positions=[0, -1])
    for row, place in enumerate(places):
        assert torch.allclose(
            sweep(model, inputs, others, [place], metric=METRIC, positions=[0, -1]).values[0],
            whole.values[row],
            atol=1e-6,
        )
    assert list(whole.locations) == [str(place) for place in places]


@pytest.mark.parametrize("size", [3, 4, 6, 7, 9, 100, None])
def test_the_batch_size_changes_nothing(size):
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    expected = naive(model, run(model, inputs), run(model, others), BLOCKS, range(5))
    found = sweep(model, inputs, others, BLOCKS, metric=METRIC, batch_size=size).per_example
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
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


def test_all_positions_at_once_and_models_without_positions():
    model, inputs, others = make("mlp"), batch("mlp"), batch("mlp", seed=2)
    grid = sweep(model, inputs, others, ["module:0", "module:2"], metric=METRIC, positions=None)
    assert grid.positions == ("all",)
    assert torch.equal(grid.per_example[:, 0], METRIC(model(others)).expand(2, 3))
    with pytest.raises(InterventionError, match=r"module:0 has no positions: its shape is \[3, 8\].*positions=None"):
        sweep(model, inputs, others, ["module:0"], metric=METRIC)


def test_what_a_column_may_be():
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    base, source = run(model, inputs), run(model, others)
    own = [[0], [1, 2], [3]]
    mask = torch.arange(5).expand(3, 5) > 1
    listed = [2, -1, slice(1, 3), [0, 4], own, mask, torch.tensor([[0], [1], [2]])]
    grid = sweep(model, inputs, others, BLOCKS, metric=METRIC, positions=listed)
    assert grid.positions == (2, -1, "1:3", "[0, 4]", "[[0], [1, 2], [3]]", "tensor[3, 5]", "tensor[3, 1]")
    expected = naive(model, base, source, BLOCKS, listed)
    assert torch.allclose(grid.per_example, expected, rtol=1e-5, atol=1e-6)
    named = sweep(model, inputs, others, BLOCKS, metric=METRIC, positions={"subject": own, "last": -1})
    assert named.positions == ("subject", "last")
    assert torch.allclose(named.per_example, expected[:, [4, 1]], atol=1e-6)
    for numbers in (range(1, 3), (1, 2), torch.tensor([1, 2])):
        grid = sweep(model, inputs, others, BLOCKS, metric=METRIC, positions=numbers)
        assert grid.positions == (1, 2)


@pytest.mark.parametrize("positions", ["each", {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}])
def test_source_positions(positions):
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2, length=7)
    base, source = run(model, inputs), run(model, others)
    taken = [6, 5, 0, 1, -1]
    asked = taken if positions == "each" else dict(zip("abcde", taken, strict=True))
    grid = sweep(model, inputs, others, BLOCKS, metric=METRIC, positions=positions, source_positions=asked)
    for column, its in enumerate(taken):
        one = naive(model, base, source, BLOCKS, [column], source_positions=its)[:, 0]
        assert torch.allclose(grid.per_example[:, column], one, atol=1e-6)
    last = sweep(model, inputs, others, BLOCKS, metric=METRIC, positions=positions, source_positions=-1)
    assert torch.allclose(last.per_example[:, 4], grid.per_example[:, 4], atol=1e-6)
    assert torch.allclose(last.per_example[:, 0], naive(model, base, source, BLOCKS, [0], source_positions=-1)[:, 0])


def test_tokens_that_the_source_lacks_are_empty():
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    shorter = padded(others, [5, 3, 2], "right")
    grid = sweep(model, inputs, shorter, BLOCKS, metric=METRIC)
    assert grid.per_example.isnan()[0].tolist() == [[p >= n for n in (5, 3, 2)] for p in range(5)]
    assert "nan" not in repr(grid)


def test_locations_are_written_together_and_labelled():
    model, inputs, others = make("t5"), batch("t5"), batch("t5", seed=2)
    both = (Location(1), Location(1, stack="encoder"))
    rows = {"both": both, "one": "encoder/block_output.1"}
    grid = sweep(model, inputs, others, rows, metric=METRIC, positions=[0, 3, 4])
    expected = naive(model, run(model, inputs), run(model, others), [both], [0, 3])[0]
    assert torch.allclose(grid.per_example[0, :2], expected, atol=1e-6)
    assert grid.per_example[0, 2].isnan().all()  # the decoder has four tokens, the encoder five
    assert grid.locations == {"both": both, "one": both[1:]}
    assert list(sweep(model, inputs, others, [both], metric=METRIC).locations) == [
        "block_output.1 + encoder/block_output.1"
    ]


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


def test_a_metric_may_give_one_number_for_all_examples():
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    grid = sweep(model, inputs, others, BLOCKS, metric=lambda output: METRIC(output).mean())
    each = sweep(model, inputs, others, BLOCKS, metric=METRIC)
    assert grid.per_example.shape == (3, 5, 1)
    assert torch.allclose(grid.values, each.values, atol=1e-6)
    shorter = padded(inputs, [5, 3, 2], "left")
    grid = sweep(model, shorter, others, BLOCKS, metric=lambda output: output.logits[:, -1, 0].mean())
    assert grid.values.isnan()[0].tolist() == [False, False, True, True, True]


def test_a_loss_needs_one_counterfactual_a_pass():
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    inputs["labels"] = inputs["input_ids"]
    with pytest.raises(InterventionError, match=r"returned NoneType for the counterfactual .* pass batch_size=3"):
        sweep(model, inputs, others, BLOCKS, metric=lambda output: output.loss)
    grid = sweep(model, inputs, others, BLOCKS, metric=lambda output: output.loss, batch_size=3)
    done = interchange(model, inputs, others, BLOCKS[1], positions=2)
    assert grid.values[1, 2] == done.output.loss


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_every_site_can_be_swept(name):
    model, inputs, others = make(name), batch(name), batch(name, seed=2)
    sites = [
        "query",
        "value",
        "attention_heads",
        "attention_pattern",
        "attention_output",
        "mlp_activation",
        "mlp_output",
    ]
    places = [Location(1, site) for site in sites] + [Location(1, "attention_heads", heads=head) for head in range(2)]
    with torch.no_grad():
        base, source = run(model, inputs, places), run(model, others, places)
    grid = sweep(model, base, source, places, metric=METRIC, positions=[0, -1])
    expected = naive(model, base, source, places, [0, -1])
    assert torch.allclose(grid.per_example, expected, rtol=1e-5, atol=1e-6)
    assert (grid.effects[:, -1].abs() > 1e-4).all()


# --- in few passes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCK_PATHS)
def test_each_run_is_made_once_and_cells_share_passes(name):
    model, inputs, others = make(name), batch(name), batch(name, seed=2)
    columns = 4 if name == "t5" else 5
    places = [Location(0), Location(1), Location(LAYERS - 2, "block_input")]
    for rows, cells in ((3, 1), (6, 2), (9, 3), (64, 21)):
        passes = 3 * -(-columns // cells)
        with counted(model, BLOCK_PATHS[name]) as calls:
            sweep(model, inputs, others, places, metric=METRIC, batch_size=rows)
        assert calls["model"] == 2 + passes
        assert calls["last"] == 2 + passes
        # The base and the source run it; the first pass of several cells shows how what the blocks returned grows.
        assert calls["first"] == 2 + (cells > 1)
    base, source = run(model, inputs), run(model, others)
    with counted(model, BLOCK_PATHS[name]) as calls:
        sweep(model, base, source, BLOCKS, metric=METRIC, batch_size=64)
    assert calls["model"] == 3  # nothing but the passes


def test_runs_that_lack_an_activation_are_made_once_more():
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    inner = [Location(module=f"transformer.h.{i}.mlp") for i in range(LAYERS)]
    source = run(model, others)
    with counted(model, "transformer.h") as calls:
        grid = sweep(model, run(model, inputs), source, inner, metric=METRIC)
    assert calls["model"] == 1 + 1 + 3
    stopped = sweep(model, inputs, run_to(model, others, inner), inner, metric=METRIC)
    assert torch.equal(stopped.per_example, grid.per_example)
    assert stopped.source is None


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
    ("value", "resumed"),
    [
        (lambda x: None, True),
        (lambda x: (x.new_zeros(1, 2), [x.new_zeros(3, 3)]), True),  # three rows, and none of them an example
        (lambda x: x.transpose(0, 1), True),
        (lambda x: x.new_zeros(len(x) ** 2), False),
        (lambda x: x.new_zeros(len(x), len(x)), False),
        (lambda x: iter(x), False),
    ],
    ids=["nothing", "shared", "second axis", "squared", "two axes", "an object"],
)
def test_what_cannot_be_repeated_runs_again(value, resumed):
    torch.manual_seed(0)
    model = Odds(value).eval()
    base, source = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    at = [Location(0), Location(1), Location(1, "block_input")]
    with counted(model, "blocks") as calls:
        grid = sweep(model, base, source, at, metric=METRIC, batch_size=6)
    assert calls["model"] == 2 + 6
    assert calls["first"] == 2 + (1 if resumed else 6)
    assert torch.allclose(grid.per_example, naive(model, run(model, base), source, at, range(4)), atol=1e-6)


def test_inputs_that_are_no_rows_are_not_repeated():
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    inputs["position_ids"] = others["position_ids"] = torch.arange(5)[None]
    with counted(model, "transformer.h") as calls:
        grid = sweep(model, inputs, others, BLOCKS, metric=METRIC)
    assert calls["model"] == 2 + 15
    assert torch.equal(grid.per_example, naive(model, run(model, inputs), run(model, others), BLOCKS, range(5)))


def test_it_runs_inside_other_blocks_and_leaves_no_graph():
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    outside = sweep(model, inputs, others, BLOCKS, metric=METRIC)
    with intervene(model, layer=1, dims=range(8), op=Zero()):
        grid = sweep(model, inputs, others, BLOCKS, metric=METRIC)
        expected = naive(model, run(model, inputs), run(model, others), BLOCKS, range(5))
    assert torch.allclose(grid.per_example, expected, atol=1e-6)
    assert not torch.allclose(grid.per_example, outside.per_example, atol=1e-2)
    assert not grid.per_example.requires_grad


# --- what it shows ----------------------------------------------------------------------------------------------------


def grid_of(name="gpt2", **options):
    model, inputs, others = make(name), batch(name), batch(name, seed=2)
    return sweep(model, inputs, others, BLOCKS, **{"metric": METRIC, **options})


def test_the_last_block_at_the_last_position_is_everything():
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    base, source = run(model, inputs), run(model, others)
    scaled = normalised(METRIC, clean=source, corrupted=base)
    grid = sweep(model, base, source, BLOCKS, metric=scaled)
    assert torch.allclose(grid.values[-1], torch.tensor([0.0, 0, 0, 0, 1]), atol=1e-4)
    assert grid.largest(1)[0][1] == 4
    away = sweep(model, base, source, BLOCKS, metric=kl(base))
    assert away.values[-1, :-1].abs().max() < 1e-5
    assert away.baseline.abs().max() < 1e-5


def test_largest_orders_by_the_change():
    grid = grid_of()
    cells = grid.largest(100)
    assert len(cells) == 15
    changes = [abs(value - float(grid.baseline.mean())) for _, _, value in cells]
    assert changes == pytest.approx(sorted(changes, reverse=True), abs=1e-6)
    assert cells[0][2] == float(grid.values[list(grid.locations).index(cells[0][0]), grid.positions.index(cells[0][1])])


def test_it_prints_as_a_table():
    lines = repr(grid_of()).splitlines()
    assert lines[0].startswith("logit difference: 3 locations × 5 positions, mean of 3 examples; of the base run ")
    assert lines[1].split() == ["0", "1", "2", "3", "4"]
    assert [line.split()[0] for line in lines[2:]] == ["block_output.0", "block_output.1", "block_output.2"]
    assert len({len(line) for line in lines[1:]}) == 1
    many = sweep(make("cnn"), batch("cnn"), batch("cnn", seed=2), "module:layer1", metric=METRIC)
    assert "…" in repr(many)
    assert len(repr(many).splitlines()) == 3


def test_it_is_a_table_of_pandas():
    grid = grid_of()
    table = grid.to_pandas()
    assert table.index.name == "location"
    assert table.columns.name == "position"
    assert table.loc["block_output.1", 3] == float(grid.values[1, 3])


def test_pandas_is_asked_for(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(InterventionError, match=r"pip install pandas"):
        grid_of().to_pandas()


def test_it_draws_itself():
    grid = grid_of(positions=[0, -1])
    axes = grid.plot(tokens=["The", "end"]).axes
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["0 The", "-1 end"]
    assert axes[1].get_ylabel() == "logit difference"
    norm = axes[0].images[0].norm
    assert norm.vmin == -norm.vmax  # a signed metric
    assert grid_of(metric=probability(0)).plot().axes[0].images[0].norm.vmin >= 0
    assert "base64," in grid._repr_html_()
    with pytest.raises(InterventionError, match=r"1 tokens were given for 2 columns"):
        grid.plot(tokens=["The"])


# --- nothing silent ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(at=[]), r"no location was given; write at="),
        (dict(at=[()]), r"a row of at= holds no location"),
        (dict(at=[Location(0), "block_output.0"]), r"two rows are called block_output\.0"),
        (dict(at={Location(0): Zero()}), r"the keys of a sweep are labels"),
        (dict(at=[Location(9)]), r"out of range"),
        (dict(positions="last"), r"positions='last' is not understood; write 'each', None .* \[0, 3, -1\]"),
        (dict(positions=[]), r"positions=\[\] is not understood"),
        (dict(positions=True), r"positions=True is not understood"),
        (dict(positions=[0, None]), r"is not understood"),
        (dict(positions=[0, 0]), r"two columns of positions are called alike"),
        (dict(positions=[0, 5]), r"positions=5 is a token of no example at any location, .* the longest has 5"),
        (dict(positions=torch.ones(3, 5, dtype=torch.bool)), r"is a torch\.bool tensor .* positions=\[that\]"),
        (dict(positions=[[0, 7]]), r"positions=\[0, 7\] names no token in 3 of 3 examples"),
        (dict(source_positions=[0]), r"source_positions has 1 entries for 5 columns"),
        (dict(source_positions={"a": 0}), r"source_positions names the columns \['a'\]"),
        (dict(source_positions=0, positions=None), r"source_positions was given with positions=None"),
        (dict(source_positions=0, source=None, op=Zero()), r"source_positions was given with no source"),
        (dict(source=None), r"no operator was given; write op=Zero\(\), or source="),
        (dict(op=Zero()), r"a source was given and Zero takes none"),
        (dict(op=Swap(), source=None), r"Swap takes from a source and none was given"),
        (dict(op=Swap), r"is not an operator"),
        (dict(source=batch("gpt2", 2, size=2)), r"the base has 3 examples and the source 2"),
        (dict(source={Location(0): batch("gpt2")}), r"a sweep takes one source"),
        (dict(batch_size=2), r"batch_size=2 rows do not hold one counterfactual of 3 examples"),
        (dict(metric=lambda output: output.logits), r"returned shape \[3, 5, 30\] for the base run; return \[3\]"),
        (dict(metric=lambda output: output), r"returned CausalLMOutput.* for the base run"),
        (dict(metric=lambda output: output.logits[:, -1, 0].log() * float("nan")), r"is nan for the base run"),
        (dict(base=padded(batch("gpt2"), [2, 5, 4], "right")), r"reads position -1 without a mask, .* in 2 of 3"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_raises(options, match):
    asked = {"base": batch("gpt2"), "source": batch("gpt2", 2), "at": BLOCKS, "metric": METRIC, **options}
    model = make("gpt2")
    with pytest.raises(InterventionError, match=match):
        sweep(model, asked.pop("base"), asked.pop("source"), asked.pop("at"), **asked)


def test_runs_that_do_not_fit_raise():
    model, inputs = make("gpt2"), batch("gpt2")
    base = run(model, inputs)
    with pytest.raises(InterventionError, match=r"the base is a run of another model"):
        sweep(make("gpt2"), base, inputs, BLOCKS, metric=METRIC)
    with pytest.raises(InterventionError, match=r"the source is a run of another model"):
        sweep(model, base, run(make("gpt2"), inputs), BLOCKS, metric=METRIC)
    with pytest.raises(InterventionError, match=r"the base run stopped early"):
        sweep(model, run_to(model, inputs, BLOCKS), inputs, BLOCKS, metric=METRIC)
    with pytest.raises(InterventionError, match=r"is itself a counterfactual run"):
        sweep(model, interchange(model, base, inputs, BLOCKS[0]), inputs, BLOCKS, metric=METRIC)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(InterventionError, match=r"older than the model"):
        sweep(model, base, inputs, BLOCKS, metric=METRIC)
    with pytest.raises(InterventionError, match=r"in train mode, .* call model\.eval\(\)"):
        sweep(model.train(), inputs, inputs, BLOCKS, metric=METRIC)
