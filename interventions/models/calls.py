"""One call of a model: its arguments by name, and the tokens of the sequence that it reads."""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import lru_cache
from inspect import Signature, signature
from types import FrameType
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from interventions.models.wrappers import Model, module_of

_STATES = ("cache_params", "state", "mems", "past_buckets_states")
"""Arguments with the state of models that remember otherwise than by a cache of keys."""
_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds", "inputs")


@dataclass(eq=False)
class Generation:
    """The running call of `generate`.

    Attributes:
        arguments: its arguments by name.
        prompt: the number of tokens read before the first one is generated; those of an image count from when the
            cache shows them.
        seen: the number of tokens read so far.
        cache: the cache of the first call; calls with another cache do not belong to this generation.
        began: whether the model has been called.
        module: the model that generates.
    """

    arguments: Mapping[str, object]
    prompt: int
    seen: int = 0
    cache: object = None
    began: bool = False
    module: nn.Module | None = None


@dataclass
class Progress:
    """The progress of a stack in one call of the model: the number of the block that ran last, −1 before any."""

    latest: int = -1


@dataclass(eq=False)  # not frozen, which takes several times as long to make
class Call:
    """The running call of a model.

    Attributes:
        module: the module called: the model, or the one that it wraps.
        arguments: its arguments by name.
        past: the number of tokens read in earlier calls, which are in the cache.
        tokens: the number of tokens it reads; None where unknown.
        prompt: the number of tokens of the sequence that were not generated; None where unknown.
        generation: the `generate` that made the call, if one did.
        outer: the call during which this one was made, if any.
        graded: whether autograd was on at the start.
        caches: the cache of each attention whose key or value is tapped.
        turns: the number of the last call of each tap with a turn, by the id of the tap.
        progress: the progress of the stacks whose final norm is tapped, by the id of its `AfterBlocks`.
        known: what was worked out from the arguments at one place and serves the others, e.g. which tokens are real.
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
    known: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def examples(self) -> int | None:
        """The number of sequences that it reads; None where unknown."""
        return examples_named(self.arguments)

    def turn_of(self, tap: object) -> int:
        """Return the number of the call of a tap's module within this call of the model; counts one more each time."""
        self.turns[id(tap)] = self.turns.get(id(tap), -1) + 1
        return self.turns[id(tap)]


@runtime_checkable
class CallContext(Protocol):
    """The running call of a model, as seen where an activation is read or written.

    For a torch model it is the scope of hooks of an open block, for a model of nnsight the current call of its trace.

    Attributes:
        call: the running call of the model; None outside of one.
        generation: the running call of `generate`, if there is one.
        recomputing: whether gradient checkpointing repeats an earlier forward.
        stores: whether a changed key or value is kept in the cache; False where the cache is thrown away.
        unsure: why prompt and generated tokens cannot be distinguished; "" where they can be.
        is_open: whether activations are to be read and written now.
    """

    @property
    def call(self) -> Call | None: ...

    @property
    def generation(self) -> Generation | None: ...

    @property
    def recomputing(self) -> bool: ...

    @property
    def stores(self) -> bool: ...

    @property
    def unsure(self) -> str: ...

    @property
    def is_open(self) -> bool: ...

    def frames(self) -> Iterator[FrameType]:
        """Return the frames in which the model runs, the innermost first."""
        ...


def begin_call(
    module: nn.Module,
    arguments: Mapping[str, object],
    *,
    generation: Generation | None = None,
    outer: Call | None = None,
    before: Call | None = None,
    prompts: MutableMapping[Any, tuple[int | None, int]] | None = None,
) -> Call:
    """Return the call that begins now, with the tokens of the sequence that it reads.

    Args:
        module: the module called.
        arguments: its arguments by name.
        generation: the running `generate`.
        outer: the running call: of a wrapper of `module`, or one during which the model is called again.
        before: the last call, from which the length of the prompt is known.
        prompts: cache → the length of its prompt and the number of tokens read into it; this call adds its own.
    """
    if outer is not None and module not in _modules(outer):
        # A wrapper calls the model inside it: the same call, with arguments that have names.
        return Call(module, arguments, outer.past, outer.tokens, outer.prompt, outer.generation, outer,
                    caches=outer.caches, turns=outer.turns, progress=outer.progress)  # fmt: skip
    tokens, cache = tokens_in(arguments), arguments.get("past_key_values")
    belongs = generation is not None and outer is None and _belongs(generation, cache, tokens, arguments)
    current = generation if belongs else None
    past, is_cache = 0, hasattr(cache, "get_seq_length")
    prompts = {} if prompts is None else prompts
    if is_cache:
        past = int(cast(Any, cache).get_seq_length())  # at once: a static cache returns a live tensor
    elif current is not None and tokens is not None and tokens <= current.seen:
        past = current.seen  # a model with a state of its own, which reads one token a step
    if current is not None:
        current.prompt += _unread(past, current.seen) if current.began and is_cache and tokens else 0
        current.cache, current.began, current.seen = cache, True, past + (tokens or 0)
        prompt: int | None = current.prompt
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
    return Call(module, arguments, past, tokens, prompt, current, outer)


