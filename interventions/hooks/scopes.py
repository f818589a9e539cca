"""A scope: the taps and other hooks of one open block on one model; and the scopes open in this context."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from traceback import walk_stack
from types import FrameType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from interventions.endings import one_at_a_time, setting
from interventions.hooks.replacements import lock
from interventions.hooks.states import argument_in, at, path_in, with_argument, with_new
from interventions.hooks.taps import Tap
from interventions.models.calls import Call, Generation, Progress, begin_call, bind_arguments
from interventions.models.structure import structure_of

_open: ContextVar[tuple["Scope", ...]] = ContextVar("open_scopes", default=())


class Stopped(BaseException):
    """Ends a run early, from inside the model. Not an Exception, so that no model code catches it."""


@dataclass(eq=False)
class Scope:
    """The taps and other hooks of one open block on one model, and the call of the model that is running.

    A scope acts only in the context (thread or task) that opened it: each hook first checks whether it `is_open` there.

    Attributes:
        taps: the functions on activations, in the order in which they act on one place.
        watched: the modules whose outputs are handed to `raw_outputs`.
        raw_outputs: called with a watched module and what its forward returned, before any hook changed it.
        replayed: the modules whose `forward` is answered by `replay`.
        replay: returns the output of a replayed module; it raises `LookupError` to have the module run.
        generator: the generator of the operators; its state is kept so that a recomputed forward draws the same.
        outside: in a resumed run, the states of the default generators outside of it, from which operators draw.
        call: the running call of the model.
        last: the call before it.
        generation: the running call of `generate`.
        prompts: cache → the length of its prompt and how many tokens were read into it.
        recomputing: whether gradient checkpointing repeats an earlier forward.
        stores: whether a changed key or value is kept in the cache; False where the cache is thrown away.
        unsure: why prompt and generated tokens cannot be distinguished; always "" here.
        progress: how far the stacks have come, where parts of the model are called by themselves.
        eager: the compiled modules that run as they were written, because the scope acts inside of them.
        undos: the functions that undo what was put on the model, in the order in which it was.
        hooks: the number of each hook on the model, and the dicts in which torch keeps it.
        users: those for whom the hooks are on the model.
    """

    model: nn.Module
    taps: Sequence[Tap] = ()
    watched: Sequence[nn.Module] = ()
    raw_outputs: Callable[[nn.Module, object], None] | None = None
    replayed: Collection[nn.Module] = ()
    replay: Callable[[nn.Module], object] | None = None
    generator: torch.Generator | None = None
    outside: Mapping[torch.device, Tensor] | None = None
    call: Call | None = None
    last: Call | None = None
    generation: Generation | None = None
    prompts: WeakKeyDictionary = field(default_factory=WeakKeyDictionary)
    recomputing: bool = False
    stores: bool = True
    unsure: str = ""
    progress: dict[int, Progress] = field(default_factory=dict)
    eager: set[nn.Module] = field(default_factory=set)
    undos: list[Callable[[], None]] = field(default_factory=list)
    hooks: list[tuple[int, dict, dict]] = field(default_factory=list)
    users: set[object] = field(default_factory=set)
    _installed: bool = False

    @one_at_a_time(lock)
    def acquire(self, user: object, install: "Callable[[Scope], None]") -> None:
        """Put the hooks on the model for a user, by `install(scope)`, unless they are there already."""
        self.users.add(user)
        if not self._installed:
            self._undo()  # what another thread has not undone yet, after an interrupt
            install(self)
            self._installed = True

    @one_at_a_time(lock)
    def release(self, user: object) -> None:
        """Take the hooks off the model when the last user is gone."""
        self.users.discard(user)
        if not self.users:
            self._installed = False
            self._undo()

    def _undo(self) -> None:
        """Undo what was put on the model, the last change first."""
        while self.undos:
            self.undos[-1]()
            self.undos.pop()
        while self.hooks:
            number, hooks, marks = self.hooks[-1]
            hooks.pop(number, None)
            marks.pop(number, None)
            self.hooks.pop()

    @property
    def is_open(self) -> bool:
        """True where the scope was opened in this context and has not been closed since."""
        return bool(self.users) and self in _open.get()

    def frames(self) -> Iterator[FrameType]:
        """Return the frames on the stack, the innermost first."""
        return (frame for frame, _ in walk_stack(None))

    @cached_property
    def attentions(self) -> dict[nn.Module, list[Tap]]:
        """The taps inside each attention module."""
        found: dict[nn.Module, list[Tap]] = {}
        for tap in self.taps:
            if tap.inside_attention:
                found.setdefault(tap.module, []).append(tap)
        return found

    # The methods below are hooks. torch adds a hook in two steps, so another thread may call it without kwargs in
    # between: hence their default.

    def enter_model(self, model: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        """Note the call of the model that begins."""
        if self.is_open:
            arguments = bind_arguments(model, args, kwargs or {})
            self.call = begin_call(
                model,
                arguments,
                generation=self.generation,
                outer=self.call,
                before=self.last,
                prompts=self.prompts,
            )

    def leave_model(self, model: nn.Module, args: tuple, output: object) -> None:
        """Note that the running call of the model is over."""
        if self.is_open and self.call is not None:
            self.last, self.call = self.call, self.call.outer

    def enter_part(self, part: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        """Note a call of a part that generates by itself, past the model, as the language model of BLIP-2 does."""
        if self.call is None and self.generation is not None and self.generation.module is part:
            self.enter_model(part, args, kwargs)

    def leave_part(self, part: nn.Module, args: tuple, output: object) -> None:
        """Note that the call of a part that generates by itself is over."""
        if self.call is not None and self.call.module is part and self.call.outer is None:
            self.leave_model(part, args, output)

    def note_cache(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        """Note the cache that an attention is called with."""
        if self.is_open and self.call is not None:
            given = (*args, *(kwargs or {}).values())  # under one name or another
            self.call.caches[module] = next((each for each in given if hasattr(each, "get_seq_length")), None)

    def note_block(self, tap: Tap, module: nn.Module, args: tuple, output: object) -> None:
        """Note that a block has run before the final norm of a tap."""
        if tap.after is not None and self.is_open:
            tap.after.note(module, self._progress_of(tap))

    def hand_on_output(self, module: nn.Module, args: tuple, output: object) -> None:
        """Hand the output of a watched module to `raw_outputs`."""
        # As `is_open` says, and as cheap as can be: each block of a run comes here.
        if self.users and self in _open.get() and self.raw_outputs is not None and not self.recomputing:
            self.raw_outputs(module, output)

    def tap_input(self, tap: Tap, module: nn.Module, args: tuple, kwargs: dict | None = None) -> object:
        """Return the arguments of a module with its input put through a tap; None to leave them as they are."""
        if not self.is_open or kwargs is None or not tap.has_turn(self):
            return None
        name = argument_in(module, args, kwargs)
        new = tap(args[0] if name is None else kwargs[name], self)
        return None if new is None else with_argument(module, args, kwargs, new)

    def tap_output(self, tap: Tap, module: nn.Module, args: tuple, output: object) -> object:
        """Return the output of a module put through a tap; None to leave it as it is."""
        if not self.is_open or not (tap.turn is None or tap.has_turn(self)):
            return None
        if tap.after is not None and not tap.after.is_now(self._progress_of(tap)):
            return None
        if tap.io == "output" and isinstance(output, Tensor):
            return tap(output, self)
        path = path_in(module, tap.io, output)
        new = tap(at(output, path), self)
        return None if new is None else with_new(output, path, new)

    def _progress_of(self, tap: Tap) -> Progress:
        """Return how far the stack before a final norm has come in this call."""
        return (self.progress if self.call is None else self.call.progress).setdefault(id(tap.after), Progress())


open_here = _open.get
"""Returns the scopes opened in this context, also those whose blocks are over elsewhere, where it was copied."""


def open_scope(scope: Scope) -> None:
    """Add a scope to those that are open in this context."""
    _open.set((*_open.get(), scope))


def close_scope(scope: Scope) -> None:
    """Remove a scope from those that are open in this context."""
    # Not reset(token): a generator may be closed in another context than the one it was started in.
    _open.set(tuple(other for other in _open.get() if other is not scope))


def acting() -> tuple[Scope, ...]:
    """Return the scopes of this context that are still open: a context may be copied, and outlive the block."""
    scopes = _open.get()
    return tuple([scope for scope in scopes if scope.users]) if scopes else scopes


def open_scopes(model: nn.Module) -> tuple[Scope, ...]:
    """Return the scopes that act on `model` or on a part of it in this context, outermost first."""
    scopes = acting()
    if not scopes:
        return ()
    structure = structure_of(model)
    return tuple(s for s in scopes if structure.holds(s.model) or structure_of(s.model).holds(model))


@contextmanager
def under(scopes: tuple[Scope, ...]) -> Iterator[None]:
    """Let these scopes act inside the block, and no others."""
    with setting(_open, scopes):
        yield


@contextmanager
def until_stopped() -> Iterator[None]:
    """Run the block to its end, or until `Stopped` is raised in it."""
    before = [(scope, scope.call) for scope in _open.get()]
    try:
        yield
    except Stopped:
        for scope, call in before:  # torch calls no hook of the model when a BaseException passes
            scope.call = call
