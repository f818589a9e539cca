"""A sweep is a loop of interchanges, in fewer passes: same numbers, counted forwards, nothing silent."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from interventions import InterventionError, Location, Swap, Zero, interchange, intervene, mean_of, run, run_to
from interventions.analysis.sweeps import sweep
from interventions.metrics import kl, logit_difference, normalized
from tests.interventions.tiny_models import LAYERS, batch, make

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


@pytest.mark.parametrize("name", PLACES)
def test_a_sweep_is_a_loop_of_interchanges(name):
    model, inputs, others, places = make(name), batch(name), batch(name, seed=2), PLACES[name]
    with torch.no_grad():  # another kernel computes what autograd is to follow
        base, source = run(model, inputs), run(model, others)
    for place in places:
        positions = range(base.vectors(place).shape[1])
        expected = naive(model, base, source, [place], positions)
        alone = sweep(model, inputs, others, place, metric=METRIC, batch_size=3)
        whole = sweep(model, inputs, others, place, metric=lambda run: METRIC(run), batch_size=3)
        assert torch.equal(whole.per_example, expected), place
        # A head that computes the logits of the last token alone rounds otherwise.
        assert torch.allclose(alone.per_example, expected, rtol=1e-5, atol=1e-6), place
        assert alone.positions == tuple(positions)
        together = sweep(model, base, source, place, metric=METRIC)
        assert torch.allclose(together.per_example, expected, rtol=1e-5, atol=1e-6), place
        assert expected.std() > 1e-3
    assert torch.equal(alone.baseline, METRIC(base))
    assert torch.equal(alone.source, METRIC(source))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
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


def test_all_positions_at_once_and_models_without_positions():
    model, inputs, others = make("mlp"), batch("mlp"), batch("mlp", seed=2)
    grid = sweep(model, inputs, others, ["module:0", "module:2"], metric=METRIC, positions=None)
    assert grid.positions == ("all",)
    assert torch.equal(grid.per_example[:, 0], METRIC(model(others)).expand(2, 3))
    with pytest.raises(InterventionError, match=r"module:0 has no positions: its shape is \[3, 8\].*positions=None"):
        sweep(model, inputs, others, ["module:0"], metric=METRIC)


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


def test_a_metric_may_give_one_number_for_all_examples():
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    grid = sweep(model, inputs, others, BLOCKS, metric=lambda output: METRIC(output).mean())
    each = sweep(model, inputs, others, BLOCKS, metric=METRIC)
    assert grid.per_example.shape == (3, 5, 1)
    assert torch.allclose(grid.values, each.values, atol=1e-6)
    shorter = padded(inputs, [5, 3, 2], "left")
    grid = sweep(model, shorter, others, BLOCKS, metric=lambda output: output.logits[:, -1, 0].mean())
    assert grid.values.isnan()[0].tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("name", ["gpt2", "t5"])
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


def test_the_last_block_at_the_last_position_is_everything():
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    base, source = run(model, inputs), run(model, others)
    scaled = normalized(METRIC, clean=source, corrupted=base)
    grid = sweep(model, base, source, BLOCKS, metric=scaled)
    assert torch.allclose(grid.values[-1], torch.tensor([0.0, 0, 0, 0, 1]), atol=1e-4)
    assert grid.largest(1)[0][1] == 4
    away = sweep(model, base, source, BLOCKS, metric=kl(base))
    assert away.values[-1, :-1].abs().max() < 1e-5
    assert away.baseline.abs().max() < 1e-5


def test_runs_that_lack_an_activation_are_made_once_more():
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    inner = [Location(module=f"transformer.h.{i}.mlp") for i in range(LAYERS)]
    source = run(model, others)
    with counted(model, "transformer.h") as calls:
        grid = sweep(model, run(model, inputs), source, inner, metric=METRIC)
    assert calls["model"] == 1 + 2 + 1  # the base, both once more, and one pass
    stopped = sweep(model, inputs, run_to(model, others, inner), inner, metric=METRIC)
    assert torch.equal(stopped.per_example, grid.per_example)
    assert stopped.source is None


def test_it_runs_inside_other_blocks_and_leaves_no_graph():
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    outside = sweep(model, inputs, others, BLOCKS, metric=METRIC)
    with intervene(model, layer=1, dims=range(8), op=Zero()):
        grid = sweep(model, inputs, others, BLOCKS, metric=METRIC)
        expected = naive(model, run(model, inputs), run(model, others), BLOCKS, range(5))
    assert torch.allclose(grid.per_example, expected, atol=1e-6)
    assert not torch.allclose(grid.per_example, outside.per_example, atol=1e-2)
    assert not grid.per_example.requires_grad


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(at=[]), r"no location was given"),
        (dict(at=[()]), r"or none in one of the rows; write at="),
        (dict(at=[Location(0), "block_output.0"]), r"two rows are called block_output\.0"),
        (dict(at={Location(0): Zero()}), r"the keys of at= are the labels"),
        (dict(at=[Location(9)]), r"out of range"),
        (dict(positions="last"), r"positions='last' is not understood; write 'each', None .* \[0, 3, -1\]"),
        (dict(positions=[0, 0]), r"two columns of positions have the same name"),
        (dict(positions=[0, 5]), r"positions=5 is a token of no example at any location, .* the longest has 5"),
        (dict(positions=[[0, 7]]), r"positions=\[0, 7\] names no token in 3 of 3 examples"),
        (dict(source_positions=[0]), r"source_positions has 1 entries for 5 columns"),
        (dict(source_positions=0, positions=None), r"source_positions was given with positions=None"),
        (dict(source_positions=0, source=None, op=Zero()), r"source_positions was given with no source"),
        (dict(source=None), r"no operator was given; write op=Zero\(\), or source="),
        (dict(op=Zero()), r"a source was given and Zero takes none"),
        (dict(op=Swap(), source=None), r"Swap takes from a source and none was given"),
        (dict(op=Swap), r"is not an operator"),
        (dict(source=batch("gpt2", 2, size=2)), r"the base has 3 examples and the source 2"),
        (dict(batch_size=0), r"batch_size=0 rows do not hold one counterfactual of 3 examples"),
        (dict(metric=lambda output: output.logits), r"returned shape \[3, 5, 30\] for the base run; return \[3\]"),
        (dict(metric=lambda output: output.logits[:, -1, 0].log() * float("nan")), r"is not finite for the base run"),
        (dict(base=padded(batch("gpt2"), [2, 5, 4], "right")), r"reads position -1 without a mask, which .* in 2 of 3"),
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
    with pytest.raises(InterventionError, match=r"a run of another model"):
        sweep(make("gpt2"), base, inputs, BLOCKS, metric=METRIC)
    with pytest.raises(InterventionError, match=r"a run of another model"):
        sweep(model, base, run(make("gpt2"), inputs), BLOCKS, metric=METRIC)
    with pytest.raises(InterventionError, match=r"the base stopped early"):
        sweep(model, run_to(model, inputs, BLOCKS), inputs, BLOCKS, metric=METRIC)
    with pytest.raises(InterventionError, match=r"or is itself a counterfactual run"):
        sweep(model, interchange(model, base, inputs, BLOCKS[0]), inputs, BLOCKS, metric=METRIC)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(InterventionError, match=r"older than the model"):
        sweep(model, base, inputs, BLOCKS, metric=METRIC)
    with pytest.raises(InterventionError, match=r"in train mode, .* call model\.eval\(\)"):
        sweep(model.train(), inputs, inputs, BLOCKS, metric=METRIC)


def test_operators_by_location():
    model, base = make("gpt2"), batch("gpt2", 1)
    places = [Location(0, "attention_heads", heads=1), Location(1, "mlp_output")]
    means = mean_of(model, places, [batch("gpt2", 2)])
    grid = sweep(model, base, None, places, op=means, positions=[1, -1], metric=lambda out: out.logits[:, -1, 3])
    for row, place in enumerate(places):
        for column, position in enumerate((1, -1)):
            with intervene(model, {place: means[place]}, positions=position), torch.no_grad():
                expected = model(**base).logits[:, -1, 3]
            assert torch.allclose(grid.per_example[row, column], expected, atol=1e-5)
    with pytest.raises(InterventionError, match=r"no operator was given for block_output\.2; add it to op="):
        sweep(model, base, None, [*places, Location(2)], op=means, metric=lambda out: out.logits[:, -1, 3])


def test_no_examples_are_said():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)).eval()
    with pytest.raises(InterventionError, match=r"the base has 0 examples, .*give at least one row"):
        sweep(net, torch.zeros(0, 2), torch.zeros(0, 2), ["module:0"], positions=None, metric=lambda x: x[:, 0])
