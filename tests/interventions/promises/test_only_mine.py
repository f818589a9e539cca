"""Promise 4 inside attention and in generation: threads, tasks and contexts do not see each other's interventions."""

import asyncio
import contextvars
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from interventions import Add, Zero, interchange, intervene
from tests.interventions.tiny_models import answer, batch, make

from .attentions import KINDS, at, traces

PUSH = Add(torch.tensor(1.5))
SETTINGS = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)


@pytest.fixture
def hasty_threads():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(*works) -> list:
    """What each function returns, run at the same time without autograd."""
    barrier = threading.Barrier(len(works), timeout=60)

    @torch.no_grad()
    def started(work):
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(started, work) for work in works]]


@torch.no_grad()
@pytest.mark.usefixtures("hasty_threads")
@pytest.mark.parametrize("kind", KINDS)
def test_threads_at_one_attention(kind):
    """Fails if the override of the interface, or of `forward`, asks anything but the context."""
    model, inputs = KINDS[kind](), batch("llama")
    before, plain = traces(model), answer(model, inputs)
    sites = ("attention_scores", "attention_heads")
    expected = {site: interchange(model, inputs, None, {at(site): PUSH}).logits for site in sites}

    def writing(site):
        answers = []
        for _ in range(20):
            with intervene(model, at(site), op=PUSH) as handle:
                answers.append(torch.equal(answer(model, inputs), expected[site]) and handle.firings == {at(site): 1})
        return all(answers)

    def ordinary():
        return all(torch.equal(answer(model, inputs), plain) for _ in range(40))

    assert in_threads(lambda: writing(sites[0]), lambda: writing(sites[1]), ordinary) == [True] * 3
    assert traces(model) == before


@torch.no_grad()
@pytest.mark.usefixtures("hasty_threads")
def test_generations_in_two_threads():
    model, inputs = make("llama"), batch("llama")
    chosen = {"first": (at("key"), 0), "later": (at("block_output"), slice(1, None))}

    def writing(name):
        place, steps = chosen[name]
        with intervene(model, place, op=PUSH, steps=steps):
            return model.generate(**inputs, **SETTINGS)

    before, plain = traces(model), model.generate(**inputs, **SETTINGS)
    expected = {name: writing(name) for name in chosen}
    assert not torch.equal(expected["first"], expected["later"])
    for _ in range(3):
        first, later, ordinary = in_threads(
            lambda: writing("first"), lambda: writing("later"), lambda: model.generate(**inputs, **SETTINGS)
        )
        assert torch.equal(first, expected["first"])
        assert torch.equal(later, expected["later"])
        assert torch.equal(ordinary, plain)
    assert traces(model) == before


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_thread_inherits_nothing(kind):
    model, inputs = KINDS[kind](), batch("llama")
    plain = answer(model, inputs)
    with intervene(model, at("attention_heads"), op=Zero()):
        (found,) = in_threads(lambda: answer(model, inputs))
        assert not torch.equal(answer(model, inputs), plain)
    assert torch.equal(found, plain)


def test_tasks_take_turns():
    model, inputs = make("llama"), batch("llama")
    expected = {site: interchange(model, inputs, None, {at(site): Zero()}).logits for site in ("query", "value")}
    plain = answer(model, inputs)

    async def task(site):
        answers = []
        with intervene(model, at(site), op=Zero()):
            for _ in range(3):
                await asyncio.sleep(0)
                answers.append(answer(model, inputs))
        await asyncio.sleep(0)
        return all(torch.equal(found, expected[site]) for found in answers) and torch.equal(
            answer(model, inputs), plain
        )

    async def both():
        return await asyncio.gather(task("query"), task("value"))

    assert asyncio.run(both()) == [True, True]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_context_sees_the_block_while_it_is_open(kind):
    model, inputs = KINDS[kind](), batch("llama")
    plain = answer(model, inputs)
    with intervene(model, at("attention_heads"), op=Zero()):
        context, inside = contextvars.copy_context(), answer(model, inputs)
        assert torch.equal(context.run(answer, model, inputs), inside)
    assert torch.equal(context.run(answer, model, inputs), plain)


def neutral(base, source, generator):
    return base.clone()


@torch.no_grad()
@pytest.mark.parametrize("where", ["there", "in another context"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_context_forgets_the_block_when_it_is_closed(kind, where):
    """As a task does that was made inside a block and goes on after it."""
    model, inputs, place = KINDS[kind](), batch("llama"), at("attention_pattern")
    plain = answer(model, inputs)
    with intervene(model, place, op=Zero()):
        context = contextvars.copy_context()
        answer(model, inputs)

    def later():
        with intervene(model, place, op=neutral):
            return answer(model, inputs)

    if where == "there":
        found = context.run(later)
    else:
        with intervene(model, place, op=neutral):
            answer(model, inputs)
            found = context.run(answer, model, inputs)
    assert torch.allclose(found, plain, atol=1e-5)  # patterns are those of eager attention


@torch.no_grad()
def test_a_generator_closed_in_another_context():
    model, inputs, place = make("llama"), batch("llama"), at("attention_heads")
    plain = answer(model, inputs)

    def answers():
        with intervene(model, place, op=Zero()):
            while True:
                yield answer(model, inputs)

    going, context = answers(), contextvars.copy_context()
    context.run(next, going)
    going.close()

    def later():
        with intervene(model, at("attention_heads", 2), op=neutral):
            return answer(model, inputs)

    assert torch.equal(context.run(later), plain)
