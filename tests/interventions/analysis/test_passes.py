"""Counterfactuals share passes, and see nothing of each other."""

from functools import partial

import pytest
import torch
from torch import nn

from interventions import InterventionError, Location, Mean, Noise, Zero, interchange, intervene, run
from interventions.analysis import passes
from interventions.analysis.sweeps import sweep
from interventions.metrics import kl, logit_difference, normalized
from interventions.models.architectures import architecture
from tests.conformance.building import built
from tests.conformance.inputs import batches
from tests.interventions.analysis.test_sweeps import BLOCKS, METRIC, counted, naive, padded
from tests.interventions.tiny_models import LAYERS, batch, make

BLOCK_PATHS = {"bert": "bert.encoder.layer", "gpt2": "transformer.h", "llama": "model.layers", "t5": "decoder.block"}


@pytest.mark.parametrize("name", BLOCK_PATHS)
def test_each_run_is_made_once_and_cells_share_passes(name):
    model, inputs, others = make(name), batch(name), batch(name, seed=2)
    columns = 4 if name == "t5" else 5
    places = [Location(0), Location(1), Location(LAYERS - 2, "block_input")]
    for rows, count in ((3, 3 * columns), (6, 3 * -(-columns // 2)), (64, 1)):
        with counted(model, BLOCK_PATHS[name]) as calls:
            sweep(model, inputs, others, places, metric=METRIC, batch_size=rows)
        # The base and the source run in full; blocks that return more than a state also with twice the examples.
        full = 2 + (name == "t5" and rows > 3)
        assert calls == {"model": full + count, "first": full, "last": full + count}
    base, source = run(model, inputs), run(model, others)
    with counted(model, BLOCK_PATHS[name]) as calls:
        sweep(model, base, source, BLOCKS, metric=METRIC, batch_size=64)
    assert calls["model"] == (name == "t5") + 1


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("positions", [None, [0, -1]])
def test_heads_and_sites_share_passes(name, positions):
    """Heads of one layer, several sites and neighbouring layers: with all tokens or some, in any order of the rows."""
    model, inputs, others = make(name), batch(name), batch(name, seed=2)
    heads = [Location(i, "attention_heads", heads=h) for i in range(LAYERS) for h in range(2)]
    both = (Location(1, "attention_heads", heads=1), Location(1, "attention_heads", heads=0))
    parts = [Location(0, "mlp_output", dims=range(3)), Location(0, "mlp_output"), Location(2), Location(1)]
    rows = [*heads[::-1], *parts, both, (Location(0), Location(2, "mlp_output"))]
    whole = list(dict.fromkeys(at.whole for row in rows for at in (row if isinstance(row, tuple) else (row,))))
    with torch.no_grad():
        base, source = run(model, inputs, whole), run(model, others, whole)
    expected = naive(model, base, source, rows, [None] if positions is None else positions)
    with counted(model, BLOCK_PATHS[name]) as calls:
        found = sweep(model, base, source, rows, metric=METRIC, positions=positions)
    assert torch.allclose(found.per_example, expected, rtol=1e-5, atol=1e-6)
    assert calls["model"] <= (name == "t5") + 4  # of 12 rows
    assert len({round(float(value), 5) for value in expected[:, -1, 0]}) > 8


@pytest.fixture
def tokens_computed(monkeypatch):
    """Of how many tokens each pass computes the logits."""
    counts = []

    def interchanged(*given, **options):
        done = interchange(*given, **options)
        counts.append(done.logits.shape[1])
        return done

    monkeypatch.setattr(passes, "interchange", interchanged)
    return counts


CAUSAL = "bloom cohere falcon gemma gpt2 gpt_neox granite mamba mistral mpt opt phi qwen2".split()


def causal(model_type: str) -> tuple[nn.Module, dict, dict]:
    """A tiny language model of a type of transformers, and two batches for it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = built(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]], model_type)
    base, source = ({"input_ids": each["input_ids"]} for each in batches(model))
    return model, base, source


@pytest.mark.parametrize("model_type", CAUSAL)
def test_logits_of_the_tokens_that_a_metric_reads_are_those_of_all_tokens(model_type, tokens_computed):
    """For each family whose models can leave out the logits of tokens; a function of the user's own gets all."""
    model, inputs, others = causal(model_type)
    at = [Location(i) for i in range(len(architecture(model).stacks[-1].blocks))]
    for metric in (logit_difference(1, 2), kl(run(model, others)), logit_difference(3, 4, position=1)):
        tokens_computed.clear()
        found = sweep(model, inputs, others, at, metric=metric, positions=[0, -1])
        assert set(tokens_computed) == {1}
        tokens_computed.clear()
        whole = sweep(model, inputs, others, at, metric=partial(metric), positions=[0, -1])
        assert set(tokens_computed) == {inputs["input_ids"].shape[1]}
        torch.testing.assert_close(found.per_example, whole.per_example, rtol=1e-4, atol=1e-5)
        assert found.effects.abs().max() > 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_tokens_that_a_metric_reads_under_padding(name, side, tokens_computed):
    model = make(name)
    inputs, others = (padded(batch(name, seed), [3, 5, 4], side) for seed in (1, 2))
    for position, columns in ((-1, {"left": 1, "right": 3}[side]), (0, {"left": 3, "right": 1}[side])):
        metric = logit_difference([0, 1, 2], [2, 0, 1], position=position, mask=inputs["attention_mask"])
        tokens_computed.clear()
        scale = normalized(metric, run(model, inputs), interchange(model, inputs, others, BLOCKS[:1]))
        found = sweep(model, inputs, others, BLOCKS, metric=scale)
        assert set(tokens_computed) == {columns}
        whole = sweep(model, inputs, others, BLOCKS, metric=partial(scale))
        torch.testing.assert_close(found.per_example, whole.per_example, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_all_logits_are_computed_where_others_may_read_them(tokens_computed):
    """Logits are written, or inputs ask for some, or a hook of the user or an open block may count on all tokens."""
    model, inputs, others = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    sweep(model, inputs, others, [Location(1), Location(module="lm_head")], metric=METRIC, positions=[0, -1])
    handle = model.lm_head.register_forward_hook(lambda module, args, output: output + 1)
    sweep(model, inputs, others, BLOCKS, metric=METRIC)
    handle.remove()
    with intervene(model, Location(site="logits"), op=Zero(), positions=0):
        sweep(model, inputs, others, BLOCKS, metric=METRIC)
    sweep(model, {**inputs, "labels": inputs["input_ids"]}, others, BLOCKS, metric=METRIC)
    assert set(tokens_computed) == {5}
    tokens_computed.clear()
    sweep(model, {**inputs, "logits_to_keep": 2}, {**others, "logits_to_keep": 2}, BLOCKS, metric=METRIC)
    assert set(tokens_computed) == {2}


class Ignores(nn.Module):
    """A model that takes the argument and computes all logits nevertheless."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make("gpt2")

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int = 0) -> object:
        return self.inner(input_ids)


def test_a_model_that_keeps_all_logits_is_measured_all_the_same(tokens_computed):
    model, inputs, others = Ignores().eval(), batch("gpt2"), batch("gpt2", seed=2)
    inputs, others = ({"input_ids": each["input_ids"]} for each in (inputs, others))
    found = sweep(model, inputs, others, BLOCKS, metric=METRIC)
    assert set(tokens_computed) == {5}
    expected = naive(model, run(model, inputs), run(model, others), BLOCKS, range(5))
    assert torch.allclose(found.per_example, expected, rtol=1e-5, atol=1e-6)


def doubled(base, source, generator):
    return 2 * base


def test_rows_of_operators_that_may_draw_run_in_their_order():
    """They share passes where they are parts of one place, and draw what the loop draws, from the default generator."""
    model = make("gpt2")
    base = run(model, batch("gpt2"), [Location(i, "attention_heads") for i in range(LAYERS)])
    heads = [Location(i, "attention_heads", heads=h) for i in (2, 0, 1) for h in range(2)]
    torch.manual_seed(5)
    expected = naive(model, base, None, heads, [None], op=Noise(1.0))
    torch.manual_seed(5)
    with counted(model, "transformer.h") as calls:
        found = sweep(model, base, None, heads, metric=METRIC, positions=None, op=Noise(1.0))
    assert torch.allclose(found.per_example, expected, rtol=1e-5, atol=1e-5)
    assert calls["model"] == 3
    expected = naive(model, base, None, heads, [None], op=doubled)
    found = sweep(model, base, None, heads, metric=METRIC, positions=None, op=doubled)
    assert torch.allclose(found.per_example, expected, rtol=1e-5, atol=1e-6)


def test_operators_of_parts_are_checked():
    model, base = make("gpt2"), batch("gpt2")
    heads = [Location(0, "attention_heads", heads=h) for h in range(2)]
    with pytest.raises(
        InterventionError, match=r"returned torch\.float32 \[.*at attention_heads\.0\[heads=1\]; return"
    ):
        sweep(model, base, None, heads, metric=METRIC, op={heads[0]: doubled, heads[1]: lambda x, s, g: x[..., :1]})


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
    ("value", "more"),
    [
        (lambda x: (x.new_zeros(1, 2), [x.new_zeros(3, 3)]), 1),  # three rows, and none of them an example
        (lambda x: x.transpose(0, 1), 1),
        (lambda x: x.new_zeros(len(x), len(x)), 2),  # twice the examples do not say how it goes with them
        (lambda x: iter(x), 1),
    ],
    ids=["shared", "second axis", "two axes", "an object"],
)
def test_whatever_a_block_returns_passes_resume(value, more):
    torch.manual_seed(0)
    model = Odds(value).eval()
    base, source = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    at = [Location(0), Location(1), Location(1, "block_input")]
    with counted(model, "blocks") as calls:
        grid = sweep(model, base, source, at, metric=METRIC, batch_size=6)
    assert calls == {"model": 2 + more + 6, "first": 2 + more, "last": 2 + more + 6}
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
