"""One call of a model: what it was given, by name, and which tokens of a sequence it reads."""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import lru_cache
from inspect import Signature, signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from interventions.models.wrappers import Model, module_of

_STATES = ("cache_params", "state", "mems", "past_buckets_states")  # of models that remember without a cache of keys
_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds", "inputs")


@dataclass(eq=False)
class Generation:
    """A call of `generate` that is going on.

    Attributes:
        arguments: what it was called with, by name.
        prompt: how many tokens are read before the first one is generated; those of an image among them are counted
            once the cache shows them.
        seen: how many tokens were read so far.
        cache: what holds them, known from the first call; calls with another cache are not of this generation.
        module: what generates.
    """

    arguments: Mapping[str, object]
    prompt: int
    seen: int = 0
    cache: object = None
    began: bool = False
    module: nn.Module | None = None


@dataclass
class Progress:
    """How far a stack has come in one call of the model: the number of the block that ran last, -1 before any."""

    latest: int = -1


@dataclass(frozen=True, eq=False)
class Call:
    """A call of the model that is going on.

    Attributes:
        module: what was called: the model, or the one that it wraps.
        arguments: what it was called with, by name.
        past: how many tokens of the sequence were read before, and are in the cache.
        tokens: how many it reads; None where that cannot be told.
        prompt: how many tokens of the sequence were not generated; None where that cannot be told.
        generation: the `generate` that made it, if one did.
        outer: the call during which this one was made, if any.
        graded: whether autograd was on at the start.
        caches: of the attention modules whose key or value is tapped.
        turns: how often the taps with a turn were called.
        progress: how far the stacks have come whose final norm is tapped.
    """

    module: nn.Module
    arguments: Mapping[str, object]
    past: int
    tokens: int | None
    prompt: int | None
    generation: Generation | None = None
    outer: "Call | None" = None
    graded: bool = field(default_factory=torch.is_grad_enabled)
    caches: dict[nn.Module, object] = field(default_factory=dict)
    turns: dict[int, int] = field(default_factory=dict)
    progress: dict[int, Progress] = field(default_factory=dict)

    @property
    def examples(self) -> int | None:
        """How many sequences it reads; None where that cannot be told."""
        return examples_named(self.arguments)

    def turn_of(self, tap: object) -> int:
        """Which call of its module this is, of those in this call of the model; counts one more each time."""
        self.turns[id(tap)] = self.turns.get(id(tap), -1) + 1
        return self.turns[id(tap)]


def begin(
    module: nn.Module,
    arguments: Mapping[str, object],
    *,
    generation: Generation | None = None,
    outer: Call | None = None,
    before: Call | None = None,
    prompts: MutableMapping[Any, tuple[int | None, int]] | None = None,
) -> Call:
    """The call that begins now.

    Args:
        generation: the `generate` that is going on.
        outer: the call that is going on: of what wraps `module`, or one during which somebody called it again.
        before: the last call, from which the length of the prompt is known.
        prompts: cache → the length of its prompt and how many tokens were read into it; this call adds its own.
    """
    if outer is not None and module not in _modules(outer):
        # A wrapper calls what it wraps: the same call, with arguments that have names.
        return Call(module, arguments, outer.past, outer.tokens, outer.prompt, outer.generation, outer,
                    caches=outer.caches, turns=outer.turns, progress=outer.progress)  # fmt: skip
    tokens, cache = tokens_in(arguments), arguments.get("past_key_values")
    mine = generation if outer is None and _belongs(generation, cache, tokens, arguments) else None
    past, is_cache = 0, hasattr(cache, "get_seq_length")
    prompts = {} if prompts is None else prompts
    if is_cache:
        past = int(cast(Any, cache).get_seq_length())  # at once: a static cache returns a live tensor
    elif mine is not None and tokens is not None and tokens <= mine.seen:
        past = mine.seen  # a model with a state of its own, which reads one token a step
    if mine is not None:
        mine.prompt += _unread(past, mine.seen) if mine.began and is_cache and tokens else 0
        mine.cache, mine.began, mine.seen = cache, True, past + (tokens or 0)
        prompt: int | None = mine.prompt
    elif past == 0:
        prompt = tokens
    elif cache in prompts:
        prompt, seen = prompts[cache]
        prompt = None if prompt is None else prompt + _unread(past, seen)
    else:
        follows = before is not None and before.tokens is not None and before.past + before.tokens == past
        prompt = before.prompt if follows and before is not None else None
    if is_cache:
        prompts[cache] = prompt, past + (tokens or 0)
    return Call(module, arguments, past, tokens, prompt, mine, outer)


