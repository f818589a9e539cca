"""Promise 3 for a model that accelerate spreads over memory and disk: every site, and accelerate's hooks stay."""

import pytest
import torch

from interventions import Zero, interchange, intervene, run
from interventions.locations import BLOCK_SITES
from tests.interventions.tiny_models import LAYERS, answer, batch, make

from .attentions import PATTERNS, at, traces


def spread(model: torch.nn.Module, inner: str, blocks: str, folder) -> torch.nn.Module:
    """The first and last block on disk, all else in memory."""
    accelerate = pytest.importorskip("accelerate")
    parts = [name for name, _ in model.named_children() if name != inner]
    parts += [f"{inner}.{name}" for name, _ in getattr(model, inner).named_children() if f"{inner}.{name}" != blocks]
    places = {**dict.fromkeys(parts, "cpu"), **{f"{blocks}.{i}": ("disk", "cpu", "disk")[i] for i in range(LAYERS)}}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    ("name", "inner", "blocks"), [("llama", "model", "model.layers"), ("gpt2", "transformer", "transformer.h")]
)
def test_offloaded_blocks(name, inner, blocks, layer, tmp_path):
    plain, inputs, source = make(name), batch(name), batch(name, 2)
    model = spread(make(name), inner, blocks, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    before = traces(model)
    for site in BLOCK_SITES:
        place = at(site, layer)
        expected = interchange(plain, inputs, source, place).logits
        base = run(model, inputs, at=[place] if site in PATTERNS else ())
        assert torch.equal(interchange(model, base, source, place).logits, expected)
        assert torch.equal(interchange(model, base, inputs, place).logits, base.logits)
        with intervene(model, place, op=Zero()) as handle:
            answer(model, inputs)
        assert handle.firings == {place: 1}
    assert traces(model) == before
    assert torch.equal(answer(model, inputs), answer(plain, inputs))
