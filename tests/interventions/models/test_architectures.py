"""Locations are found by the structure of the model."""

import pytest
from torch import nn

from interventions import InterventionError, Location, architecture, describe, run
from tests.interventions.tiny_models import LAYERS, OTHERS, TRANSFORMERS, batch, make, places

STACKS = {
    "bert": {"": "bert.encoder.layer"},
    "distilbert": {"": "distilbert.transformer.layer"},
    "gpt2": {"": "transformer.h"},
    "llama": {"": "model.layers"},
    "t5": {"encoder": "encoder.block", "decoder": "decoder.block"},
    "vit": {"": "vit.layers"},
    "cnn": {"layer1": "layer1", "layer2": "layer2"},
    "lstm": {},
    "lstm-time-first": {},
    "mlp": {},
}


@pytest.mark.parametrize("name", STACKS)
def test_the_stacks_are_found(name):
    found = architecture(make(name))
    assert {stack.name: stack.path for stack in found.stacks} == STACKS[name]
    assert all(len(stack.blocks) == (2 if name == "cnn" else LAYERS) for stack in found.stacks)


@pytest.mark.parametrize(
    "wrap", [nn.Sequential, lambda model: nn.ModuleDict({"net": model})], ids=["in a list", "in a dict"]
)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_model_inside_another_has_the_same_stacks(name, wrap):
    model = make(name)
    found = architecture(wrap(model))
    assert [stack.blocks for stack in found.stacks] == [stack.blocks for stack in architecture(model).stacks]


def test_blocks_in_blocks_are_not_stacks():
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(4))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Mixture() for _ in range(2))
            self.norms = nn.ModuleList(nn.LayerNorm(2) for _ in range(5))

    assert [stack.path for stack in architecture(Net()).stacks] == ["layers"]


def test_peft_models_have_the_stacks_of_the_model_inside():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    (stack,) = architecture(model).stacks
    assert stack.path == "base_model.model.transformer.h"


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_layers_count_from_the_front_and_from_the_back(name):
    found = architecture(make(name))
    for layer in range(LAYERS):
        for site in ("block_output", "block_input"):
            front, back = found.place(Location(layer, site)), found.place(Location(layer - LAYERS, site))
            assert front.module is back.module is found.stacks[-1].blocks[layer]
    assert found.place(Location(site="embedding")).module is found.stacks[-1].blocks[0]


def test_encoder_decoders_default_to_the_decoder_and_each_side_has_its_mask():
    found = architecture(make("t5"))
    assert found.place(Location(1)).path == "decoder.block.1"
    assert found.place(Location(1)).mask == "decoder_attention_mask"
    assert found.place(Location(1, stack="encoder")).mask == "attention_mask"
    assert found.place(Location(module="encoder.final_layer_norm")).mask == "attention_mask"
    assert architecture(make("gpt2")).place(Location(1)).mask == "attention_mask"


def test_a_module_knows_its_block():
    found = architecture(make("gpt2"))
    blocks = found.stacks[0].blocks
    assert found.place(Location(module="transformer.h.1.attn")).block is blocks[1]
    assert found.place(Location(module="transformer.h.1")).is_block_output
    assert not found.place(Location(module="transformer.h.1", io="input")).is_block_output
    assert found.place(Location(module="transformer.wte")).block is None


@pytest.mark.parametrize(
    ("name", "location", "match"),
    [
        ("bert", Location(9), r"Location\(layer=9\) is out of range: this 'bert' model has 3 layers \(0 to 2, or -1"),
        ("bert", Location(-4), r"Location\(layer=-4\) is out of range"),
        ("t5", Location(3), r"this 't5' model has 3 decoder layers"),
        (
            "t5",
            Location(1, stack="both"),
            r"stack 'both' does not exist in this 't5' model: its stacks are encoder, decoder",
        ),
        ("bert", Location(1, stack="encoder"), r"it has one stack; leave stack out"),
        (
            "cnn",
            Location(1),
            r"block_output\.1 is ambiguous: this CNN has the stacks layer1, layer2; write stack='layer1'",
        ),
        ("mlp", Location(1), r"needs blocks and this Sequential has none: .* e\.g\. Location\(module='2'\)"),
        ("lstm", Location(site="embedding"), r"embedding needs blocks and this LSTM has none"),
        (
            "cnn",
            Location(module="layer1.0.conv3"),
            r"does not exist in this CNN; did you mean 'layer1\.0\.conv[12]'\? describe",
        ),
        ("gpt2", Location(module="h.1.attn"), r"module 'h\.1\.attn' does not exist in this 'gpt2' model; did you mean"),
    ],
)
def test_what_does_not_exist_raises(name, location, match):
    with pytest.raises(InterventionError, match=match):
        architecture(make(name)).place(location)


def test_a_list_of_blocks_never_runs_itself():
    with pytest.raises(InterventionError, match=r"module:transformer\.h never ran in this run; look at describe"):
        run(make("gpt2"), batch("gpt2"), Location(module="transformer.h"))


@pytest.mark.parametrize("name", [*TRANSFORMERS, *OTHERS])
def test_what_is_described_can_be_addressed(name):
    model = make(name)
    text, found = describe(model), architecture(model)
    for line in text.splitlines()[1:]:
        if line.startswith("    "):
            assert found.place(Location(module=line.strip())).path == line.strip()
        elif "…" in line and "Location" not in line:
            assert found.place(Location.parse(line.split()[0])).block in found.blocks
    assert all(place.module is None or place.module.split(".")[0] in text for place in places(name))
