"""Promise 3 for adapted models: sites are those of the same model with its adapters merged, paths those of the base."""

import copy

import pytest
import torch
from torch import nn

from interventions import Add, Location, interchange, intervene, run
from interventions.locations import BLOCK_SITES
from tests.interventions.tiny_models import VOCABULARY, answer, batch, make

from .attentions import at, traces

peft = pytest.importorskip("peft")
PUSH = Add(torch.tensor(1.5))


def adapted(name: str, targets: object = "all-linear", **settings) -> nn.Module:
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, r=4, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(make(name), config).eval()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("site", BLOCK_SITES)
def test_every_site_is_that_of_the_merged_model(name, site):
    model, inputs, source, place = adapted(name), batch(name), batch(name, 2), at(site)
    merged = copy.deepcopy(model).merge_and_unload()
    before = traces(model)
    found, expected = (run(each, inputs, at=[place]).activations[place] for each in (model, merged))
    assert torch.allclose(found, expected, atol=1e-4)
    found, expected = (interchange(each, run(each, inputs), source, place).logits for each in (model, merged))
    assert torch.allclose(found, expected, atol=1e-3)
    assert not torch.allclose(found, answer(model, inputs), atol=1e-2)
    assert traces(model) == before


def test_places_by_path_and_gradients_of_the_adapter_alone():
    model, place = adapted("llama", ["q_proj", "o_proj"]), Location(module="base_model.model.model.layers.1.self_attn")
    interchange(model, run(model, batch("llama")), batch("llama", 2), place).logits.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads
    assert all("lora" in name for name in grads)
    assert all(not p.requires_grad for name, p in model.named_parameters() if "lora" not in name)


@torch.no_grad()
def test_the_model_inside_is_written_as_well():
    model, inputs, place = adapted("llama", ["q_proj"]), batch("llama"), at("attention_heads")
    with intervene(model.base_model.model, place, op=PUSH) as handle:
        found = answer(model, inputs)
    assert handle.firings == {place: 1}
    assert torch.equal(found, interchange(model, inputs, None, {place: PUSH}).logits)


PROMPTS = torch.randint(1, VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, "CAUSAL_LM"])
@pytest.mark.parametrize(
    ("site", "steps", "positions"),
    [
        ("block_output", None, None),
        ("key", None, None),
        ("block_output", 0, None),
        ("block_output", slice(1, None), -1),
        ("value", None, 1),
    ],
)
def test_generation(kind, site, steps, positions):
    model, answers = adapted("llama", ["q_proj"], task_type=kind), []
    settings = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    for each in (model, model.base_model.model):
        with intervene(each, at(site), op=PUSH, steps=steps, positions=positions):
            out = model.generate(input_ids=PROMPTS, attention_mask=MASK, eos_token_id=None, **settings)
        answers.append(torch.stack(out.logits))
    assert torch.allclose(*answers, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, "CAUSAL_LM"])
def test_padding_given_by_position(kind):
    model, answers = adapted("llama", ["q_proj"], task_type=kind), []
    for each in (model, model.base_model.model):
        with intervene(each, Location(1), op=PUSH, positions=0):
            answers.append(each(PROMPTS, MASK).logits)
    assert torch.equal(*answers)
