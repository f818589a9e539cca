"""Runs that end before the head answer as whole ones do, to the bit, and are whole where something would be lost."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from interventions import InterventionError, Location, deferring_head, interchange, intervene, record, run
from tests.interventions.tiny_models import batch, make

FAMILIES = ["gpt2", "llama", "t5"]


def model_of(family: str) -> nn.Module:
    return make(family).eval()


def deferred(model: nn.Module, **settings: object):
    return deferring_head(model, model.get_output_embeddings(), **settings)


def equal_gradients(model: nn.Module, whole: torch.Tensor, lazy: torch.Tensor) -> bool:
    parameters = [each for each in model.parameters() if each.requires_grad]
    weights = torch.linspace(-1, 1, whole.numel()).reshape(whole.shape)
    both = [torch.autograd.grad((each * weights).sum(), parameters, allow_unused=True) for each in (whole, lazy)]
    return all(torch.equal(a, b) if a is not None else b is None for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_that_are_read_later_are_those_of_a_whole_run_and_so_are_gradients(family):
    model, inputs = model_of(family), batch(family)
    whole = run(model, inputs)
    with deferred(model):
        lazy = run(model, inputs)
    assert lazy.deferred is not None
    assert torch.equal(lazy.logits, whole.logits)
    assert lazy.deferred is None  # its logits were made
    assert equal_gradients(model, whole.logits, lazy.logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("resume", [True, False])
def test_a_counterfactual_ends_before_the_head_too(family, resume):
    model, base, source, at = model_of(family), batch(family), batch(family, 2), Location(1)
    whole = interchange(model, run(model, base), source, at, resume=resume, record=[Location(-1)])
    with deferred(model):
        lazy = interchange(model, run(model, base), run(model, source), at, resume=resume, record=[Location(-1)])
    assert lazy.deferred is not None
    assert torch.equal(lazy.activations[Location(-1)], whole.activations[Location(-1)])
    assert torch.equal(lazy.logits, whole.logits)
    assert equal_gradients(model, whole.logits, lazy.logits)
    assert not torch.equal(lazy.logits, run(model, base).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_the_states_give_parts_of_the_logits(family):
    model, inputs = model_of(family).double(), batch(family)
    with deferred(model, after=lambda logits: logits / 4):
        found = run(model, inputs).deferred
    part = found.answer(found.states[1:2])
    torch.testing.assert_close(part, run(model, inputs).logits[1:2] / 4)
    twice = {name: 2 * each for name, each in found.head.named_parameters()}
    torch.testing.assert_close(found.answer(found.states[1:2], twice), 2 * part)


def test_examples_are_taken_and_the_graph_is_cut_before_the_logits_are_made():
    model, inputs = model_of("llama"), batch("llama")
    whole = run(model, inputs)
    with deferred(model):
        lazy = run(model, inputs)
    torch.testing.assert_close(lazy.take([2, 0]).logits, whole.take([2, 0]).logits)
    assert not lazy.detach().output.states.requires_grad
    torch.testing.assert_close(lazy.take([1]).detach().logits, whole.logits[1:2].detach())
    assert torch.equal(lazy.logits, whole.logits)
    assert torch.equal(lazy.take([1]).logits, whole.logits[1:2])  # of those that were made


def test_logits_have_a_graph_if_the_run_had_one():
    model, inputs = model_of("llama"), batch("llama")
    with deferred(model), torch.no_grad():
        cut = run(model, inputs)
    with deferred(model):
        graded = run(model, inputs)
    with torch.no_grad():
        assert graded.logits.requires_grad
    assert not cut.logits.requires_grad


def test_logits_are_those_of_the_precision_of_the_run():
    model, inputs = model_of("llama"), batch("llama")
    with torch.autocast("cpu", torch.bfloat16):
        whole = run(model, inputs).logits
        with deferred(model):
            lazy = run(model, inputs)
    assert whole.dtype == lazy.logits.dtype == torch.bfloat16
    assert torch.equal(whole, lazy.logits)


def test_activations_before_the_head_are_there_and_those_after_it_make_the_run_whole():
    model, inputs, head = model_of("llama"), batch("llama"), Location(module="lm_head", io="input")
    whole = run(model, inputs, [Location(1), head])
    with deferred(model):
        lazy = run(model, inputs, [Location(1), head])
        after = run(model, inputs, Location(module="lm_head"))
    assert lazy.deferred is not None
    assert after.deferred is None
    for at in (Location(1), head, Location(0)):
        assert torch.equal(lazy.activations[at], whole.activations[at])
    assert torch.equal(after.activations[Location(module="lm_head")], whole.logits)


def hooked_head(model: nn.Module) -> object:
    return model.lm_head.register_forward_hook(lambda *_: None)


def hooked_input(model: nn.Module) -> object:
    return model.lm_head.register_forward_pre_hook(lambda *_: None)


def hooked_model(model: nn.Module) -> object:
    return model.register_forward_hook(lambda *_: None)


def backward_hook(model: nn.Module) -> object:
    return model.lm_head.register_full_backward_hook(lambda *_: None)


@pytest.mark.parametrize("hook", [hooked_head, hooked_input, hooked_model, backward_hook])
def test_a_hook_that_would_miss_the_head_makes_the_run_whole(hook: Callable[[nn.Module], object]):
    model, inputs = model_of("llama"), batch("llama")
    handle = hook(model)
    with deferred(model):
        assert run(model, inputs).deferred is None
        handle.remove()
        assert run(model, inputs).deferred is not None


def test_what_needs_the_output_makes_the_run_whole():
    model, inputs = model_of("llama"), batch("llama")
    with deferred(model):
        assert run(model, inputs, answers="logits").deferred is None
        assert run(model, inputs, keep=lambda output: output.logits.sum()).deferred is None
        assert run(model, {**inputs, "use_cache": True}).output.past_key_values is not None
        with intervene(model, Location(0), op=lambda base, source, generator: base):
            assert run(model, inputs).deferred is None
        with record(model, Location(0)):
            assert run(model, inputs).deferred is None
    with deferred(model, least=10**6):
        assert run(model, inputs).deferred is None
    assert run(model, inputs).deferred is None


def test_a_compiled_model_is_run_whole_as_it_was_compiled():
    model, inputs = model_of("llama"), batch("llama")
    model.compile(backend="eager")
    with deferred(model):
        assert run(model, inputs, resumable=False).deferred is None


def test_logits_of_other_weights_are_refused():
    model, inputs = model_of("llama"), batch("llama")
    with deferred(model):
        lazy = run(model, inputs)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(InterventionError, match="the run is older than the model"):
        _ = lazy.logits


def test_nothing_is_left_on_the_model():
    model, inputs = model_of("llama"), batch("llama")
    before = [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in model.modules()]
    with deferred(model):
        run(model, inputs)
    assert before == [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in model.modules()]
    assert isinstance(model(**inputs).logits, torch.Tensor)


@pytest.mark.parametrize("settings", [{"least": 0}, {"least": 1.5}, {"after": 3}], ids=str)
def test_settings_that_mean_nothing_are_refused(settings):
    model = model_of("llama")
    with pytest.raises(InterventionError, match="least a number of tokens above 0"), deferred(model, **settings):
        pass


@pytest.mark.parametrize(
    "after", [lambda logits: logits @ logits, lambda logits: logits[..., 1:]], ids=["raises", "cuts"]
)
def test_what_comes_after_the_head_is_a_function_entry_by_entry(after):
    model = model_of("llama")
    with deferred(model, after=after), pytest.raises(InterventionError, match="after=lambda logits: logits / 8"):
        _ = run(model, batch("llama")).logits


def test_a_head_of_another_model_is_refused():
    with (
        pytest.raises(InterventionError, match="is no part of this LlamaForCausalLM; give its last module"),
        deferring_head(model_of("llama"), nn.Linear(2, 2)),
    ):
        pass
