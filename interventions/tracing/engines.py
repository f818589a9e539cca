"""`intervene` and `run` on a vLLM engine of nnsight: swap, add and noise while it generates.

The engine is another process, and reads many requests at once. What is done stands on it as edits of nnsight, of which
each request gets a copy (`slabs`); what these count, and their errors, come back on the outputs of the requests.

Nothing here was run on vLLM itself. It was written against nnsight 0.8.1's own support of vLLM, whose tracer, edits,
requests, batcher and collecting of what is saved run in the tests on a stand-in for vLLM's scheduler and kernels.
What it can do and what not: docs/engines.md.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from interventions.architectures import Architecture, Place, architecture
from interventions.calls import arguments_of
from interventions.errors import InterventionError
from interventions.locations import HEAD_SITES, SIDES, Location
from interventions.operators import Operator
from interventions.requests import Handle, check_fired, held_by, writes_of
from interventions.runs import Activations, Inputs, Keep, Run, check_ran
from interventions.sites import Missing, norm_after
from interventions.steps import parse_steps
from interventions.tracing.parcels import Parcel
from interventions.tracing.sessions import Remote, ours
from interventions.tracing.slabs import Draws, Post
from interventions.wrappers import is_traced
from interventions.writes import Source, Write

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")


def is_engine(model: object) -> bool:
    """Whether it is a vLLM engine of nnsight. Seen without importing either."""
    return any(cls.__name__ == "VLLM" and cls.__module__.startswith("nnsight.modeling.vllm") for cls in type(model).__mro__)


def refuse(model: object, verb: str) -> None:
    """Raise for what an engine cannot do.

    Raises:
        InterventionError: `model` is an engine.
    """
    if is_engine(model):
        raise InterventionError(
            f"{verb} does not work on a vLLM engine, which generates and has no gradients; write "
            "with intervene(model, …, source=run(model, prompt)): model.generate(…), or load the model with "
            "nnsight.TransformersModel(name)."
        )


def run(
    model: Any,
    inputs: Inputs,
    at: list[Location],
    *,
    detach: bool = False,
    device: torch.device | str | None = None,
    keep: Keep | None = None,
    remote: Remote = False,
) -> Run:
    """`interventions.run` of one prompt: what the places hold while it is read, `[1, tokens, dims]`, on the CPU.

    The engine reads the prompt and generates one token; the output of the run is vLLM's own, without logits.
    """
    check_engine(model, remote)
    found, prompt, activations = Served.of(model), _prompt(inputs), Activations(at)
    posts = [Post(_view(model, place), each, place, found.adds(place)) for each in at for place in [found.place(each)]]
    _check_counting(model)
    with ours(), _standing(model, posts) as heard:
        (output,) = model.generate(prompt, max_tokens=1, temperature=0.0)
    for location, reports in zip(at, heard, strict=True):
        states = [state for report in reports for state in report.get("states", ())]
        if states:
            state = torch.cat(states, 0 if location.subspace is not None else 1)
            activations._states[location] = [state if device is None else state.to(device)]
    check_ran(activations, "this run")
    activations._fetch = lambda location, kept: run(model, inputs, [location]).activations[location]
    return Run(model, inputs, output if keep is None else keep(output), activations)


@contextmanager
def intervene(
    model: Any,
    pairs: dict[Location, Operator],
    source: object,
    where: tuple[object, object, Any],
    generator: torch.Generator | None,
    *,
    remote: Remote = False,
) -> Iterator[Handle]:
    """`interventions.intervene`: in all requests that the engine begins inside the block, whoever makes them."""
    check_engine(model, remote)
    found = Served.of(model)
    writes = tuple(writes_of(found, pairs, source, where, None, listen=_listening(model)))
    if any(each is not None for write in writes for each in (write.positions, write.steps, write.source)):
        _check_counting(model)
    with torch.random.fork_rng([]) if False else ExitStack():
        drawn = torch.default_generator if generator is None else generator
        draws = [Draws(str(drawn.device), drawn.get_state(), number) for number in range(len(writes))]
    posts = [
        Post(_view(model, write.place), write.location, write.place, found.adds(write.place), write, draw)
        for write, draw in zip(writes, draws, strict=True)
    ]
    with ours(), _standing(model, posts) as heard:
        try:
            yield Handle(_Counted.of(writes, heard))
        finally:
            for write, reports in zip(writes, heard, strict=True):
                _count(write, reports)
            if any(report.get("drew") for reports in heard for report in reports):
                torch.rand((), generator=drawn, device=drawn.device)  # so that the next block draws other numbers
    check_fired(writes, "this intervene block; generate, or open a trace of the model, inside the block")
