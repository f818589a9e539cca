"""`bake`: a copy without hooks answers as the hooked model, on other inputs too; what weights cannot do is refused."""

import copy

import pytest
import torch
from torch import nn

from interventions import (
    Add,
    InterventionError,
    Location,
    Mean,
    Noise,
    Rotation,
    Swap,
    Zero,
    bake,
    direction,
    everywhere,
    intervene,
    run,
)  # fmt: skip
from tests.interventions.tiny_models import TRANSFORMERS, WIDTH, answer, batch, make, trace

VECTOR = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
CASES = {
    "add to a part": {Location(1, "mlp_output"): Add(VECTOR, 0.5)},
    "zero of a part": {Location(1, "attention_output"): Zero()},
    "zero of heads": {Location(1, "attention_heads", heads=1): Zero(), Location(2, "attention_heads", heads=0): Zero()},
    "constant of neurons": {Location(2, "mlp_activation", dims=[3, 7]): Mean(torch.tensor([1.0, -2.0]))},
    "dims of a head": {Location(0, "attention_heads", heads=1, dims=[0, 2]): Mean(torch.tensor([0.5, 1.0]))},
    "vector at the residual": {Location(1): Add(VECTOR)},
    "vector before a block": {Location(2, "block_input"): Add(VECTOR)},
    "subspace": {Location(1, "mlp_output", subspace=Rotation(3, WIDTH)): Zero()},
    "coordinate": {Location(1, "attention_output", subspace=Rotation(1, WIDTH, seed=1)): Mean(torch.ones(1))},
    "two at one place": {Location(1, "mlp_output"): Add(VECTOR), Location(1, "mlp_output", dims=[0]): Zero()},
    "two before a place": {
        Location(1, "mlp_activation"): Add(torch.ones(1)), Location(1, "mlp_activation", dims=range(9)): Zero(),
    },
    "a function": {Location(1, "mlp_output"): lambda base, _source, _generator: base.flip(-1) * 2 + 1},
}  # fmt: skip


def check(model, interventions, name, baked):
    """Compare a copy with the hooked model on inputs that it was not made with."""
    others = batch(name, seed=9)
    with torch.no_grad():
        with intervene(model, interventions):
            expected = answer(model, others)
        found, before = answer(baked, others), answer(model, others)
    assert torch.allclose(found, expected, atol=1e-5 * max(1.0, float(expected.abs().max())))
    assert (before - expected).abs().max() > 1e-4


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("case", CASES)
def test_the_copy_answers_as_the_hooked_model(name, case):
    model, interventions = make(name), CASES[case]
    before, weights = trace(model), copy.deepcopy(model.state_dict())
    baked = bake(model, interventions, batch(name))
    assert type(baked) is type(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in baked.modules())
    assert trace(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    check(model, interventions, name, baked)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_direction_leaves_the_residual_stream(name, tmp_path):
    """In the weights, with tied tables of embeddings, and after the copy was saved and loaded."""
    model = make(name)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    along = direction(model, [batch(name)], [batch(name, seed=5)], Location(1))
    interventions = everywhere(model, along)
    baked = bake(model, interventions, batch(name))
    check(model, interventions, name, baked)
    for place in (Location(0), Location(-1)):
        state = run(baked, batch(name, seed=9)).activations[place]
        assert (state @ along.unit).abs().max() < 1e-5 * state.abs().max()
    baked.save_pretrained(tmp_path)
    check(model, interventions, name, type(model).from_pretrained(tmp_path).eval())


def test_of_other_networks():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).eval()
    x = torch.randn(4, 2, 4, 4)
    for at, op in (
        (Location(module="0", dims=[1]), Mean(torch.tensor([0.5]))),
        (Location(module="3@input".split("@")[0], io="input"), Add(torch.ones(12))),
    ):
        with intervene(net, {at: op}):
            expected = net(x)
        assert torch.allclose(bake(net, {at: op}, x)(x), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("at", "op", "match"),
    [
        (Location(1, "mlp_output"), Swap(), r"Swap at mlp_output.1 takes from a source.*write a constant"),
        (Location(1, "mlp_output"), Noise(0.5), r"Noise at mlp_output.1 is no affine function of each vector"),
        (Location(1, "mlp_output"), Add(VECTOR, renormalize=True), r"Add at mlp_output.1 is no affine function"),
        (Location(1, "mlp_output"), lambda base, *_: base.relu(), r"is no affine function"),
        (Location(1, subspace=Rotation(1, WIDTH)), Zero(), r"fits into the weights of no module that writes there"),
        (Location(1, dims=[0]), Zero(), r"Zero at block_output.1\[dims=0\] fits into the weights of no module"),
        (Location(1, "attention_pattern"), Zero(), r"is the attention_pattern of GPT2Attention, which has"),
        (Location(1, "mlp_output"), Mean(torch.ones(5, WIDTH)), r"Mean holds a tensor of shape \[5, 16\]"),
    ],
)  # fmt: skip
def test_what_weights_cannot_do_is_refused(at, op, match):
    with pytest.raises(InterventionError, match=match):
        bake(make("gpt2"), {at: op}, batch("gpt2"))


def test_a_model_with_hooks_is_refused():
    model, inputs = make("gpt2"), batch("gpt2")
    with intervene(model, Location(0), op=Add(VECTOR)):
        model(**inputs)
        with pytest.raises(InterventionError, match=r"has hooks, or is inside an intervene block"):
            bake(model, {Location(1): Add(VECTOR)}, inputs)
    with pytest.raises(InterventionError, match=r"inputs hold no example"):
        bake(nn.Sequential(nn.Linear(2, 2)).eval(), {Location(module="0"): Zero()}, torch.ones(0, 2))
    with pytest.raises(InterventionError, match=r"names nothing to write"):
        bake(model, {}, inputs)
    albert = shared()
    with pytest.raises(InterventionError, match=r"several layers share, so their weights are one"):
        bake(albert, {Location(1, "mlp_output"): Zero()}, {"input_ids": torch.ones(1, 3).long()})


def shared() -> nn.Module:
    """A model whose layers share one block."""
    from transformers import AlbertConfig, AlbertForSequenceClassification

    torch.manual_seed(0)
    return AlbertForSequenceClassification(
        AlbertConfig(vocab_size=30, embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                     intermediate_size=32, max_position_embeddings=20)
    ).eval()  # fmt: skip
