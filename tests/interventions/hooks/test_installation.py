"""What is done to the user's model: nothing stays behind, nobody else sees it, and it happens once."""

import sys
import threading
from contextlib import suppress
from functools import partial, wraps

import pytest
import torch
from torch import nn

from interventions import InterventionError, Location, Zero, interchange, intervene, record, run
from interventions.hooks.replacements import _replacements
from interventions.hooks.scopes import _open
from tests.interventions.tiny_models import OTHERS, TRANSFORMERS, answer, batch, make, places, trace


def leave_by_the_end(model: nn.Module, inputs: object) -> None:
    with intervene(model, places_of[id(model)], op=Zero()), record(model, places_of[id(model)]):
        answer(model, inputs)


def leave_by_an_interchange(model: nn.Module, inputs: object) -> None:
    interchange(model, run(model, inputs), inputs, places_of[id(model)])


def leave_by_an_error(model: nn.Module, inputs: object) -> None:
    with pytest.raises(ZeroDivisionError), intervene(model, places_of[id(model)], op=lambda b, s, g: 1 / 0):
        answer(model, inputs)


def leave_by_an_error_in_an_interchange(model: nn.Module, inputs: object) -> None:
    base = run(model, inputs)
    with pytest.raises(ZeroDivisionError):
        interchange(model, base, None, {places_of[id(model)]: lambda b, s, g: 1 / 0})


def leave_by_an_interrupt(model: nn.Module, inputs: object) -> None:
    def interrupted(base, source, generator):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), intervene(model, places_of[id(model)], op=interrupted):
        answer(model, inputs)


def leave_by_closing_a_generator(model: nn.Module, inputs: object) -> None:
    def answers():
        with intervene(model, places_of[id(model)], op=Zero()):
            while True:
                yield answer(model, inputs)

    going = answers()
    next(going)
    going.close()


def leave_by_never_running(model: nn.Module, inputs: object) -> None:
    with (
        pytest.raises(
            InterventionError, match=r"never ran inside this intervene block; call the model inside the block"
        ),
        intervene(model, places_of[id(model)], op=Zero()),
    ):
        pass


def leave_by_a_place_that_does_not_exist(model: nn.Module, inputs: object) -> None:
    with (
        pytest.raises(InterventionError, match=r"does not exist"),
        intervene(model, [places_of[id(model)], Location(module="no.such")], op=Zero()),
    ):
        pass


places_of: dict[int, Location] = {}
WAYS = [value for name, value in list(globals().items()) if name.startswith("leave_by")]


@pytest.mark.parametrize("leave", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", [*TRANSFORMERS, *OTHERS])
def test_nothing_stays_behind(name, leave):
    model, inputs = make(name), batch(name)
    next(iter(model.parameters())).requires_grad_(False)
    next(iter(model.children())).train()
    expected, before = answer(model.eval(), inputs), trace(model)
    places_of[id(model)] = places(name)[-1]
    leave(model, inputs)
    assert trace(model) == before
    assert torch.equal(answer(model, inputs), expected)
    assert _open.get() == ()
    assert not _replacements


def test_nothing_piles_up():
    model, inputs = nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2)
    before = trace(model)
    base = run(model, inputs)
    for _ in range(100):
        with intervene(model, module="0", op=Zero()):
            model(inputs)
        interchange(model, base, inputs, Location(module="0"))
    assert trace(model) == before
    assert not _replacements


def test_a_forward_of_the_instance_is_used_and_kept():
    model, inputs = make("gpt2"), batch("gpt2")
    calls = []
    for block in model.transformer.h:  # as accelerate does for offloading
        block.forward = partial(lambda old, *args, **kwargs: calls.append(1) or old(*args, **kwargs), block.forward)
    kept = [block.forward for block in model.transformer.h]
    base = run(model, inputs)
    done = interchange(model, base, batch("gpt2", seed=2), Location(1))
    assert len(calls) == 3 + 2 + 1
    assert [block.forward for block in model.transformer.h] == kept
    assert torch.equal(done.logits, interchange(model, inputs, batch("gpt2", seed=2), Location(1)).logits)


def test_accelerate_hooks_stay():
    accelerate = pytest.importorskip("accelerate")
    model, inputs, source = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    expected = interchange(model, inputs, source, Location(1)).logits
    model = accelerate.cpu_offload(model, execution_device="cpu")
    before = trace(model)
    with torch.no_grad():
        assert torch.equal(interchange(model, run(model, inputs), source, Location(1)).logits, expected)
    assert trace(model) == before


# --- order, nesting, contexts -----------------------------------------------------------------------------------------


def plus_one(base, source, generator):
    return base + 1


def double(base, source, generator):
    return base * 2


@pytest.mark.parametrize("io", ["output", "input"])
def test_the_outer_block_writes_first(io):
    model, place = make("mlp"), Location(module="2", io=io)
    with record(model, place) as plain:
        model(batch("mlp"))
    with intervene(model, place, op=plus_one), intervene(model, place, op=double), record(model, place) as states:
        model(batch("mlp"))
    assert torch.equal(states[place], (plain[place] + 1) * 2)


