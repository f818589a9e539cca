# ruff: noqa: SIM117 (a traced block stands by itself, as users write it)
"""What holds around traces of the user's own: nothing stays behind, and what else stands on the model keeps working.

Each function here is a check, run where nnsight is (`nnsight_side`); the tests tell which of them failed, and how.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from interventions import (
    Add,
    Interpolate,
    InterventionError,
    Location,
    Swap,
    Zero,
    interchange,
    intervene,
    record,
    run,
)
from tests.interventions.tiny_models import batch, trace
from tests.interventions.tracing.programs import doubled, site, vector
from tests.interventions.tracing.subjects import Subject, loaded, made, plain, tokenizer, wrapped

Check = Callable[[], None]
WIDTH = 16


@contextmanager
def raising(kind: type[BaseException], text: str = "") -> Iterator[None]:
    """As `pytest.raises`, which need not be there."""
    raised = None
    try:
        yield
    except kind as error:
        raised = error
    assert raised is not None, f"no {kind.__name__} was raised"
    assert text in str(raised), f"{raised} does not say: {text}"


def equal(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape, (a.shape, b.shape)
    assert torch.equal(a, b), f"apart by {(a - b).abs().max()}"


def left_on(subject: Subject) -> list:
    """All that an intervention might leave behind."""
    from interventions.tracing.edits import OpenBlocks, _opened
    from interventions.tracing.operations import opened_modules

    opened = _opened.get(subject.model, OpenBlocks())
    return [
        trace(subject.net),
        list(subject.model._edits),
        list(opened_modules(subject.model)),
        [*opened.blocks, *opened.edits],
        subject.model.interleaver.interleaving,
        torch._C._len_torch_function_stack(),
        torch.is_grad_enabled(),
        [parameter.grad is None for parameter in subject.net.parameters()],
    ]


# Ways to leave a block -----------------------------------------------------------------------------------------------


def by_the_end(subject: Subject, at: Location) -> None:
    with intervene(subject.model, at, op=Zero()), record(subject.model, [at]):
        subject.call(subject.base)


def by_an_error_before_the_trace(subject: Subject, at: Location) -> None:
    with raising(ZeroDivisionError), intervene(subject.model, at, op=Zero()), record(subject.model, [at]):
        raise ZeroDivisionError


def by_an_error_in_the_trace(subject: Subject, at: Location) -> None:
    model, given = subject.model, subject.base
    with raising(ZeroDivisionError), intervene(model, at, op=Zero()), record(model, [at]), model.trace(**given):
        model.output.save()
        1 / 0  # noqa: B018


def by_an_error_after_the_trace(subject: Subject, at: Location) -> None:
    with raising(KeyboardInterrupt), intervene(subject.model, at, op=Zero()):
        subject.call(subject.base)
        raise KeyboardInterrupt


def by_an_error_of_the_operator(subject: Subject, at: Location) -> None:
    with raising(ZeroDivisionError), intervene(subject.model, at, op=lambda base, source, generator: 1 / 0):
        subject.call(subject.base)
    with raising(ZeroDivisionError):
        interchange(subject.model, subject.base, None, at, op=lambda base, source, generator: 1 / 0)


def by_an_interrupt_of_the_operator(subject: Subject, at: Location) -> None:
    def interrupted(base: Tensor, source: Any, generator: Any) -> Tensor:
        raise KeyboardInterrupt

    with raising(KeyboardInterrupt), intervene(subject.model, at, op=interrupted):
        subject.call(subject.base)


def by_an_error_of_the_model(subject: Subject, at: Location) -> None:
    def broken(*_: Any) -> None:
        raise MemoryError

    last = list(subject.net.children())[-1]
    with last.register_forward_pre_hook(broken):
        with raising(MemoryError), intervene(subject.model, at, op=Zero()), record(subject.model, [at]):
            subject.call(subject.base)
        with raising(MemoryError):
            run(subject.model, subject.base, [at])


def by_stopping(subject: Subject, at: Location) -> None:
    model, given = subject.model, subject.base
    last = list(model.modules())[-1]
    with intervene(model, at, op=Zero()) as handle, record(model, [at]) as activations:
        with model.trace(**given) as tracer:
            last.output.save()
            tracer.stop()
    assert handle.firings == {at: 1}
    assert not activations[at].any() or at.site == "attention_scores"


def by_stopping_too_early(subject: Subject, at: Location) -> None:
    model, given = subject.model, subject.base
    first = model.encoder.embed_tokens if subject.name == "t5" else embedding(subject)
    with raising(InterventionError, "never ran"), intervene(model, at, op=Zero()), model.trace(**given) as tracer:
        first.output.save()
        tracer.stop()


def embedding(subject: Subject) -> Any:
    return next(each for each in subject.model.modules() if isinstance(each._module, torch.nn.Embedding))


def by_never_running(subject: Subject, at: Location) -> None:
    with raising(InterventionError, "never ran inside this intervene block; open a trace of the model"):
        with intervene(subject.model, at, op=Zero()):
            pass


def by_another_shape(subject: Subject, at: Location) -> None:
    with (
        raising(InterventionError, "returned"),
        intervene(subject.model, at, op=lambda base, source, draw: base[..., :1]),
    ):
        subject.call(subject.base)


def by_closing_a_generator(subject: Subject, at: Location) -> None:
    def answers() -> Iterator[Tensor]:
        with intervene(subject.model, at, op=Zero()):
            while True:
                yield subject.call(subject.base)

    going = answers()
    next(going)
    going.close()


def by_an_interchange(subject: Subject, at: Location) -> None:
    interchange(subject.model, run(subject.model, subject.base), subject.source, at)


def in_another_order(subject: Subject, at: Location) -> None:
    first, second, third = (intervene(subject.model, at, op=Zero()) for _ in range(3))
    for block in (first, second, third):
        block.__enter__()
    subject.call(subject.base)
    for block in (first, third, second):
        block.__exit__(None, None, None)


WAYS = [function for name, function in list(globals().items()) if name.startswith(("by_", "in_another"))]
PLACES = {
    "gpt2": (
        Location(1),
        site("query", heads=1),
        site("attention_pattern"),
        Location(1, operation="mlp.self_act_0"),
        Location(1, operation="attn.attention_interface_1.torch_nn_functional_scaled_dot_product_attention_0"),
    ),
    "own": (site("attention_pattern"), Location(1, operation="attention.functional_softmax_0")),
    "sdpa": (site("key"),),
    "t5": (Location(0, "value", stack="encoder"),),
}


def leaving(way: Callable[[Subject, Location], None], name: str, at: Location) -> None:
    """Afterwards all is as before, and the model computes the same, traced and plain."""
    subject = wrapped(name)
    expected, before = plain(name).call(subject.base), left_on(subject)
    assert before[1] == before[2] == [], "what is left behind already would not be noticed"
    torch.manual_seed(3)
    way(subject, at)
    equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(3)))
    for after, each in zip(left_on(subject), before, strict=True):
        assert after == each, (after, each)
    equal(subject.call(subject.base), expected)
    equal(Subject(name, subject.net, subject.net, {}).call(subject.base), expected)


# What else is on the model -------------------------------------------------------------------------------------------


def block(subject: Subject, layer: int) -> Any:
    return subject.model.transformer.h[layer]


def the_user_sees_what_was_written() -> None:
    subject, (at, part) = wrapped("gpt2"), (Location(1), site("attention_heads"))
    model, given, inner = subject.model, subject.base, block(subject, 1)
    with intervene(model, {at: doubled, part: Zero()}), record(model, [at, part]) as activations:
        with model.trace(**given):
            heads = inner.attn.c_proj.input.save()
            seen = inner.output.save()
    equal(seen, activations[at])
    assert not heads.any()
    assert not activations[part].any()
    with intervene(plain("gpt2").model, {at: doubled, part: Zero()}), record(plain("gpt2").model, [at]) as expected:
        plain("gpt2").call(given)
    equal(seen, expected[at])


def the_user_writes_after_the_block() -> None:
    subject = wrapped("gpt2")
    model, given, inner = subject.model, subject.base, block(subject, 1)
    with intervene(model, layer=1, op=doubled), model.trace(**given):
        inner.output = inner.output - 1
        logits = model.output.logits.save()
    with intervene(plain("gpt2").model, layer=1, op=lambda base, source, draw: base * 2 + 0.5 - 1):
        equal(logits, plain("gpt2").call(given))


def hooks_of_the_user_keep_working() -> None:
    subject, seen = wrapped("gpt2"), []
    with subject.net.transformer.h[1].register_forward_hook(lambda module, args, output: seen.append(output)):
        with intervene(subject.model, layer=0, op=Zero()), record(subject.model, [Location(1)]) as activations:
            subject.call(subject.base)
        run(subject.model, subject.base, [Location(2)])
    assert len(seen) == 2
    equal(seen[0], activations[Location(1)])


def edits_of_the_user_stay() -> None:
    subject = wrapped("gpt2")
    model, inner = subject.model, block(subject, 0).mlp
    try:
        with model.edit(inplace=True):
            inner.output = inner.output * 0.5
        mine = list(model._edits)
        with intervene(model, Location(0, "mlp_output"), op=doubled, positions=-1) as handle:
            written = subject.call(subject.base)
            equal(run(model, subject.base, [Location(1)]).logits, written)
        assert handle.firings == {Location(0, "mlp_output"): 2}
        assert [id(edit) for edit in model._edits] == [id(edit) for edit in mine]
        halved = interchange(model, subject.base, subject.source, Location(1, "mlp_output"), positions=0).logits
    finally:
        model.clear_edits()
    at, whole = Location(0, "mlp_output"), plain("gpt2")
    with intervene(whole.model, module="transformer.h.0.mlp", op=lambda base, source, draw: base * 0.5):
        equal(halved, interchange(whole.model, whole.base, whole.source, Location(1, "mlp_output"), positions=0).logits)
        with intervene(whole.model, at, op=doubled, positions=-1):
            equal(written, whole.call(whole.base))
    equal(subject.call(subject.base), whole.call(whole.base))


def edits_made_inside_a_block_stay() -> None:
    subject = wrapped("gpt2")
    model, inner = subject.model, block(subject, 0).mlp
    try:
        with intervene(model, layer=1, op=Zero(), positions=0):
            with model.edit(inplace=True):
                inner.output = inner.output * 0.5
            subject.call(subject.base)
        assert len(model._edits) == 1
        halved = subject.call(subject.base)
    finally:
        model.clear_edits()
    with intervene(plain("gpt2").model, module="transformer.h.0.mlp", op=lambda base, source, draw: base * 0.5):
        equal(halved, plain("gpt2").call(subject.base))


def clearing_edits_inside_a_block_is_no_harm() -> None:
    """What stands on the model is then gone, and says so."""
    subject = wrapped("gpt2")
    with raising(InterventionError, "never ran"), intervene(subject.model, layer=1, op=Zero()):
        subject.model.clear_edits()
        subject.call(subject.base)
    assert not subject.model._edits


def an_edited_view_is_a_model_too() -> None:
    subject = wrapped("gpt2")
    with subject.model.edit() as (_, edited):
        edited.transformer.h[0].mlp.output = edited.transformer.h[0].mlp.output * 0.5
    given = subject.base
    with intervene(edited, layer=1, op=doubled):
        with edited.trace(**given):
            logits = edited.output.logits.save()
        alone = subject.call(given)
    whole = plain("gpt2")
    equal(alone, whole.call(given))
    with intervene(whole.model, {Location(module="transformer.h.0.mlp"): lambda base, source, draw: base * 0.5,
                                 Location(1): doubled}):  # fmt: skip
        equal(logits, whole.call(given))


def batches_of_invokes() -> None:
    """The block counts the rows of all of them; each invoke sees its own."""
    subject, whole = loaded("gpt2"), plain("gpt2")
    model, inner, (a, b) = subject.model, block(subject, 1), (subject.base, subject.source)
    together = {key: torch.cat([a[key], b[key]]) for key in a}
    ways: list[dict] = [{}, {"remote": "local"}]
    for elsewhere in ways:
        with intervene(model, layer=1, op=Interpolate(0.5), source=together, positions=[0, -1]):
            with model.trace(**elsewhere) as tracer:
                with tracer.invoke(**a):
                    seen = inner.output.save()
                    first = model.output.logits.save()
                with tracer.invoke(**b):
                    second = model.output.logits.save()
        with (
            intervene(whole.model, layer=1, op=Interpolate(0.5), source=together, positions=[0, -1]),
            record(whole.model, [Location(1)]) as activations,
        ):
            expected = whole.call(together)
        equal(torch.cat([first, second]), expected)
        equal(seen, activations[Location(1)][: len(seen)])


def several_traces_in_a_session() -> None:
    for subject, elsewhere in ((wrapped("gpt2"), {}), (loaded("gpt2"), {"remote": "local"})):
        model, given, others, inner = subject.model, subject.base, subject.source, block(subject, 0)
        with intervene(model, layer=1, op=doubled), model.session(**elsewhere):
            with model.trace(**given):
                state = inner.output
                first = model.output.logits.save()
            with model.trace(**others):
                inner.output = state
                second = model.output.logits.save()
        whole = plain("gpt2")
        with intervene(whole.model, layer=1, op=doubled):
            equal(first, whole.call(given))
        equal(second, first)


def steps_of_the_users_own() -> None:
    """`tracer.iter` goes on beside the block."""
    subject, whole = loaded("gpt2"), plain("gpt2")
    model, given, inner = subject.model, subject.base, block(subject, 1)
    with intervene(model, layer=1, op=doubled, steps=[1, 2]):
        with model.generate(**given, max_new_tokens=4, do_sample=False) as tracer:
            seen = list().save()
            for _ in tracer.iter[:]:
                seen.append(inner.output)
    with (
        intervene(whole.model, layer=1, op=doubled, steps=[1, 2]),
        record(whole.model, [Location(1)]) as activations,
    ):
        whole.net.generate(**given, max_new_tokens=4, do_sample=False)
    expected = activations.calls(Location(1))
    assert len(seen) == len(expected) == 4
    for mine, its in zip(seen, expected, strict=True):
        equal(mine, its)


def gradients_in_the_trace() -> None:
    subject, whole = wrapped("gpt2"), plain("gpt2")
    model, given, inner = subject.model, subject.base, block(subject, 0)
    with intervene(model, layer=1, op=doubled, positions=-1), model.trace(**given):
        state = inner.output
        loss = model.output.logits.square().mean()
        with loss.backward():
            slope = state.grad.save()
    subject.net.zero_grad(set_to_none=True)
    with intervene(whole.model, layer=1, op=doubled, positions=-1), record(whole.model, [Location(0)]) as activations:
        loss = whole.call(given).square().mean()
    equal(slope, torch.autograd.grad(loss, activations[Location(0)])[0])


def a_hand_written_trace_says_the_same() -> None:
    """At the router of a mixture of experts, before its softmax."""
    subject = wrapped("mixtral")
    model, given, others = subject.model, subject.base, subject.source
    gate = model.model.layers[1].mlp.gate
    at = Location(1, operation="mlp.gate.router_logits_0")
    with model.trace(**others):
        theirs = gate.source.router_logits_0.output.save()
    with model.trace(**given):
        gate.source.router_logits_0.output = theirs
        expected = model.output.logits.save()
    swapped = interchange(model, given, others, at, record=[at])
    equal(swapped.logits, expected)
    equal(swapped.activations[at].flatten(0, 1), theirs)
    assert not torch.equal(expected, subject.call(given))
    one = interchange(model, given, others, at, positions=2, record=[at]).activations[at]
    equal(one[:, 2], theirs.view(*one.shape)[:, 2])
    equal(one[:, [0, 1, 3, 4]], run(model, given, [at]).activations[at][:, [0, 1, 3, 4]])


def named(tokens: Any) -> dict[str, Tensor]:
    """As nnsight passes a padded text on."""
    return {**tokens, "position_ids": (tokens["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def text_is_tokenised_as_the_model_does() -> None:
    subject = loaded("gpt2")
    model, texts, others = subject.model, ["w1 w2 w3 w4", "w5 w6"], ["w7 w8 w9", "w3 w2 w1 w4"]
    base, source = (named(model.tokenizer(each, return_tensors="pt", padding=True, padding_side="left"))
                    for each in (texts, others))  # fmt: skip
    whole = plain("gpt2").model
    expected = interchange(whole, base, source, Location(1), positions=-1).logits
    equal(interchange(model, texts, others, Location(1), positions=-1).logits, expected)
    equal(interchange(model, texts, others, Location(1), positions=-1, remote="local").logits, expected)
    with intervene(model, layer=1, op=Swap(), source=others, positions=-1), model.trace(texts):
        logits = model.output.logits.save()
    equal(logits, expected)
    equal(run(model, "w1 w2", [Location(2)]).activations[Location(2)],
          run(whole, {"input_ids": torch.tensor([[1, 2]])}, [Location(2)]).activations[Location(2)])  # fmt: skip


def a_model_that_was_not_loaded_yet() -> None:
    """Known by its path alone; whatever is asked first."""
    from nnsight import TransformersModel

    given, others = batch("gpt2", 1), batch("gpt2", 2)
    net = made("gpt2")

    def by_a_run(model: Any) -> Tensor:
        return run(model, given, [Location(1)]).logits

    def by_a_swap(model: Any) -> Tensor:
        return interchange(model, given, others, site("query", heads=1), positions=0).logits

    def by_a_block(model: Any) -> Tensor:
        with intervene(model, layer=1, op=Add(vector(WIDTH))):
            if model is net:
                return model(**given).logits
            with model.trace(**given):
                logits = model.output.logits.save()
        return logits

    def by_an_operation(model: Any) -> Tensor:
        at = site("mlp_activation") if model is net else Location(1, operation="mlp.self_act_0")
        return interchange(model, given, others, at, positions=0).logits

    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(folder)
        for first in (by_a_run, by_a_swap, by_a_block, by_an_operation):
            equal(first(TransformersModel(folder, task="text-generation", tokenizer=tokenizer())), first(net))


# What is refused -----------------------------------------------------------------------------------------------------


def no_block_begins_inside_a_trace() -> None:
    subject = wrapped("gpt2")
    model, given = subject.model, subject.base
    before = left_on(subject)
    with raising(InterventionError, "a trace of this model is running"), model.trace(**given):
        with intervene(model, layer=1, op=Zero()):
            model.output.save()
    assert left_on(subject) == before


def a_wrapped_module_has_no_other_machine() -> None:
    subject = wrapped("gpt2")
    for verb in (
        lambda: run(subject.model, subject.base, remote="local"),
        lambda: interchange(subject.model, subject.base, subject.source, Location(1), remote="local"),
    ):
        with raising(InterventionError, "needs a model that another machine has too"):
            verb()


def what_is_recorded_stays_here() -> None:
    subject = loaded("gpt2")
    model, given = subject.model, subject.base
    with raising(InterventionError, "leaves the activations of a record block there"), record(model, [Location(1)]):
        with model.trace(**given, remote="local"):
            model.output.logits.save()


def an_unknown_operation() -> None:
    subject = wrapped("gpt2")
    before = left_on(subject)
    for at, text in (
        (Location(1, operation="mlp.self_akt_0"), "has no operation 'self_akt_0'; did you mean"),
        (Location(1, operation="nope_0"), "has no operation 'nope_0'"),
        (Location(module="transformer.h.1.mlp", operation="nope_0"), "has no operation 'nope_0'"),
        (Location(1, operation="attn.attention_interface_1.nope_0"), "has no operation 'nope_0'"),
        (Location(1, operation="mlp.c_fc"), "names the module"),
        (Location(1, operation="attn.self_q_attn_0"), "never ran"),
    ):
        with raising(InterventionError, text), intervene(subject.model, at, op=Zero()):
            subject.call(subject.base)
        with raising(InterventionError, text):
            run(subject.model, subject.base, [at])
        assert left_on(subject) == before, at
    with raising(InterventionError, "which hooks cannot open and nnsight does"):
        run(plain("gpt2").model, subject.base, [Location(1, operation="mlp.self_act_0")])


def errors_name_the_place_when_elsewhere() -> None:
    subject = loaded("gpt2")
    model, given = subject.model, subject.base
    with raising(InterventionError, "block_output.1[dims=99] names dim 99 and the width there is 16"):
        interchange(model, given, subject.source, Location(1, dims=[99]), remote="local")
    with raising(InterventionError, "names head 7"), intervene(model, site("query", heads=7), op=Zero()):
        with model.trace(**given, remote="local"):
            model.output.logits.save()
    at = Location(1, operation="attn.self_q_attn_0")
    with raising(InterventionError, "never ran"), intervene(model, at, op=Zero()):
        with model.trace(**given, remote="local"):
            model.output.logits.save()
    assert not model._edits


LOOSE = [
    the_user_sees_what_was_written,
    the_user_writes_after_the_block,
    hooks_of_the_user_keep_working,
    edits_of_the_user_stay,
    edits_made_inside_a_block_stay,
    clearing_edits_inside_a_block_is_no_harm,
    an_edited_view_is_a_model_too,
    batches_of_invokes,
    several_traces_in_a_session,
    steps_of_the_users_own,
    gradients_in_the_trace,
    a_hand_written_trace_says_the_same,
    text_is_tokenised_as_the_model_does,
    a_model_that_was_not_loaded_yet,
    no_block_begins_inside_a_trace,
    a_wrapped_module_has_no_other_machine,
    what_is_recorded_stays_here,
    an_unknown_operation,
    errors_name_the_place_when_elsewhere,
]
CHECKS: dict[str, Check] = {check.__name__: check for check in LOOSE}
CHECKS |= {
    f"left {way.__name__}: {name} {at}": lambda way=way, name=name, at=at: leaving(way, name, at)
    for way in WAYS
    for name, places in PLACES.items()
    for at in places
}
