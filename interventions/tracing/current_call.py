"""The current call of a traced model, from which writes count tokens, steps and calls."""

from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from interventions.models.calls import Call, Generation, begin_call, bind_arguments, tokens_in


class CurrentCall:
    """The state of the current run of a traced model; taps and writes use it in place of a `Scope` of hooks.

    A run is one trace, and all its calls of the model belong to one generation.

    Attributes:
        call: the current call of the model, or the last one.
        generation: the run, from its first call, or from that of the encoder before it.
        recomputing: always False, because recomputed forwards are not traced (`check_recomputable` raises for them).
        unsure: the reason why prompt and generated tokens cannot be distinguished; "" if they can.
        stores: True if a changed key or value is kept in the cache, because the cache is returned.
        is_open: always True, because edits on a model act in every run.
    """

    is_open = True

    def __init__(self) -> None:
        self.recomputing, self.stores = False, True
        self._prompts: Any = WeakKeyDictionary()  # of caches, which may outlive a run
        self.begin()

    def __reduce__(self) -> tuple:
        return CurrentCall, ()  # the calls on this machine are not those of another one

    def begin(self) -> None:
        """Begin a run: forget the calls of the last one."""
        self.call: Call | None = None
        self.generation: Generation | None = None
        self.unsure = ""
        self._decodes = False

    def note_settings(self, settings: Iterable[str]) -> None:
        """Note the settings of the run with which its first call reads more, or less, than the prompt."""
        hiding = sorted(_HIDING & set(settings))
        if hiding:
            self.unsure = f"this generation is made with {', '.join(hiding)}"

    def frames(self) -> Iterator[FrameType]:
        """Yield the frames of the model's forward, which runs in the greenlet that waits for the current one."""
        from greenlet import getcurrent

        waiting: Any = getcurrent().parent
        while waiting is not None:
            frame = waiting.gr_frame
            while frame is not None:
                yield frame
                frame = frame.f_back
            waiting = waiting.parent

    def begin_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Begin a call of the model with these arguments."""
        arguments = bind_arguments(module, args, kwargs)
        tokens, first = tokens_in(arguments), not self._decodes
        if first:
            self._begin_generation(arguments, tokens)
        self._decodes = True
        self.call = begin_call(module, arguments, generation=self.generation, before=self.call, prompts=self._prompts)
        chunked = not first and self.call.past > 0 and self.call.past == (self.generation and self.generation.prompt)
        if chunked and (tokens or 0) > 1:
            self.unsure = f"the second call of this generation reads {tokens} tokens at once (a prompt in chunks?)"

    def begin_encoding(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Begin a call of the encoder, which `generate` makes before it calls the model."""
        if self.call is None and self.generation is None:
            arguments = bind_arguments(module, args, kwargs)
            self.generation = Generation(arguments, tokens_in(arguments) or 1)

    def _begin_generation(self, arguments: Any, tokens: int | None) -> None:
        cache = arguments.get("past_key_values")
        filled = hasattr(cache, "get_seq_length") and int(cache.get_seq_length()) > 0
        if filled or isinstance(cache, tuple) or tokens is None:
            return  # the prompt was read before this run, or there is none, as for images
        before = {} if self.generation is None else self.generation.arguments
        self.generation = Generation({**before, **arguments}, tokens)


_HIDING = {"prompt_lookup_num_tokens", "assistant_model", "prefill_chunk_size", "custom_generate"}


def cache_in(args: tuple, kwargs: dict[str, Any]) -> object:
    """Return the key–value cache among the arguments of a module, whatever its name; None without one."""
    return next((each for each in (*args, *kwargs.values()) if hasattr(each, "get_seq_length")), None)
