"""Promise 2, for what others do while a block is open: copies, hooks, interrupts and blocks of other orders."""

import contextvars
import copy
from contextlib import ExitStack, suppress

import pytest
import torch
from transformers.modeling_utils import AttentionInterface

from interventions import InterventionError, Location, Zero, interchange, intervene
from tests.interventions.tiny_models import answer, batch, make

from .attentions import at, sites_of, traces


@torch.no_grad()
def test_two_blocks_left_in_the_order_they_were_entered():
    """The second block must go on acting when the first one is gone: a shared override is not taken away early."""
    model, inputs = make("llama"), batch("llama")
    expected = interchange(model, inputs, None, {at("query"): Zero()}).logits
    first, second = intervene(model, at("key"), op=Zero()), intervene(model, at("query"), op=Zero())
    first.__enter__(), second.__enter__()
    answer(model, inputs)
    first.__exit__(None, None, None)
    assert torch.equal(answer(model, inputs), expected)
    second.__exit__(None, None, None)


@torch.no_grad()
def test_an_interrupted_generation_leaves_nothing_behind():
    model, inputs, calls = make("llama"), batch("llama"), []

    def interrupted(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    settings = dict(max_new_tokens=4, do_sample=False)
    with intervene(model, at("key"), op=Zero(), steps=slice(1, None)):
        expected = model.generate(**inputs, **settings)
    before = traces(model)
    with intervene(model, at("key"), op=Zero(), steps=slice(1, None)):
        with model.lm_head.register_forward_hook(interrupted), pytest.raises(KeyboardInterrupt):
            model.generate(**inputs, **settings)
        assert torch.equal(model.generate(**inputs, **settings), expected)
    assert traces(model) == before


@torch.no_grad()
@pytest.mark.xfail(
    strict=True, reason="torch calls no hook on KeyboardInterrupt, so Scope.call stays the interrupted one"
)
def test_a_call_that_was_interrupted_is_over():
    model, inputs = make("llama"), batch("llama")

    def interrupted(*_):
        raise KeyboardInterrupt

    with intervene(model, Location(1), op=Zero(), positions=-1):
        with model.lm_head.register_forward_hook(interrupted), suppress(KeyboardInterrupt):
            answer(model, inputs)
        answer(model, inputs)
        with pytest.raises(InterventionError, match="ran outside a call of the model itself"):
            model.model.layers[1](torch.ones(3, 5, 16), position_embeddings=(torch.ones(1, 5, 4),) * 2)


@torch.no_grad()
def test_another_interface_of_the_user_is_called_and_stays(monkeypatch):
    original, calls = AttentionInterface.get_interface, []

    def mine(self, implementation, default):
        calls.append(implementation)
        return original(self, implementation, default)

    monkeypatch.setattr(AttentionInterface, "get_interface", mine)
    model, inputs = make("llama"), batch("llama")
    with intervene(model, at("attention_heads"), op=Zero()):
        answer(model, inputs)
    assert len(calls) == 3
    assert vars(AttentionInterface)["get_interface"] is mine


@torch.no_grad()
def test_hooks_of_the_user_inside_attention_go_on():
    model, inputs, seen = make("llama"), batch("llama"), []
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with intervene(model, at("attention_heads"), op=Zero()):
        answer(model, inputs)
    answer(model, inputs)
    assert not seen[0].any()
    assert seen[1].any()


def test_a_block_closed_in_another_context_is_closed_everywhere():
    """A generator that was started in a context of its own and closed outside of it."""
    model, inputs = make("llama"), batch("llama")

    def answers():
        with intervene(model, at("attention_heads"), op=Zero()):
            while True:
                yield answer(model, inputs)

    going, context, expected = answers(), contextvars.copy_context(), answer(model, inputs)
    context.run(next, going)
    going.close()
    assert torch.equal(context.run(answer, model, inputs), expected)


@torch.no_grad()
def test_a_copy_is_refused_inside_a_block():
    """It would keep our hooks for ever, and a `generate` that runs the original."""
    model, inputs = make("llama"), batch("llama")
    with intervene(model, at("attention_heads"), op=Zero()):
        answer(model, inputs)
        with pytest.raises(InterventionError, match="cannot be copied while a block is open on it"):
            copy.deepcopy(model)
    assert torch.equal(answer(copy.deepcopy(model), inputs), answer(model, inputs))


@torch.no_grad()
def test_many_nested_blocks():
    model, inputs = make("llama"), batch("llama")
    before = traces(model)
    with ExitStack() as stack:
        for site in sites_of("interface"):
            stack.enter_context(intervene(model, at(site), op=lambda base, source, generator: base.clone()))
        answer(model, inputs)
    assert traces(model) == before
