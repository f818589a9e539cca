"""The one file that touches hooks, `forward` and other attributes of the user's model.

A `Scope` is what one open block does to one model. It acts only in the context (thread, task) that opened it: every
hook asks a ContextVar first. When it closes, the model is as it was.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from itertools import count
from traceback import walk_stack
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.utils.rnn import PackedSequence
from torch.utils import checkpoint

from interventions.errors import InterventionError

_open: ContextVar[tuple["Scope", ...]] = ContextVar("open_scopes", default=())
_CHECKPOINTING = "_gradient_checkpointing_func"
_checkpointed: ContextVar[bool] = ContextVar("checkpointed", default=False)


class Stopped(BaseException):
    """Ends a run early, from inside the model. Not an Exception, so that no model code catches it."""


@dataclass(frozen=True)
class Tap:
    """A function on the input or output of a module: from the hidden state and its scope to a new state, or None."""

    module: nn.Module
    io: str
    function: Callable[[Tensor, "Scope"], Tensor | None]


@dataclass(frozen=True, eq=False)
class Call:
    """A call of the model that is going on.

    Attributes:
        arguments: what it was called with, by name.
        past: how many tokens its cache held at the start.
        outer: the call during which this one was made, if any.
        graded: whether autograd was on at the start.
    """

    arguments: Mapping[str, object]
    past: int
    outer: "Call | None"
    number: int = field(default_factory=count().__next__)
    graded: bool = field(default_factory=torch.is_grad_enabled)


@dataclass(eq=False)
class Scope:
    """What one open block does to one model.

    Attributes:
        taps: the functions, in the order in which they act on one place.
        raw_outputs: called with a module and what its forward returned, before any hook saw it; for `watched` modules.
        replay: asked for what `forward` of a `replayed` module returns; it may raise `LookupError` to have it run.
        generator: of the operators, so that a recomputed forward draws what the first one drew.
        outside: in a resumed run, the states that the default generators have outside of it, from which operators draw.
        call: the call of the model that is going on.
    """

    model: nn.Module
    taps: Sequence[Tap] = ()
    watched: Sequence[nn.Module] = ()
    raw_outputs: Callable[[nn.Module, object], None] | None = None
    replayed: Sequence[nn.Module] = ()
    replay: Callable[[nn.Module], object] | None = None
    generator: torch.Generator | None = None
    outside: Mapping[torch.device, Tensor] | None = None
    call: Call | None = None
    recomputing: bool = False
    _closers: list[Callable[[], None]] = field(default_factory=list)
    _users: int = 0

    def acquire(self) -> None:
        """Put the hooks in place, unless they are."""
        with _lock:
            self._users += 1
            if self._users == 1:
                self._install()

    def release(self) -> None:
        """Take the hooks away when nobody needs them any more."""
        with _lock:
            self._users -= 1
            if self._users == 0:
                while self._closers:
                    self._closers.pop()()

    def _install(self) -> None:
        self._keep(self.model.register_forward_pre_hook(self._enter_model, with_kwargs=True, prepend=True))
        self._keep(self.model.register_forward_hook(self._leave_model, prepend=True, always_call=True))
        for module in self.watched:
            self._keep(module.register_forward_hook(self._raw, prepend=True))
        for tap in self.taps:
            if tap.io == "input":
                hook = partial(_on_input, self, tap.function)
                self._keep(tap.module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._keep(tap.module.register_forward_hook(partial(_on_output, self, tap.function)))
        for module in self.replayed:
            self._closers.append(_override(module, "forward", partial(_replaying, module)))
        touched = {*(tap.module for tap in self.taps), *self.watched, *self.replayed, self.model}
        for module in self.model.modules():
            if module._compiled_call_impl is not None and any(inner in touched for inner in module.modules()):
                self._closers.append(_override(module, "_compiled_call_impl", lambda original: None))
            if _CHECKPOINTING in vars(module):
                self._closers.append(
                    _override(module, _CHECKPOINTING, lambda original: partial(_checkpointing, original))
                )

    def _keep(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self._closers.append(handle.remove)

    @property
    def is_open(self) -> bool:
        """Whether the scope was opened in this context."""
        return self in _open.get()

    # torch adds a hook in two steps, so another thread may call it without kwargs in between: hence their default.
    def _enter_model(self, model: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        if self.is_open:
            arguments = _named(model, args, kwargs or {})
            cache = arguments.get("past_key_values")
            past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
            self.call = Call(arguments, past, self.call)

    def _leave_model(self, model: nn.Module, args: tuple, output: object) -> None:
        if self.is_open and self.call is not None:
            self.call = self.call.outer

    def _raw(self, module: nn.Module, args: tuple, output: object) -> None:
        if self.raw_outputs is not None and self.is_open and not self.recomputing:
            self.raw_outputs(module, output)


@contextmanager
def opened(scope: Scope) -> Iterator[Scope]:
    """Let `scope` act on its model inside the block.

    Raises:
        InterventionError: the model, or a part that is tapped, went through `torch.compile(module)`, where hooks
            never fire.
    """
    _check_compiled(scope)
    before = _open.get()
    try:
        scope.acquire()
        _open.set((*before, scope))
        yield scope
    finally:
        # Not reset(token): a generator may be closed in another context than the one it was started in.
        _open.set(tuple(other for other in _open.get() if other is not scope))
        scope.release()


@contextmanager
def until_stopped() -> Iterator[None]:
    """Run until `Stopped` is raised, or to the end."""
    before = [(scope, scope.call) for scope in _open.get()]
    try:
        yield
    except Stopped:
        for scope, going_on in before:  # torch calls no hook of the model when a BaseException passes
            scope.call = going_on


def open_scopes(model: nn.Module) -> tuple[Scope, ...]:
    """The scopes that act on `model` or on a part of it in this context, outermost first."""
    parts = set(model.modules())
    return tuple(scope for scope in _open.get() if scope.model in parts or model in set(scope.model.modules()))


def user_hooks(model: nn.Module) -> tuple[int, ...]:
    """What tells the hooks on `model` that are not ours from other such hooks."""
    return tuple(
        id(hook)
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in list(hooks.values())  # at once: other threads add theirs
        if not _is_ours(hook)
    )


def _is_ours(hook: Callable) -> bool:
    return getattr(hook, "func", None) in (_on_input, _on_output) or isinstance(getattr(hook, "__self__", None), Scope)


def recomputes() -> bool:
    """Whether a backward pass is running, so that a forward now repeats an earlier one."""
    return torch._C._current_graph_task_id() != -1


def hidden(value: object) -> Tensor | None:
    """The hidden state in what a module returned: the tensor itself or the first tensor of a tuple, list or mapping."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, PackedSequence):
        return None
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((entry for entry in entries if isinstance(entry, Tensor)), None)


