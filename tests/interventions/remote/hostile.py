"""What once went wrong without a word: functions of the model, the plain one and where, that say what is right now."""

import asyncio
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from interventions import InterventionError, Location, Rotation, Swap, Zero, interchange, intervene, run


def tokens(length: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(1, 50, (2, length), generator=torch.Generator().manual_seed(seed))}


def doubled(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(*given):
        return function(*given) * 2

    return wrapper


@doubled
def decorated(base, source, generator):
    return base + 1


class Plus:
    def __call__(self, base, source, generator):
        return base + 1


class Inherited(Plus):
    def __init__(self):
        self.__factor = 3.0

    def __call__(self, base, source, generator):
        return super().__call__(base, source, generator) * self.__factor


def counting() -> Callable:
    calls = 0

    def operator(base, source, generator):
        nonlocal calls
        calls += 1
        return base * (1 + calls)

    return operator


def pooling(base, source, generator):
    return source.mean(0).expand_as(base)


pooling.pools_source = True  # type: ignore[attr-defined]


@functools.lru_cache
def factor() -> float:
    return 3.0


def cached(base, source, generator):
    return base * factor()


OPERATORS: dict[str, Callable[[], Any]] = {
    "a decorated operator": lambda: decorated,
    "super and private names": Inherited,
    "nonlocal": counting,
    "attributes of a function": lambda: pooling,
    "a cached function": lambda: cached,
}


def operators(model: Any, plain: Any, remote: Any) -> dict[str, bool]:
    found = {}
    for name, made in OPERATORS.items():
        source = tokens(seed=1) if name == "attributes of a function" else None
        here = interchange(plain, tokens(), source, {Location(1): made()}).logits
        there = interchange(model, tokens(), source, {Location(1): made()}, remote=remote).logits
        found[name] = torch.equal(here, there)
    pair = tokens(), tokens(seed=1)
    here = interchange(plain, *pair, Location(1, subspace=Rotation(4))).logits
    there = interchange(model, *pair, Location(1, subspace=Rotation(4)), remote=remote).logits
    return found | {"a subspace without a width": torch.equal(here, there)}


def contexts(model: Any, plain: Any) -> dict[str, bool]:
    """Blocks are of the thread, and of the task, that opened them."""
    untouched, others = plain(**tokens()).logits, {}

    async def inside():
        with intervene(model, layer=1, op=Zero()):
            await asyncio.sleep(0.05)
            logits = run(model, tokens()).logits
            await asyncio.sleep(0.05)
        return logits

    async def outside():
        await asyncio.sleep(0.02)
        return run(model, tokens()).logits

    async def both():
        return await asyncio.gather(inside(), outside())

    with intervene(model, layer=1, op=Zero()):
        thread = threading.Thread(target=lambda: others.update(thread=run(model, tokens()).logits))
        thread.start()
        thread.join()
        run(model, tokens())
    mine, others["task"] = asyncio.run(both())
    return {f"another {name}": torch.equal(logits, untouched) for name, logits in others.items()} | {
        "the task itself": not torch.equal(mine, untouched)
    }


def edits(model: Any, plain: Any) -> dict[str, bool]:
    """Copies that a user makes of an edited model, and runs that are looked into later."""
    untouched = plain(**tokens()).logits
    with intervene(model, layer=1, op=Zero()):
        with model.edit() as (_, edited):
            edited.transformer.h[0].output = edited.transformer.h[0].output * 1
        run(model, tokens())
        ran = run(model, tokens())
    with edited.trace(**tokens()):
        logits = edited.output.logits.save()
    return {
        "an edited copy": torch.equal(logits, untouched),
        "a run of a closed block": "inside other blocks" in message(lambda: ran.activations[Location(2)]),
    }


def axes(model: Any, plain: Any) -> dict[str, bool]:
    """Heads are told from tokens, or not at all."""
    place, inner = Location(1, operation="attn.query_states_1", heads=1), Location(1, "query", heads=1)
    pairs = [(tokens(length), tokens(length, seed=1)) for length in (4, 5)]
    same, here = interchange(model, *pairs[1], place).logits, interchange(plain, *pairs[1], inner).logits
    return {
        "five tokens, four heads": torch.equal(same, here),
        "four tokens, four heads": "which are which is unknown"
        in message(lambda: interchange(model, *pairs[0], place)),
    }


def refusals(model: Any) -> dict[str, bool]:
    base, source = tokens(), tokens(seed=1)
    inner = Location(1, operation="attn.attention_interface_1.attn_output_transpose_0")
    both = {Location(1, "query"): Swap(), inner: Swap()}

    def looked_up() -> None:
        settings = {"max_new_tokens": 3, "prompt_lookup_num_tokens": 2, "do_sample": False}
        with intervene(model, layer=1, op=Zero(), positions=-1), model.generate("w1 w2 w1", **settings) as tracer:
            tracer.result.save()

    return {
        "an operation inside what is computed by us": "name one or the other"
        in message(lambda: interchange(model, base, source, both)),
        "no tensor": "holds no tensor"
        in message(lambda: run(model, base, at=[Location(1, operation="attn.shape_q_0")])),
        "looked up tokens": "prompt_lookup_num_tokens" in message(looked_up),
    }


def sizes(model: Any, remote: Any) -> dict[str, bool]:
    """Of a view what is seen comes back, and not what lies under it."""
    last = run(model, tokens(), keep=lambda output: output.logits[:, -1], remote=remote).output
    query = run(model, tokens(), at=[Location(1, "query")], remote=remote).activations[Location(1, "query")]
    return {
        name: each.untyped_storage().nbytes() == each.nbytes for name, each in {"keep": last, "query": query}.items()
    }


def continued(model: Any, plain: Any) -> dict[str, bool]:
    """A prompt in one trace, a step with its cache in the next."""
    from transformers import DynamicCache

    answers = []
    for each in (plain, model):
        cache = DynamicCache()
        with intervene(each, layer=1, op=Zero(), steps=1):
            for ids in (tokens()["input_ids"], torch.tensor([[3], [4]])):
                inputs = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
                if each is plain:
                    logits = plain(**inputs).logits
                else:
                    with model.trace(**inputs):
                        logits = model.output.logits.save()
        answers.append(logits)
    return {"steps across traces": torch.equal(*answers)}


def message(each: Callable) -> str:
    try:
        each()
    except InterventionError as error:
        return str(error)
    return "no error"


def found(model: Any, plain: Any, remote: Any) -> dict[str, bool]:
    return {
        **operators(model, plain, remote),
        **contexts(model, plain),
        **edits(model, plain),
        **axes(model, plain),
        **refusals(model),
        **sizes(model, remote),
        **continued(model, plain),
    }
