"""Promise 3 for quantised linear layers, which are no `nn.Linear` and have no parameters: every site is found."""

import warnings

import pytest
import torch
from torch import nn

from interventions import interchange, intervene, run
from interventions.locations import BLOCK_SITES
from tests.interventions.tiny_models import answer, batch, make

from .attentions import PATTERNS, at, traces


def quantised(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(make(name), {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in model.modules())
    return model


@pytest.fixture(autouse=True)
def needs_a_backend():
    if not set(torch.backends.quantized.supported_engines) - {"none"}:
        pytest.skip("no engine for quantised layers")


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_every_site_of_a_quantised_model(name):
    model, inputs = quantised(name), batch(name)
    before, plain = traces(model), run(model, inputs)
    for site in BLOCK_SITES:
        place = at(site)
        here = run(model, inputs, at=[place]) if site in PATTERNS else plain
        source = run(model, batch(name, 2), at=[place])
        assert torch.equal(interchange(model, plain, inputs, place).logits, here.logits)
        found = interchange(model, plain, source, place).logits
        assert torch.equal(found, interchange(model, plain, source, place, resume=False).logits)
        assert not torch.equal(found, here.logits)
        with intervene(model, place, source=source) as handle:
            assert torch.equal(answer(model, inputs), found)
        assert handle.firings == {place: 1}
    assert traces(model) == before


@torch.no_grad()
def test_what_is_read_is_what_hooks_by_hand_read():
    model, seen = quantised("llama"), {}
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    for site, module in (("attention_heads", attention.o_proj), ("mlp_activation", mlp.down_proj)):
        module.register_forward_pre_hook(lambda module, args, site=site: seen.update({site: args[0]}))
    attention.o_proj.register_forward_hook(lambda module, args, output: seen.update(attention_output=output))
    mlp.register_forward_hook(lambda module, args, output: seen.update(mlp_output=output))
    answer(model, batch("llama"))
    kept = dict(seen)
    found = run(model, batch("llama"), at=[at(site) for site in kept]).activations
    assert all(torch.equal(found[at(site)].reshape(state.shape), state) for site, state in kept.items())