def with_hidden(value: Any, new: Tensor) -> object:
    """A copy of `value` with its hidden state replaced."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, Mapping):
        key = next(key for key, entry in value.items() if isinstance(entry, Tensor))
        return type(value)(**{**value, key: new})
    at = next(i for i, entry in enumerate(value) if isinstance(entry, Tensor))
    entries = [new if i == at else entry for i, entry in enumerate(value)]
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)


def _on_output(scope: Scope, function: Callable, module: nn.Module, args: tuple, output: object) -> object:
    if not scope.is_open:
        return None
    state = hidden(output)
    if state is None:
        _check_packed(module, output)
        raise InterventionError(
            f"{type(module).__name__} returned {type(output).__name__}, which holds no tensor; name a place inside it."
        )
    new = function(state, scope)
    return None if new is None else with_hidden(output, new)


def _on_input(scope: Scope, function: Callable, module: nn.Module, args: tuple, kwargs: dict | None = None) -> object:
    if not scope.is_open or kwargs is None:
        return None
    if isinstance(args[0] if args else None, Tensor):
        new = function(args[0], scope)
        return None if new is None else ((new, *args[1:]), kwargs)
    name = (
        "hidden_states"
        if "hidden_states" in kwargs
        else next(
            (key for key, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point()), None
        )
    )
    if name is None:
        _check_packed(module, args)
        raise InterventionError(
            f"{type(module).__name__} was called without a tensor to read or write; use io='output'."
        )
    new = function(kwargs[name], scope)
    return None if new is None else (args, {**kwargs, name: new})


def check_recomputable(module: nn.Module, scope: Scope) -> None:
    """Raise for a write inside a checkpoint of the model's own, whose recomputation would not see it any more."""
    if _checkpointed.get() or recomputes():
        return
    packing = torch._C._autograd._top_saved_tensors_default_hooks(False)
    kept = packing is not None and getattr(packing[0], "__qualname__", "").startswith("_checkpoint_hook")
    # The re-entrant kind switches autograd off and leaves no hook, only its frame on the stack.
    off = scope.call is not None and scope.call.graded and not torch.is_grad_enabled()
    if kept or (off and any(frame.f_code.co_filename == checkpoint.__file__ for frame, _ in walk_stack(None))):
        raise InterventionError(
            f"{type(module).__name__} runs inside torch.utils.checkpoint, called by the model itself, whose "
            "recomputation would not see what is written here; turn its checkpointing off, or run under "
            "torch.no_grad()."
        )