def _unread(past: int, seen: int) -> int:
    """Return how many tokens a cache holds beyond those counted: those of an image before the text."""
    return max(0, past - seen)


def _modules(call: Call | None) -> list[nn.Module]:
    """Return the modules of a call and of the calls around it."""
    return [] if call is None else [call.module, *_modules(call.outer)]


def _belongs(generation: Generation, cache: object, tokens: int | None, arguments: Mapping[str, object]) -> bool:
    """Return whether a call is a step of the generation, not one made for another purpose meanwhile."""
    if generation.began and cache is not generation.cache:
        return False
    grows = cache is not None or tokens is None or tokens > generation.seen
    return grows or any(arguments.get(name) is not None for name in _STATES)


def generation_of(model: nn.Module, args: tuple, kwargs: dict) -> Generation:
    """Return the generation that begins with a call of `model.generate(*args, **kwargs)`."""
    arguments = {**({"inputs": args[0]} if args else {}), **kwargs}
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if decodes:
        arguments_of_decoder = {key: value for key, value in arguments.items() if key.startswith("decoder")}
        prompt = (tokens_in(arguments_of_decoder) or 1) + _starts(model, arguments)
    else:
        prompt = tokens_in(arguments) or 1
    return Generation(arguments, prompt, module=model)


def _starts(model: nn.Module, arguments: Mapping[str, object]) -> bool:
    """Return whether `generate` adds the start token to the decoder's tokens: it does where none begins with it."""
    given = arguments.get("decoder_input_ids")
    settings = (arguments.get("generation_config"), getattr(model, "generation_config", None), model.config)
    stated = [
        arguments.get("decoder_start_token_id"),
        *(getattr(each, "decoder_start_token_id", None) for each in settings),
    ]
    start = next((each for each in stated if isinstance(each, int)), None)
    return isinstance(given, Tensor) and given.ndim > 1 and start is not None and not bool((given[:, 0] == start).any())


def examples_named(arguments: Mapping[str, object]) -> int | None:
    """Return how many sequences the arguments of a call hold; None where they hold no tokens."""
    value = _sequence_in(arguments)
    return None if value is None else len(value)


def tokens_in(arguments: Mapping[str, object]) -> int | None:
    """Return how many tokens the arguments of a call hold in each sequence; None where they hold none."""
    value = _sequence_in(arguments)
    return None if value is None else value.shape[1]


def _sequence_in(arguments: Mapping[str, object]) -> Tensor | None:
    """Return the first argument with an axis of examples and one of tokens."""
    for name in _TOKENS:
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.ndim > 1:
            return value
    return None


def call(model: nn.Module, inputs: object) -> object:
    """Return `model(**inputs)` for a mapping, `model(*inputs)` for a tuple or list, else `model(inputs)`."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def arguments_of(model: Model, inputs: object) -> Mapping[str, object]:
    """Return the arguments that `call(model, inputs)` passes, by name."""
    model = module_of(model)
    if isinstance(inputs, Mapping):
        return bind_arguments(model, (), dict(inputs))
    return bind_arguments(model, tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {})


def bind_arguments(model: nn.Module, args: tuple, kwargs: dict) -> Mapping[str, object]:
    """Return the arguments of a call by name, including those that the model gathers in `**kwargs`."""
    if not args:
        return kwargs
    try:
        bound = signature_of(_forward_of(model)).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return kwargs
    return {**bound, **kwargs}


def _forward_of(model: nn.Module) -> Any:
    """Return the `forward` of a model; where nnsight has replaced it, that of its class, whose arguments have names."""
    own = vars(model).get("forward")
    return model.forward if type(own).__module__.split(".")[0] != "nnsight" else type(model).forward.__get__(model)


def parameters_of(model: nn.Module) -> Mapping[str, object]:
    """Return the parameters of the `forward` of a model, by name."""
    return signature_of(_forward_of(model)).parameters


def signature_of(function: Any) -> Signature:
    """Return `inspect.signature`, which is slow, computed once for all objects of a class.

    Raises:
        ValueError, TypeError: as `inspect.signature`.
    """
    owner, plain = getattr(function, "__self__", None), getattr(function, "__func__", None)
    if owner is None or plain is None:  # bound methods of a class alone
        return signature(function)
    around = vars(plain)
    return _of_method(plain, around.get("__wrapped__"), around.get("__signature__"))


@lru_cache(maxsize=512)
def _of_method(plain: Any, wrapped: object, stated: object) -> Signature:
    """Return the signature of a method; what it wraps, or states as its signature, tells whether it is the same."""
    found = signature(plain)
    return found.replace(parameters=list(found.parameters.values())[1:])