def test_hooks_of_the_user_come_first_and_are_seen():
    model, place = make("mlp"), Location(module="2")
    plain = run(model, batch("mlp")).activations[place]
    with model[2].register_forward_hook(lambda module, args, output: output + 1):
        assert torch.equal(run(model, batch("mlp"), place).activations[place], plain + 1)
        with intervene(model, place, op=double), record(model, place) as states:
            model(batch("mlp"))
    assert torch.equal(states[place], (plain + 1) * 2)


def test_a_run_inside_a_block_sees_it():
    model, inputs, source = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    outside, place = run(model, inputs), Location(1)
    with intervene(model, layer=0, op=Zero()):
        inside = run(model, inputs)
        assert torch.equal(inside.logits, answer(model, inputs))
        whole = interchange(model, inputs, source, place, resume=False)
        for base in (inside, outside):
            assert torch.equal(interchange(model, base, source, place).logits, whole.logits)
    assert not torch.equal(inside.logits, outside.logits)


def test_an_operator_may_call_the_model():
    model, inputs, place = make("gpt2"), batch("gpt2"), Location(1)
    other = run(model, batch("gpt2", seed=2)).activations[place]
    inner = []

    def fetched(base, source, generator):
        if not inner:
            inner.append(None)
            inner[0] = run(model, batch("gpt2", seed=2), place).activations[place]
        return other

    with intervene(model, place, op=fetched) as handle, record(model, place) as states:
        logits = answer(model, inputs)
    assert torch.equal(logits, interchange(model, inputs, batch("gpt2", seed=2), place).logits)
    assert torch.equal(states.calls(place)[-1], other)
    assert handle.firings == {place: 2}


def test_positions_are_known_again_after_the_model_was_called_inside_an_operator():
    model, inputs, place = make("gpt2"), batch("gpt2"), Location(2)
    other = {**batch("gpt2", seed=2, length=7)}

    def calls(base, source, generator):
        if base.shape[1] == 5:
            answer(model, other)
        return base

    base = run(model, inputs).activations[place]
    with (
        intervene(model, Location(0), op=calls),
        intervene(model, place, op=Zero(), positions=-1),
        record(model, place) as states,
    ):
        answer(model, inputs)
    assert torch.equal(states.calls(place)[-1][:, :-1], base[:, :-1])
    assert not states.calls(place)[-1][:, -1].any()


@pytest.fixture
def hasty_threads():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("hasty_threads")
def test_threads_see_only_their_own():
    model, errors = make("gpt2"), []
    inputs = {seed: batch("gpt2", seed) for seed in (1, 2)}
    source, at = batch("gpt2", seed=3), {1: Location(0), 2: Location(1, dims=range(8))}
    with torch.no_grad():
        plain = answer(model, inputs[1])
        expected = {seed: interchange(model, inputs[seed], source, at[seed]).logits for seed in (1, 2)}
        before, wrong = trace(model), []
        barrier = threading.Barrier(3)

    @torch.no_grad()
    def work(seed: int) -> None:
        try:
            base = run(model, inputs[seed])
            for _ in range(15):
                barrier.wait(timeout=60)
                done = interchange(model, base, source, at[seed])
                with intervene(model, layer=2, op=Zero()) as handle:
                    answer(model, inputs[seed])
                if not torch.equal(done.logits, expected[seed]) or handle.firings != {Location(2): 1}:
                    wrong.append(seed)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    with torch.no_grad():
        for _ in range(15):
            with suppress(threading.BrokenBarrierError):
                barrier.wait(timeout=60)
            if not torch.equal(answer(model, inputs[1]), plain):
                wrong.append(0)
    for thread in threads:
        thread.join()
    assert errors == wrong == []
    assert trace(model) == before
    assert not _replacements


# --- compiled, in other modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", [Location(1), Location(module="transformer.h.1.mlp"), Location(module="transformer.wte")], ids=str
)
def test_compiled_blocks_are_written(place):
    model, inputs = make("gpt2"), batch("gpt2")
    with torch.no_grad():
        expected = interchange(model, inputs, None, {place: Zero()}).logits
        for block in model.transformer.h:
            block.compile(backend="eager")
        answer(model, inputs)
        before = trace(model)
        with intervene(model, place, op=Zero()):
            assert torch.equal(answer(model, inputs), expected)
        assert torch.equal(interchange(model, run(model, inputs), None, {place: Zero()}).logits, expected)
    assert trace(model) == before
    assert all(block._compiled_call_impl is not None for block in model.transformer.h)


def _compiled(module: nn.Module, **settings) -> None:
    module.forward = torch.compile(module.forward, backend="eager", **settings)


def _compiled_in_its_class(module: nn.Module) -> None:
    kind = type(module)
    forward = torch.compile(kind.forward, backend="eager")
    module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


