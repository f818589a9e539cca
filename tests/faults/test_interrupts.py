"""An interrupt at any line leaves nothing on the model, nor does a second one while the first ends the block."""

import copy
import random
import signal
from contextlib import suppress

import pytest
import torch

from interventions import Location, Zero, intervene
from interventions.hooks.installation import opened
from interventions.hooks.scopes import Scope
from interventions.hooks.taps import Tap
from interventions.models.architectures import architecture
from tests.interventions.tiny_models import answer, batch, make

from .interrupts import SUBJECTS, leftovers, lines_of, points, state

LATER = (1, 2, 3, 5, 8, 13, 34, 89)


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize(("lines", "followed"), [(12, 0), pytest.param(100, 5, marks=pytest.mark.full)])
def test_interrupts_leave_nothing_behind(name, lines, followed):
    """At many lines one alone, and at some of them a second one a little later."""
    model, block = SUBJECTS[name][0](), SUBJECTS[name][1]
    ran = lines_of(block, model)
    once = [(number,) for number in points(ran, lines)]
    twice = [(first, first + later) for first in points(ran, followed) for later in LATER] if followed else []
    assert [each for fatal in (*once, *twice) for each in leftovers(model, block, *fatal)] == []


@pytest.mark.parametrize("name", ["attention interface", "fused attention", "generate with steps"])
def test_a_second_interrupt_leaves_nothing_behind(name):
    model, block = SUBJECTS[name][0](), SUBJECTS[name][1]
    pairs = [(first, first + later) for first in points(lines_of(block, model), 4) for later in LATER[::2]]
    assert [each for pair in pairs for each in leftovers(model, block, *pair)] == []


@pytest.mark.parametrize("name", ["plain hooks", "attention interface", "generate with steps"])
def test_a_signal_at_any_moment_leaves_nothing_behind(name):
    """Also in frames of torch, transformers and contextlib, once the exception is gone. `no_grad` is torch's own."""

    def interrupt(*_):
        raise KeyboardInterrupt

    model, block = SUBJECTS[name][0](), SUBJECTS[name][1]
    block(model)
    before, draw, usual = state(model), random.Random(0), signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(40):
            torch.set_grad_enabled(True)
            with suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-4, 0.03))
                block(model)
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert {**state(model), "graded": True} == before
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)


@torch.no_grad()
def test_what_a_scope_that_is_gone_left_does_nothing():
    """As if all that ends a block had been cut off but its first line."""
    model, inputs = make("llama"), batch("llama")
    expected, before = answer(model, inputs), state(model)
    place = architecture(model).place(Location(1, "attention_pattern"))
    scope = Scope(model, [Tap.at(place, lambda state, scope: state * 0)])
    context = opened(scope)
    context.__enter__()
    assert not torch.equal(answer(model, inputs), expected)
    scope.users.clear()
    assert torch.equal(answer(model, inputs), expected)
    assert torch.equal(answer(copy.deepcopy(model), inputs), expected)
    with intervene(model, Location(1, "query"), op=Zero()):
        answer(model, inputs)
    assert torch.equal(answer(model, inputs), expected)
    context.__exit__(None, None, None)
    assert state(model) == before
