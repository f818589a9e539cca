"""Promise 2, for what happens inside attention and in generation: everything is as before, however a block is left."""

import pytest
import torch

from interventions import InterventionError, Zero, interchange, intervene, record, run
from interventions.locations import HEAD_SITES
from tests.interventions.tiny_models import answer, batch

from .attentions import KINDS, at, sites_of, traces

EVERY = [(kind, site) for kind in KINDS for site in sites_of(kind) if site in (*HEAD_SITES, "mlp_activation")]


def by_the_end(model, inputs, place):
    with intervene(model, place, op=Zero()), record(model, place):
        answer(model, inputs)


def by_an_interchange(model, inputs, place):
    interchange(model, run(model, inputs), batch("llama", 2), place)


def by_an_error_of_the_operator(model, inputs, place):
    with pytest.raises(ZeroDivisionError), intervene(model, place, op=lambda base, source, generator: 1 / 0):
        answer(model, inputs)


def by_an_interrupt_of_the_operator(model, inputs, place):
    def interrupted(base, source, generator):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), intervene(model, place, op=interrupted):
        answer(model, inputs)


def by_an_interrupt_of_the_model(model, inputs, place):
    def interrupted(*_):
        raise KeyboardInterrupt

    attention = (model.model.layers if hasattr(model, "model") else model.layers)[1].get_submodule(
        "self_attn.o_proj" if hasattr(model, "model") else "attention.o_proj"
    )
    with (
        attention.register_forward_pre_hook(interrupted),
        pytest.raises(KeyboardInterrupt),
        intervene(model, place, op=Zero()),
        record(model, place),
    ):
        answer(model, inputs)


def by_closing_a_generator(model, inputs, place):
    def answers():
        with intervene(model, place, op=Zero()):
            while True:
                yield answer(model, inputs)

    going = answers()
    next(going)
    going.close()


def by_never_running(model, inputs, place):
    with pytest.raises(InterventionError, match="never ran"), intervene(model, place, op=Zero()):
        pass


def by_another_shape(model, inputs, place):
    with (
        pytest.raises(InterventionError, match=r"operator <function .* returned"),
        intervene(model, place, op=lambda base, source, generator: base[..., :1]),
    ):
        answer(model, inputs)


def in_another_order(model, inputs, place):
    first, second, third = (intervene(model, place, op=Zero()) for _ in range(3))
    for block in (first, second, third):
        block.__enter__()
    answer(model, inputs)
    for block in (first, third, second):
        block.__exit__(None, None, None)


WAYS = [value for name, value in list(globals().items()) if name.startswith(("by_", "in_another"))]


@torch.no_grad()
@pytest.mark.parametrize("leave", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(("kind", "site"), EVERY)
def test_nothing_stays_behind(kind, site, leave):
    model, inputs = KINDS[kind](), batch("llama")
    expected, before = answer(model, inputs), traces(model)
    leave(model, inputs, at(site))
    assert traces(model) == before
    assert torch.equal(answer(model, inputs), expected)