def _unread(past: int, seen: int) -> int:
    """How many tokens a cache holds beyond those that were read by name: of an image put before the text."""
    return max(0, past - seen)


def _modules(call: Call | None) -> list[nn.Module]:
    return [] if call is None else [call.module, *_modules(call.outer)]


def _belongs(generation: Generation | None, cache: object, tokens: int | None, arguments: Mapping[str, object]) -> bool:
    """Whether a call is a step of the generation, and not one that something else makes meanwhile."""
    if generation is None or (generation.began and cache is not generation.cache):
        return False
    grows = cache is not None or tokens is None or tokens > generation.seen
    return grows or any(arguments.get(name) is not None for name in _STATES)


def generation_of(model: nn.Module, args: tuple, kwargs: dict) -> Generation:
    """The generation that begins when `model.generate(*args, **kwargs)` is called."""
    arguments = {**({"inputs": args[0]} if args else {}), **kwargs}
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if decodes:
        arguments_of_decoder = {key: value for key, value in arguments.items() if key.startswith("decoder")}
        prompt = (tokens_in(arguments_of_decoder) or 1) + _starts(model, arguments)
    else:
        prompt = tokens_in(arguments) or 1
    return Generation(arguments, prompt, module=model)


def _starts(model: nn.Module, arguments: Mapping[str, object]) -> bool:
    """Whether `generate` puts the start token before the decoder's tokens, as it does where none begins with it."""
    given = arguments.get("decoder_input_ids")
    settings = (arguments.get("generation_config"), getattr(model, "generation_config", None), model.config)
    named = [
        arguments.get("decoder_start_token_id"),
        *(getattr(each, "decoder_start_token_id", None) for each in settings),
    ]
    start = next((each for each in named if isinstance(each, int)), None)
    return isinstance(given, Tensor) and given.ndim > 1 and start is not None and not bool((given[:, 0] == start).any())


def examples_named(arguments: Mapping[str, object]) -> int | None:
    """How many sequences the arguments of a call hold; None where they hold no tokens."""
    return next((len(value) for value in _sequences(arguments)), None)


def tokens_in(arguments: Mapping[str, object]) -> int | None:
    """How many tokens the arguments of a call hold."""
    return next((value.shape[1] for value in _sequences(arguments)), None)


def _sequences(arguments: Mapping[str, object]) -> Iterator[Tensor]:
    for name in _TOKENS:
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.ndim > 1:
            yield value


def call(model: nn.Module, inputs: object) -> object:
    """`model(**inputs)` for a mapping, `model(*inputs)` for a tuple or list, else `model(inputs)`."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def arguments_of(model: Model, inputs: object) -> Mapping[str, object]:
    """What `call(model, inputs)` passes, by name."""
    model = module_of(model)
    if isinstance(inputs, Mapping):
        return named(model, (), dict(inputs))
    return named(model, tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {})


def named(model: nn.Module, args: tuple, kwargs: dict) -> Mapping[str, object]:
    """The arguments of a call by name, those gathered in `**kwargs` included."""
    try:
        bound = signature_of(_forward_of(model)).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return kwargs
    return {**bound, **kwargs}


def _forward_of(model: nn.Module) -> Any:
    """Its `forward`; where nnsight stands in front of it, that of its class, whose arguments have names."""
    own = vars(model).get("forward")
    return model.forward if type(own).__module__.split(".")[0] != "nnsight" else type(model).forward.__get__(model)


def parameters_of(model: nn.Module) -> Mapping[str, object]:
    """The parameters of its `forward`, by name."""
    return signature_of(_forward_of(model)).parameters


def signature_of(function: Any) -> Signature:
    """`inspect.signature`, which is slow, once for all objects of a class.

    Raises:
        ValueError, TypeError: as `inspect.signature`.
    """
    owner, plain = getattr(function, "__self__", None), getattr(function, "__func__", None)
    if owner is None or plain is None or vars(plain):  # bound methods of a class alone, and no wrapped ones
        return signature(function)
    return _of_method(plain)


@lru_cache(maxsize=512)
def _of_method(plain: Any) -> Signature:
    found = signature(plain)
    return found.replace(parameters=list(found.parameters.values())[1:])
