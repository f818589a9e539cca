"""Which call of a traced model is going on: what writes ask for to count tokens, steps and turns."""

from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from interventions.models.calls import Call, Generation, begin_call, bind_arguments, tokens_in


class CurrentCall:
    """What is known of the run of a traced model that is going on; taps and writes take it for a scope of hooks.

    A run is one trace: all its calls of the model are those of one generation.

    Attributes:
        call: the call of the model that is going on, or the last one.
        generation: the run, from its first call, or that of the encoder before it.
        recomputing: False: what is recomputed later is not traced, and `check_recomputable` raises for it.
        unsure: why the prompt cannot be told from what is generated, if it cannot; `given` says with what arguments.
        stores: whether a changed key or value is kept in the cache; not where nobody is given that.
        is_open: True: what stands on a model as an edit acts in every run.
    """

    is_open = True

    def __init__(self) -> None:
        self.recomputing, self.stores = False, True
        self._prompts: Any = WeakKeyDictionary()  # of caches, which may outlive a run
        self.begin()

    def __reduce__(self) -> tuple:
        return CurrentCall, ()  # what goes on here is of no interest elsewhere

    def begin(self) -> None:
        """A run begins."""
        self.call: Call | None = None
        self.generation: Generation | None = None
        self.unsure = ""
        self._decodes = False

    def given(self, settings: Iterable[str]) -> None:
        """Note the arguments of the run that make the first call read more, or less, than the prompt."""
        hiding = sorted(_HIDING & set(settings))
        if hiding:
            self.unsure = f"this generation is made with {', '.join(hiding)}"

    def frames(self) -> Iterator[FrameType]:
        """What the model is in the middle of: it runs in the greenlet that waits for the one we are in."""
        from greenlet import getcurrent

        waiting: Any = getcurrent().parent
        while waiting is not None:
            frame = waiting.gr_frame
            while frame is not None:
                yield frame
                frame = frame.f_back
            waiting = waiting.parent

    def called(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The model is called."""
        arguments = bind_arguments(module, args, kwargs)
        tokens, first = tokens_in(arguments), not self._decodes
        if first:
            self._begin_generation(arguments, tokens)
        self._decodes = True
        self.call = begin_call(module, arguments, generation=self.generation, before=self.call, prompts=self._prompts)
        chunked = not first and self.call.past > 0 and self.call.past == (self.generation and self.generation.prompt)
        if chunked and (tokens or 0) > 1:
            self.unsure = f"the second call of this generation reads {tokens} tokens at once (a prompt in chunks?)"

    def encoded(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The encoder is called; by `generate` before the model itself is."""
        if self.call is None and self.generation is None:
            arguments = bind_arguments(module, args, kwargs)
            self.generation = Generation(arguments, tokens_in(arguments) or 1)

    def _begin_generation(self, arguments: Any, tokens: int | None) -> None:
        cache = arguments.get("past_key_values")
        filled = hasattr(cache, "get_seq_length") and int(cache.get_seq_length()) > 0
        if filled or isinstance(cache, tuple) or tokens is None:
            return  # the prompt was read before, elsewhere; or there is none, as for images
        before = {} if self.generation is None else self.generation.arguments
        self.generation = Generation({**before, **arguments}, tokens)


_HIDING = {"prompt_lookup_num_tokens", "assistant_model", "prefill_chunk_size", "custom_generate"}


def cache_in(args: tuple, kwargs: dict[str, Any]) -> object:
    """The cache that a module was given, under one name or another."""
    return next((each for each in (*args, *kwargs.values()) if hasattr(each, "get_seq_length")), None)
