"""Promise 3 for every site of a block: gradients under checkpointing, whoever asks for them; autocast; no autograd."""

import threading

import pytest
import torch
from torch import nn

from interventions import InterventionError, Mixup, Noise, Zero, interchange, intervene, run
from interventions.locations import BLOCK_SITES
from tests.interventions.tiny_models import answer, batch, make

from .attentions import KINDS, PATTERNS, at, sites_of

CHECKPOINTED = (
    "query",
    "value",
    "attention_scores",
    "attention_pattern",
    "attention_heads",
    "mlp_activation",
    "block_output",
)
OUTSIDE = ("block_input", "block_output")  # of what transformers checkpoints


def shaken(base, source, generator):
    return base + torch.randn(base.shape, generator=generator)


def without_dropout(name: str) -> nn.Module:
    model = make(name).train()
    for module in model.modules():
        for each in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, each, None), float):
                setattr(module, each, 0.0)
    return model


def gradients(model, loss, thread: bool = False) -> list[torch.Tensor]:
    model.zero_grad()
    if thread:
        elsewhere = threading.Thread(target=loss.backward)
        elsewhere.start(), elsewhere.join()
    else:
        loss.backward()
    return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(found, expected, error: float = 1e-5) -> bool:
    size = max(grad.norm() for grad in expected)
    return size > 0 and all((one - other).norm() <= error * size for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("thread", [False, True], ids=["here", "another thread"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_write_is_made_again_when_a_checkpoint_is_computed_again(name, reentrant, thread):
    """Fails if the recomputation does not see the block, which was left before the backward pass."""

    def written(site):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        with intervene(model, at(site), op=shaken, generator=generator) as handle:
            loss = answer(model, batch(name)).square().mean()
        return gradients(model, loss, thread), handle.firings, generator.get_state().tolist()

    model = make(name).train()
    expected = {site: written(site) for site in CHECKPOINTED}
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for site, (grads, *counts) in expected.items():
        found, *counted = written(site)
        assert same(found, grads), site
        assert counted == counts, site
    assert not same(expected["query"][0], expected["value"][0])


def counterfactual(model, name, site, source: str) -> list[torch.Tensor]:
    given = batch(name, 2) if source == "inputs" else run(model, batch(name, 2), at=[at(site)])
    done = interchange(model, run(model, batch(name)), given, at(site))
    return gradients(model, done.logits.square().mean(), thread=True)


@pytest.mark.parametrize("source", ["inputs", "run"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gradients_of_a_swap_under_checkpointing(name, source):
    model = without_dropout(name)
    expected = {site: counterfactual(model, name, site, source) for site in CHECKPOINTED}
    model.activation_checkpointing_enable({"use_reentrant": False})
    for site, grads in expected.items():
        assert same(counterfactual(model, name, site, source), grads), site


@pytest.mark.parametrize("source", ["inputs", "run"])
@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize(
    "site",
    [
        "block_output", "query", "attention_pattern", "attention_heads", "mlp_output"
    ],
)  # fmt: skip
def test_gradients_of_a_swap_under_reentrant_checkpointing_or_an_error(name, source, site):
    model = without_dropout(name)
    expected = counterfactual(model, name, site, source)
    model.activation_checkpointing_enable({"use_reentrant": True})
    try:
        found = counterfactual(model, name, site, source)
    except InterventionError:
        return
    assert same(found, expected)


def test_activations_stay_attached_under_reentrant_checkpointing_or_raise():
    model = make("llama").train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    try:
        found = run(model, batch("llama"), at=[at("mlp_output")])
    except InterventionError:
        return
    assert found.activations[at("mlp_output")].requires_grad


@pytest.mark.parametrize(("kind", "site"), [(kind, site) for kind in KINDS for site in sites_of(kind)])
def test_gradients_reach_base_and_source_of_every_site(kind, site):
    """Each run alone: a detached source, or a base that is taken from nowhere, leaves no gradient."""
    model, place = KINDS[kind](), at(site, dims=[0, 1])
    embed = model.get_input_embeddings() if kind == "interface" else model.embed
    for wanted in (0, 1):
        rows = []

        def kept(module, args, output, rows=rows):
            rows.append(output.detach().requires_grad_())
            return rows[-1]

        with embed.register_forward_hook(kept):
            base, source = run(model, batch("llama")), run(model, batch("llama", 2), at=[place.whole])
            interchange(model, base, source, place).logits.square().sum().backward()
        assert rows[wanted].grad.abs().sum() > 0


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
}


def check_resumed(model, name: str, site: str) -> None:
    place = at(site)
    here = run(model, batch(name), at=[place] if site in PATTERNS else ())
    base, source = run(model, batch(name)), run(model, batch(name, 2), at=[place])
    assert torch.equal(interchange(model, base, batch(name), place).logits, here.logits), site
    found = interchange(model, base, source, place).logits
    assert torch.equal(found, interchange(model, base, source, place, resume=False).logits), site
    assert not torch.equal(found, here.logits), site


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_resumed_logits_are_exact(name, context):
    model = make(name)
    with CONTEXTS[context]():
        for site in BLOCK_SITES:
            check_resumed(model, name, site)


@torch.no_grad()
@pytest.mark.parametrize("op", [Noise(0.5), Mixup(0.5), Zero()], ids=["Noise", "Mixup", "Zero"])
def test_writes_into_masked_scores_are_numbers(op):
    model = make("llama")
    with intervene(model, at("attention_scores"), op=op) as handle:
        assert not answer(model, batch("llama")).isnan().any()
    assert 0 < handle.change[at("attention_scores")] < float("inf")
