"""One call of a model: what it was given, by name, and which tokens of a sequence it reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds", "inputs")


@dataclass(eq=False)
class Generation:
    """A call of `generate` that is going on.

    Attributes:
        arguments: what it was called with, by name.
        prompt: how many tokens are read before the first one is generated.
        seen: how many tokens were read so far.
    """

    arguments: Mapping[str, object]
    prompt: int
    seen: int = 0


@dataclass(frozen=True, eq=False)
class Call:
    """A call of the model that is going on.

    Attributes:
        arguments: what it was called with, by name.
        past: how many tokens of the sequence were read before, and are in the cache.
        tokens: how many it reads; None where that cannot be told.
        prompt: how many tokens of the sequence were not generated; None where that cannot be told.
        generation: the `generate` that made it, if one did.
        outer: the call during which this one was made, if any.
        graded: whether autograd was on at the start.
    """

    arguments: Mapping[str, object]
    past: int
    tokens: int | None
    prompt: int | None
    generation: Generation | None
    outer: "Call | None"
    number: int = field(default_factory=count().__next__)
    graded: bool = field(default_factory=torch.is_grad_enabled)


def begin(arguments: Mapping[str, object], generation: Generation | None, outer: Call | None, before: Any) -> Call:
    """The call that begins now; `before` is the last one, from which the length of the prompt is known."""
    tokens = tokens_in(arguments)
    cache = arguments.get("past_key_values")
    past = 0
    if hasattr(cache, "get_seq_length"):
        past = int(cache.get_seq_length())  # at once: a static cache returns a live tensor
    elif generation is not None and tokens is not None and tokens <= generation.seen:
        past = generation.seen  # a model with a state of its own, which reads one token a step
    prompt: int | None = None
    if generation is not None:
        prompt = generation.prompt
        generation.seen = past + (tokens or 0)
    else:
        prompt = tokens if past == 0 else getattr(before, "prompt", None)
    return Call(arguments, past, tokens, prompt, generation, outer)


def generation_of(model: nn.Module, args: tuple, kwargs: dict) -> Generation:
    """The generation that begins when `model.generate(*args, **kwargs)` is called."""
    arguments = {**({"inputs": args[0]} if args else {}), **kwargs}
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if decodes:
        arguments_of_decoder = {key: value for key, value in arguments.items() if key.startswith("decoder")}
        prompt = tokens_in(arguments_of_decoder) or 1
    else:
        prompt = tokens_in(arguments) or 1
    return Generation(arguments, prompt)


def tokens_in(arguments: Mapping[str, object]) -> int | None:
    """How many tokens the arguments of a call hold."""
    for name in _TOKENS:
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.ndim > 1:
            return value.shape[1]
    return None


def call(model: nn.Module, inputs: object) -> object:
    """`model(**inputs)` for a mapping, `model(*inputs)` for a tuple or list, else `model(inputs)`."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def arguments_of(model: nn.Module, inputs: object) -> Mapping[str, object]:
    """What `call(model, inputs)` passes, by name."""
    if isinstance(inputs, Mapping):
        return named(model, (), dict(inputs))
    return named(model, tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {})


def named(model: nn.Module, args: tuple, kwargs: dict) -> Mapping[str, object]:
    """The arguments of a call by name, those gathered in `**kwargs` included."""
    try:
        bound = signature(model.forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return kwargs
    return {**bound, **kwargs}