def _check_packed(module: nn.Module, value: object) -> None:
    if any(isinstance(entry, PackedSequence) for entry in (value, *(value if isinstance(value, tuple) else ()))):
        raise InterventionError(
            f"{type(module).__name__} takes and gives a PackedSequence, in which examples and tokens cannot be told "
            "apart; call it on a padded tensor."
        )


def _named(model: nn.Module, args: tuple, kwargs: dict) -> Mapping[str, object]:
    """The arguments of a call by name, those gathered in `**kwargs` included."""
    try:
        bound = signature(model.forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return kwargs
    return {**bound, **kwargs}


def call(model: nn.Module, inputs: object) -> object:
    """`model(**inputs)` for a mapping, `model(*inputs)` for a tuple or list, else `model(inputs)`."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def arguments_of(model: nn.Module, inputs: object) -> Mapping[str, object]:
    """What `call(model, inputs)` passes, by name."""
    if isinstance(inputs, Mapping):
        return _named(model, (), dict(inputs))
    return _named(model, tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {})


_lock = threading.RLock()
_missing = object()
_overrides: dict[tuple[int, str], list] = {}


def _override(module: nn.Module, name: str, make: Callable[[Any], object]) -> Callable[[], None]:
    """Replace an instance attribute by `make(original)`; returns what undoes it.

    Shared by all that need it: the first puts it in place and the last takes it away, in whatever order they end. The
    original is restored as it stood in `vars(module)`, because accelerate and others keep their own `forward` there.
    """
    with _lock:
        entry = _overrides.setdefault((id(module), name), [0, vars(module).get(name, _missing)])
        entry[0] += 1
        if entry[0] == 1:
            vars(module)[name] = make(getattr(module, name))

    def undo() -> None:
        with _lock:
            entry[0] -= 1
            if entry[0] == 0:
                del _overrides[id(module), name]
                if entry[1] is _missing:
                    del vars(module)[name]
                else:
                    vars(module)[name] = entry[1]

    return undo


def _replaying(module: nn.Module, original: Callable) -> Callable:
    """A `forward` that returns what an open scope recorded, if one does."""

    def forward(*args: object, **kwargs: object) -> object:
        for scope in reversed(_open.get()):
            if scope.replay is not None and module in scope.replayed:
                try:
                    return scope.replay(module)
                except LookupError:
                    break
        return original(*args, **kwargs)

    return forward


def _checkpointing(original: Callable, function: Callable, *args: object, **kwargs: object) -> object:
    """Gradient checkpointing whose recomputation sees the scopes of the forward it repeats, wherever it runs."""
    scopes = _open.get()
    if not scopes:
        return original(function, *args, **kwargs)
    states = [(scope, scope.call, scope.outside, _state(scope.generator)) for scope in scopes]

    def again(*args: object, **kwargs: object) -> object:
        token = _checkpointed.set(True)
        try:
            if not recomputes():
                return function(*args, **kwargs)
            with _reopened(states):
                return function(*args, **kwargs)
        finally:
            _checkpointed.reset(token)

    return original(again, *args, **kwargs)


@contextmanager
def _reopened(states: list[tuple[Scope, Call | None, Mapping | None, Tensor | None]]) -> Iterator[None]:
    now = [(scope, scope.call, scope.outside, _state(scope.generator), scope.recomputing) for scope, *_ in states]
    before = _open.get()
    for scope, going_on, outside, state in states:
        scope.acquire()
        scope.call, scope.outside, scope.recomputing = going_on, outside, True
        if scope.generator is not None and state is not None:
            scope.generator.set_state(state)
    _open.set(tuple(scope for scope, *_ in states))
    try:
        yield
    finally:
        _open.set(before)
        for scope, going_on, outside, state, recomputing in now:
            scope.call, scope.outside, scope.recomputing = going_on, outside, recomputing
            if scope.generator is not None and state is not None:
                scope.generator.set_state(state)
            scope.release()


def _state(generator: torch.Generator | None) -> Tensor | None:
    return None if generator is None else generator.get_state()


def _check_compiled(scope: Scope) -> None:
    parts = {scope.model, *(tap.module for tap in scope.taps)}
    for path, module in scope.model.named_modules():
        if isinstance(module, OptimizedModule) and any(inner in parts for inner in module.modules()):
            name = path or "model"
            raise InterventionError(
                f"{path or 'the model'} went through torch.compile(module), inside which hooks never fire; compile in "
                f"place with {name}.compile(), or pass the original: {name}._orig_mod."
            )