COMPILED = {
    "forward of the model": lambda model: _compiled(model),
    "as one graph": lambda model: _compiled(model, fullgraph=True),
    "forward of each block": lambda model: [_compiled(block) for block in model.transformer.h],
    "forward of what attends": lambda model: [_compiled(block.attn) for block in model.transformer.h],
    "forward of a class": lambda model: _compiled_in_its_class(model.transformer.h[1].attn),
}


@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("site", ["block_output", "attention_pattern", "mlp_activation"])
def test_a_compiled_forward_runs_as_it_was_written(how, site):
    model, inputs, place = make("gpt2"), batch("gpt2"), Location(1, site)
    with torch.no_grad():
        expected = interchange(model, inputs, None, {place: Zero()}).logits
        COMPILED[how](model)
        before = trace(model)
        with intervene(model, place, op=Zero()):
            assert torch.equal(answer(model, inputs), expected)
        assert torch.equal(interchange(model, run(model, inputs), None, {place: Zero()}).logits, expected)
        assert torch.equal(
            run(model, inputs, place).activations[place], run(make("gpt2"), inputs, place).activations[place]
        )
    assert trace(model) == before
    assert not _replacements


def test_what_is_wrapped_around_a_compiled_forward_still_runs():
    model, inputs = make("mlp"), batch("mlp")
    inner = torch.compile(model.forward, backend="eager")

    @wraps(inner)  # as accelerate does, which copies all attributes
    def forward(*args):
        return inner(*args) + 1

    expected = model(inputs) + 1
    model.forward = forward
    assert torch.equal(run(model, inputs).logits, expected)


def test_compiled_blocks_in_a_list_are_named():
    model = make("gpt2")
    for number, block in enumerate(model.transformer.h):
        model.transformer.h[number] = torch.compile(block, backend="eager")
    with pytest.raises(
        InterventionError,
        match=r"transformer\.h\.0 went through torch\.compile\(module\); .* transformer\.h\[0\]\.compile\(\)",
    ):
        run(model, batch("gpt2"), Location(1))


def test_a_compiled_model_raises():
    model = make("mlp")
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(
        InterventionError, match=r"the model went through torch\.compile\(module\).*pass .* model\._orig_mod"
    ):
        run(compiled, batch("mlp"))
    outer = nn.Sequential(nn.Linear(6, 6), compiled)
    with (
        pytest.raises(InterventionError, match=r"1 went through torch\.compile\(module\)"),
        intervene(outer, module="1._orig_mod.2", op=Zero()),
    ):
        pass
    with intervene(outer, module="0", op=Zero()) as handle:
        outer(batch("mlp"))
    assert handle.firings == {Location(module="0"): 1}


@pytest.mark.parametrize("name", [*TRANSFORMERS, *OTHERS])
def test_inference_mode_and_autocast(name):
    model, inputs = make(name), batch(name)
    place = places(name)[-2]
    with torch.inference_mode():
        assert torch.equal(interchange(model, run(model, inputs), inputs, place).logits, answer(model, inputs))
    with torch.autocast("cpu", torch.bfloat16):
        try:
            plain = answer(model, inputs)
        except RuntimeError as error:  # of the plain model: some processors have no LSTM in bfloat16
            if "primitive descriptor" not in str(error):
                raise
            pytest.skip(f"torch itself: {error}")
        assert torch.equal(interchange(model, run(model, inputs), inputs, place).logits, plain)


def test_peft_models_are_written_and_resume():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    inputs, source = batch("llama"), batch("llama", seed=2)
    base = run(model, inputs)
    whole = interchange(model, inputs, source, Location(1), positions=-1)
    assert torch.equal(interchange(model, base, source, Location(1), positions=-1).logits, whole.logits)
    assert not torch.equal(whole.logits, base.logits)


@torch.no_grad()
def test_hidden_states_that_the_model_returns_see_what_is_written():
    """transformers leaves hooks that note them on a model that once returned them, ahead of ours."""
    for name in ("vit", "llama"):
        model, inputs = make(name), batch(name)
        plain = model(**inputs, output_hidden_states=True).hidden_states
        before = trace(model)
        for place, index in ((Location(1), 2), (Location(1, "attention_heads"), 2)):
            with intervene(model, place, op=Zero()):
                found = model(**inputs, output_hidden_states=True).hidden_states
                kept = run(model, inputs).activations[Location(1)]
            assert torch.equal(found[index], kept)
            assert not torch.equal(found[index], plain[index])
        assert trace(model) == before


def test_the_change_is_that_of_what_is_written():
    model, inputs = make("llama"), batch("llama")
    for place, positions in (
        (Location(1), -1),
        (Location(1, "attention_heads", heads=0), None),
        (Location(1, dims=3), 1),
    ):
        with intervene(model, place, op=Zero(), positions=positions) as handle:
            model(**inputs)
        assert handle.change[place] == pytest.approx(1.0)
        assert repr(handle) == f"Handle({place}: written 1 times, change 1)"
