"""The one file that touches hooks, `forward` and other attributes of the user's model.

A `Scope` is what one open block does to one model. It acts only in the context (thread, task) that opened it: every
hook asks a ContextVar first. When it closes, the model is as it was, wherever an interrupt struck: what undoes a change
is noted before the change is made, and may run again.
"""

import copy
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from traceback import walk_stack
from types import FrameType, MethodType
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from interventions.endings import ending, one_at_a_time, setting
from interventions.errors import InterventionError
from interventions.hooks.attention import attend, store_in_cache, tapped
from interventions.hooks.states import argument_in, at, path_in, with_argument, with_new
from interventions.locations import HEAD_SITES
from interventions.models.calls import Call, Generation, Progress, begin, generation_of, named
from interventions.models.final_norms import AfterBlocks
from interventions.models.modules import modules_of
from interventions.models.places import Place
from interventions.models.wrappers import unwrapped

_lock = threading.RLock()
_open: ContextVar[tuple["Scope", ...]] = ContextVar("open_scopes", default=())
_CHECKPOINTING = "_gradient_checkpointing_func"
_checkpointed: ContextVar[bool] = ContextVar("checkpointed", default=False)


class Stopped(BaseException):
    """Ends a run early, from inside the model. Not an Exception, so that no model code catches it."""


@dataclass(frozen=True)
class Tap:
    """A function on what a module is given, returns or computes: from the state and its scope to a new one, or None.

    Attributes:
        io: as in `interventions.models.places.Place`.
        heads: into how many heads the last axis is divided before the function sees it.
        kind: of the attention, where `io` is inside one.
        writes: whether what it returns is another state, and not a copy of the same.
        turn: in which call of the module, of those in one call of the model; None is every one.
        unflattens: whether examples and tokens that lie on one axis are told apart before the function sees them.
        after: of a final norm, the blocks after which it must run; other calls of it are passed over.
    """

    module: nn.Module
    io: str
    function: Callable[[Tensor, "Scope"], Tensor | None]
    heads: int | None = None
    kind: str = ""
    writes: bool = True
    turn: int | None = None
    unflattens: bool = False
    after: AfterBlocks | None = None

    @classmethod
    def at(cls, place: Place, function: "Callable[[Tensor, Scope], Tensor | None]", *, writes: bool = True) -> "Tap":
        """The tap at a place.

        Raises:
            InterventionError: an operation inside a forward, where no hook is.
        """
        if place.operations:
            raise InterventionError(
                f"the operation {'.'.join(place.operations)!r} lies inside the forward of {place.path or 'the model'}, "
                "which hooks cannot open and nnsight does; pass NNsight(model): from nnsight import NNsight."
            )
        return cls(
            place.module, place.io, function, place.heads, place.kind, writes, place.turn, place.unflattens, place.after
        )

    def __call__(self, state: Tensor, scope: "Scope") -> Tensor | None:
        call = scope.call if self.unflattens and state.ndim == 2 else None
        if call is not None and call.tokens and len(state) == call.tokens * (call.examples or 0):
            new = self.function(state.unflatten(0, (-1, call.tokens)), scope)
            return None if new is None else new.flatten(0, 1)
        if self.heads is None:
            return self.function(state, scope)
        new = self.function(state.unflatten(-1, (self.heads, -1)), scope)
        return None if new is None else new.flatten(-2)

    @property
    def inside_attention(self) -> bool:
        """Whether it is on what an attention computes."""
        return self.io in HEAD_SITES


@dataclass(eq=False)
class Scope:
    """What one open block does to one model.

    Attributes:
        taps: the functions, in the order in which they act on one place.
        raw_outputs: called with a module and what its forward returned, before any hook saw it; for `watched` modules.
        replay: asked for what `forward` of a `replayed` module returns; it may raise `LookupError` to have it run.
        generator: of the operators, so that a recomputed forward draws what the first one drew.
        outside: in a resumed run, the states that the default generators have outside of it, from which operators draw.
        call: the call of the model that is going on; `last` is the one before.
        generation: the call of `generate` that is going on.
        unsure: why prompt and generated tokens cannot be told apart; here they can.
        stores: whether a changed key or value is kept in the cache; not where nobody is given that.
        progress: as of a call, where parts of the model are called by themselves.
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
    last: Call | None = None
    generation: Generation | None = None
    prompts: WeakKeyDictionary = field(default_factory=WeakKeyDictionary)
    recomputing: bool = False
    stores: bool = True
    unsure: str = ""
    progress: dict[int, Progress] = field(default_factory=dict)
    _undos: list[Callable[[], None]] = field(default_factory=list)
    _users: set[object] = field(default_factory=set)
    _installed: bool = False

    @one_at_a_time(_lock)
    def acquire(self, user: object) -> None:
        """Put the hooks in place for a user, unless they are."""
        self._users.add(user)
        if not self._installed:
            self._undo()  # what another thread has not undone yet, after an interrupt
            self._install()
            self._installed = True

    @one_at_a_time(_lock)
    def release(self, user: object) -> None:
        """Take the hooks away when nobody needs them any more."""
        self._users.discard(user)
        if not self._users:
            self._installed = False
            self._undo()

    def _undo(self) -> None:
        while self._undos:
            self._undos[-1]()
            self._undos.pop()

    def _install(self) -> None:
        models = unwrapped(self.model)
        for model in models:
            self._before(model, self._enter_model, prepend=True)
        for module in self.watched:
            self._after(module, self._raw, prepend=True)
        for tap in self.taps:
            for block in dict.fromkeys(tap.after.stack.blocks if tap.after is not None else ()):
                self._after(block, partial(self._note_block, tap), prepend=True)
            if tap.inside_attention:
                self._install_attention(tap)
            elif tap.io == "input":
                self._before(tap.module, partial(_on_input, self, tap))
            else:
                self._after(tap.module, partial(_on_output, self, tap))
                self._capture_last(tap.module)
        for model in models:
            self._after(model, self._leave_model, always_call=True)
            self._install_generation(model)
        for part in modules_of(self.model):
            if part not in models and callable(getattr(type(part), "generate", None)):
                self._before(part, self._enter_part, prepend=True)
                self._after(part, self._leave_part, always_call=True)
                self._install_generation(part)
        self._override(self.model, "__deepcopy__", partial(_refusing_copies, self.model))
        for module in self.replayed:
            self._override(module, "forward", partial(_forwarding, module))
        touched = {*(tap.module for tap in self.taps), *self.watched, *self.replayed, self.model}
        for module in modules_of(self.model):
            compiled = module._compiled_call_impl is not None or (id(module), "_compiled_call_impl") in _overrides
            if compiled and any(inner in touched for inner in modules_of(module)):
                self._override(module, "_compiled_call_impl", lambda original: None)
            compiled = _is_compiled(module.forward) or (id(module), "forward") in _overrides
            if compiled and any(inner in touched for inner in modules_of(module)):
                self._override(module, "forward", partial(_forwarding, module))
            if _CHECKPOINTING in vars(module):
                self._override(module, _CHECKPOINTING, lambda original: partial(_checkpointing, original))

    def _install_generation(self, model: nn.Module) -> None:
        if callable(getattr(model, "generate", None)):
            self._override(model, "generate", _generating)
        if callable(getattr(model, "get_compiled_call", None)):
            self._override(model, "get_compiled_call", partial(_uncompiled, model))

    def _install_attention(self, tap: Tap) -> None:
        if tap.kind == "interface":  # a function of ours in front of those that transformers attends with
            from transformers.modeling_utils import AttentionInterface

            self._override(AttentionInterface, "get_interface", _interfacing)
        else:
            self._override(tap.module, "forward", partial(_forwarding, tap.module))
        if tap.io in ("key", "value"):
            self._before(tap.module, self._note_cache)

    def _before(self, module: nn.Module, hook: Callable, *, prepend: bool = False) -> None:
        hooks, others = module._forward_pre_hooks, [module._forward_pre_hooks_with_kwargs]
        self._undos.append(partial(_take_off, hook, hooks, others))
        module.register_forward_pre_hook(hook, with_kwargs=True, prepend=prepend)

    def _after(self, module: nn.Module, hook: Callable, *, prepend: bool = False, always_call: bool = False) -> None:
        others = [module._forward_hooks_with_kwargs, module._forward_hooks_always_called]
        self._undos.append(partial(_take_off, hook, module._forward_hooks, others))
        module.register_forward_hook(hook, prepend=prepend, always_call=always_call)

    def _override(self, holder: nn.Module | type, name: str, make: Callable[[Any], object]) -> None:
        self._undos.append(partial(_restore, holder, name, self))
        _override(holder, name, self, make)

    def _capture_last(self, module: nn.Module) -> None:
        """Have transformers note the hidden states of a module after our hooks.

        Its hooks stay on a model that once returned `output_hidden_states`, and would go on to see what was there
        before.
        """
        hooks = cast(OrderedDict, module._forward_hooks)
        order = list(hooks)
        capturing = [key for key in order if _captures(hooks[key])]
        if capturing:
            self._undos.append(partial(_reorder, hooks, order))
        for key in capturing:
            hooks.move_to_end(key)

    def has_turn(self, tap: Tap) -> bool:
        """Whether this is the call of its module that a tap is meant for; asked once in each call."""
        if tap.turn is None or self.call is None:
            return tap.turn in (None, 0)
        return self.call.turn_of(tap) == tap.turn

    @property
    def is_open(self) -> bool:
        """Whether the scope was opened in this context, and not closed in another one since."""
        return bool(self._users) and self in _open.get()

    def frames(self) -> Iterator[FrameType]:
        """What the model is in the middle of, the innermost first."""
        return (frame for frame, _ in walk_stack(None))

    @cached_property
    def attentions(self) -> dict[nn.Module, list[Tap]]:
        """The taps inside each attention module."""
        found: dict[nn.Module, list[Tap]] = {}
        for tap in self.taps:
            if tap.inside_attention:
                found.setdefault(tap.module, []).append(tap)
        return found

    # torch adds a hook in two steps, so another thread may call it without kwargs in between: hence their default.
    def _enter_model(self, model: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        if self.is_open:
            arguments = named(model, args, kwargs or {})
            self.call = begin(
                model,
                arguments,
                generation=self.generation,
                outer=self.call,
                before=self.last,
                prompts=self.prompts,
            )

    def _leave_model(self, model: nn.Module, args: tuple, output: object) -> None:
        if self.is_open and self.call is not None:
            self.last, self.call = self.call, self.call.outer

    def _enter_part(self, part: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        """A part generates by itself, past the model, as the language model of BLIP-2 does."""
        if self.call is None and self.generation is not None and self.generation.module is part:
            self._enter_model(part, args, kwargs)

    def _leave_part(self, part: nn.Module, args: tuple, output: object) -> None:
        if self.call is not None and self.call.module is part and self.call.outer is None:
            self._leave_model(part, args, output)

    def _note_cache(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        if self.is_open and self.call is not None:
            given = (*args, *(kwargs or {}).values())  # under one name or another
            self.call.caches[module] = next((each for each in given if hasattr(each, "get_seq_length")), None)

    def progress_of(self, tap: Tap) -> Progress:
        """How far the stack before a final norm has come in this call."""
        return (self.progress if self.call is None else self.call.progress).setdefault(id(tap.after), Progress())

    def _note_block(self, tap: Tap, module: nn.Module, args: tuple, output: object) -> None:
        if tap.after is not None and self.is_open:
            tap.after.note(module, self.progress_of(tap))

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
    user = object()
    with ending(partial(_close, scope, user)):
        scope.acquire(user)
        _open.set((*_open.get(), scope))
        yield scope


def _close(scope: Scope, user: object) -> None:
    scope.release(user)
    # Not reset(token): a generator may be closed in another context than the one it was started in.
    _open.set(tuple(other for other in _open.get() if other is not scope))


@contextmanager
def under(scopes: tuple[Scope, ...]) -> Iterator[None]:
    """Inside the block, these scopes act, and no others."""
    with setting(_open, scopes):
        yield


@contextmanager
def until_stopped() -> Iterator[None]:
    """Run until `Stopped` is raised, or to the end."""
    before = [(scope, scope.call) for scope in _open.get()]
    try:
        yield
    except Stopped:
        for scope, going_on in before:  # torch calls no hook of the model when a BaseException passes
            scope.call = going_on


def acting() -> tuple[Scope, ...]:
    """The scopes of this context that are still open: a context may be copied, and outlive the block."""
    return tuple(scope for scope in _open.get() if scope._users)


def open_scopes(model: nn.Module) -> tuple[Scope, ...]:
    """The scopes that act on `model` or on a part of it in this context, outermost first."""
    scopes = acting()
    parts = set(modules_of(model)) if scopes else ()
    return tuple(scope for scope in scopes if scope.model in parts or model in modules_of(scope.model))


def user_hooks(model: nn.Module) -> tuple[int, ...]:
    """What tells the hooks on `model` that are not ours from other such hooks."""
    return tuple(
        id(hook)
        for module in modules_of(model)
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in list(hooks.values())  # at once: other threads add theirs
        if not _is_ours(hook) and not _captures(hook)
    )


def own_forward(module: nn.Module) -> object:
    """The `forward` that somebody else gave to the module itself, past its class; None if nobody did."""
    replaced = _overrides.get((id(module), "forward"))
    own = vars(module).get("forward", _missing) if replaced is None else replaced.original
    return None if own is _missing or type(own).__module__.split(".")[0] == "nnsight" else own


def _is_ours(hook: Callable) -> bool:
    function = getattr(hook, "func", hook)
    return function in (_on_input, _on_output) or isinstance(getattr(function, "__self__", None), Scope)


def _captures(hook: Callable) -> bool:
    """Whether it is transformers' own, which notes the hidden states that a model is to return and then stays on it."""
    return getattr(hook, "__name__", "") == "output_capturing_hook"


def recomputes() -> bool:
    """Whether a backward pass is running, so that a forward now repeats an earlier one."""
    return torch._C._current_graph_task_id() != -1


def _take_off(hook: Callable, hooks: dict[int, Callable], others: list[dict[int, bool]]) -> None:
    """Remove a hook from a module, by itself: an interrupted registration returned no handle."""
    for key in [key for key, there in list(hooks.items()) if there is hook]:
        for other in others:
            other.pop(key, None)
        hooks.pop(key, None)


def _reorder(hooks: OrderedDict, order: list[int]) -> None:
    """Put hooks back in an order, those that came later after them."""
    for key in [*order, *(key for key in list(hooks) if key not in order)]:
        if key in hooks:
            hooks.move_to_end(key)


def _on_output(scope: Scope, tap: Tap, module: nn.Module, args: tuple, output: object) -> object:
    if not scope.is_open or not scope.has_turn(tap):
        return None
    if tap.after is not None and not tap.after.is_now(scope.progress_of(tap)):
        return None
    path = path_in(module, tap.io, output)
    new = tap(at(output, path), scope)
    return None if new is None else with_new(output, path, new)


def _on_input(scope: Scope, tap: Tap, module: nn.Module, args: tuple, kwargs: dict | None = None) -> object:
    if not scope.is_open or kwargs is None or not scope.has_turn(tap):
        return None
    name = argument_in(module, args, kwargs)
    new = tap(args[0] if name is None else kwargs[name], scope)
    return None if new is None else with_argument(module, args, kwargs, new)


def check_graded(module: nn.Module, scope: Scope) -> None:
    """Raise for what is kept inside a re-entrant checkpoint, where autograd is off: no gradient would reach it."""
    off = scope.call is not None and scope.call.graded and not torch.is_grad_enabled()
    if off and not recomputes() and (_checkpointed.get() or _in_checkpoint(scope)):
        raise InterventionError(
            f"{type(module).__name__} runs inside a re-entrant gradient checkpoint, where what is kept has no "
            "gradient; use activation_checkpointing_enable({'use_reentrant': False}), detach=True or torch.no_grad()."
        )


def _in_checkpoint(scope: Scope) -> bool:
    return any(frame.f_code.co_filename == checkpoint.__file__ for frame in scope.frames())


def check_recomputable(module: nn.Module, scope: Scope) -> None:
    """Raise for a write inside a checkpoint of the model's own, whose recomputation would not see it any more."""
    if _checkpointed.get() or recomputes():
        return
    packing = torch._C._autograd._top_saved_tensors_default_hooks(False)
    kept = packing is not None and getattr(packing[0], "__qualname__", "").startswith("_checkpoint_hook")
    # The re-entrant kind switches autograd off and leaves no hook, only its frame on the stack.
    off = scope.call is not None and scope.call.graded and not torch.is_grad_enabled()
    if kept or (off and _in_checkpoint(scope)):
        raise InterventionError(
            f"{type(module).__name__} runs inside torch.utils.checkpoint, called by the model itself, whose "
            "recomputation would not see what is written here; turn its checkpointing off, or run under "
            "torch.no_grad()."
        )


_missing = object()


@dataclass(eq=False)
class _Override:
    """An attribute that is replaced while scopes need it.

    The first one puts the replacement in place and the last takes it away, in whatever order they end. The original is
    restored as it stood in `vars(holder)`, because accelerate and others keep their own `forward` there.
    """

    holder: nn.Module | type
    original: object
    replacement: object
    users: WeakSet[Scope] = field(default_factory=WeakSet)
    is_placed: bool = False


_overrides: dict[tuple[int, str], _Override] = {}


@one_at_a_time(_lock)
def _override(holder: nn.Module | type, name: str, user: Scope, make: Callable[[Any], object]) -> None:
    """Replace an attribute of a module or a class by `make(original)`, until `_restore`."""
    entry = _overrides.get((id(holder), name))
    if entry is None:
        entry = _Override(holder, vars(holder).get(name, _missing), make(getattr(holder, name, None)))
    entry.users.add(user)
    _overrides[id(holder), name] = entry
    if not entry.is_placed:
        _put(holder, name, entry.replacement)
        entry.is_placed = True


@one_at_a_time(_lock)
def _restore(holder: nn.Module | type, name: str, user: Scope | None = None) -> None:
    """Put the original back, unless other scopes need the replacement."""
    entry = _overrides.get((id(holder), name))
    if entry is None:
        return
    if user is not None:
        entry.users.discard(user)
    if not entry.users:
        entry.is_placed = False
        _put(holder, name, entry.original)
        _overrides.pop((id(holder), name), None)


def _put(holder: nn.Module | type, name: str, value: object) -> None:
    if isinstance(holder, type):  # vars of a class cannot be written
        if value is not _missing:
            setattr(holder, name, value)
        elif name in vars(holder):
            delattr(holder, name)
    elif value is _missing:
        vars(holder).pop(name, None)
    else:
        vars(holder)[name] = value


def _forwarding(module: nn.Module, original: Callable) -> Callable:
    """A `forward` that returns what an open scope recorded, if one does, or runs with its attention tapped.

    One that was compiled, `model.forward = torch.compile(model.forward)`, runs as it was written.
    """
    original = _as_written(original)

    def forward(*args: object, **kwargs: object) -> object:
        for scope in reversed(acting()):
            if scope.replay is not None and module in scope.replayed:
                try:
                    return scope.replay(module)
                except LookupError:
                    break
        change = _changing(module)
        kinds = {tap.kind for tap, _ in change.taps}
        if kinds <= {"interface"}:  # whose taps are put through where transformers attends
            return original(*args, **kwargs)
        with tapped(change, products="sdpa" in kinds):
            return original(*args, **kwargs)

    return forward


@dataclass(frozen=True, eq=False)
class Changing:
    """Puts what an attention computes in one call through taps, one after the other.

    Attributes:
        module: the attention.
        taps: each with its scope, or what stands for one: the current call of a traced model.
        cache: finds what keeps keys and values for later steps; it gives None where nothing does.
    """

    module: nn.Module
    taps: tuple[tuple[Tap, Any], ...]
    cache: Callable[[], object]
    written: set[str] = field(default_factory=set)

    @cached_property
    def sites(self) -> frozenset[str]:
        """Where there are taps."""
        return frozenset(tap.io for tap, _ in self.taps)

    def __call__(self, site: str, state: Tensor) -> Tensor:
        for tap, scope in self.taps:
            new = tap(state, scope) if tap.io == site and scope.is_open else None
            if new is not None:
                state = new
                self.written.update({site} if tap.writes else ())
        return state

    def store(self, site: str, old: Tensor, new: Tensor) -> None:
        """Keep a changed key or value in the cache, so that later steps see it."""
        cache = self.cache()
        if cache is not None and site in self.written:
            store_in_cache(cache, f"{site}s", self.module, old, new)


def _changing(module: nn.Module) -> Changing:
    """What all open scopes do in the call that begins, the outer ones first."""
    scopes = acting()
    taps = [(tap, scope) for scope in scopes for tap in scope.attentions.get(module, ()) if scope.has_turn(tap)]
    return Changing(module, tuple(taps), partial(_cache_of, module))


def _cache_of(module: nn.Module) -> object:
    """The cache of an attention, where an open scope stores what it changes."""
    calls = [scope.call for scope in acting() if scope.stores]
    caches = [call.caches.get(module) for call in calls if call is not None]
    return next((cache for cache in caches if cache is not None), None)


def _interfacing(original: Callable) -> Callable:
    def get_interface(self: object, attn_implementation: str, default: Callable) -> Callable:
        implementation = original(self, attn_implementation, default)
        # Compiled blocks are none that anything is done to; and the compiler cannot trace a ContextVar.
        if torch.compiler.is_compiling() or not any(scope.attentions for scope in acting()):
            return implementation
        return partial(_attending, implementation, default)

    return get_interface


def _attending(implementation: Callable, eager: Callable, module: nn.Module, *args: Any, **kwargs: Any) -> object:
    change = _changing(module)
    if not change.sites:
        return implementation(module, *args, **kwargs)
    return attend(change, implementation, eager, *args, **kwargs)


def _generating(original: Callable) -> Callable:
    """A `generate` that lets the open scopes know."""
    model = cast(Any, original).__self__

    def generate(*args: Any, **kwargs: Any) -> object:
        before = [(scope, scope.generation) for scope in acting() if model in modules_of(scope.model)]
        with ending(partial(_set_generations, before)):
            _set_generations([(scope, generation_of(model, args, kwargs)) for scope, _ in before])
            return original(*args, **kwargs)

    return generate


def _set_generations(generations: list[tuple[Scope, Generation | None]]) -> None:
    for scope, generation in generations:
        scope.generation = generation


def _uncompiled(model: nn.Module, original: Callable) -> Callable:
    """What `generate` calls for a step: not the compiled model, which would not see the open scopes."""

    def get_compiled_call(*args: Any, **kwargs: Any) -> Callable:
        mine = any(model in modules_of(scope.model) for scope in acting())
        return model.__call__ if mine else original(*args, **kwargs)

    return get_compiled_call


def _refusing_copies(model: nn.Module, original: object) -> Callable:
    def __deepcopy__(memo: Any) -> object:
        scopes = list(_overrides[id(model), "__deepcopy__"].users)
        if not any(scope._users for scope in scopes):  # they are over, and something kept them from being undone
            for scope in scopes:
                scope.release(None)
            _restore(model, "__deepcopy__")
            return copy.deepcopy(model, memo)
        raise InterventionError(
            "the model cannot be copied while a block is open on it: the copy would keep its hooks for ever; copy it "
            "before, or after the block."
        )

    return __deepcopy__


def _checkpointing(original: Callable, function: Callable, *args: object, **kwargs: object) -> object:
    """Gradient checkpointing whose recomputation sees the scopes of the forward it repeats, wherever it runs."""
    scopes = acting()
    if not scopes:
        return original(function, *args, **kwargs)
    states = [(scope, _copied(scope.call), scope.outside, _state(scope.generator)) for scope in scopes]

    def again(*args: object, **kwargs: object) -> object:
        with setting(_checkpointed, True), _reopened(states) if recomputes() else nullcontext():
            return function(*args, **kwargs)

    return original(again, *args, **kwargs)


@contextmanager
def _reopened(states: list[tuple[Scope, Call | None, Mapping | None, Tensor | None]]) -> Iterator[None]:
    now = [(scope, scope.call, scope.outside, _state(scope.generator), scope.recomputing) for scope, *_ in states]
    user = object()

    def end() -> None:
        for scope, going_on, outside, state, again in now:
            _recall(scope, going_on, outside, state, again=again)
            scope.release(user)

    with ending(end), setting(_open, tuple(scope for scope, *_ in states)):
        for scope, going_on, outside, state in states:
            scope.acquire(user)
            _recall(scope, _copied(going_on), outside, state, again=True)
        yield


def _recall(scope: Scope, going_on: Call | None, outside: Mapping | None, state: Tensor | None, *, again: bool) -> None:
    """Set what a scope knows of a call to what it knew."""
    scope.call, scope.outside, scope.recomputing = going_on, outside, again
    if scope.generator is not None and state is not None:
        scope.generator.set_state(state)


def _copied(call: Call | None) -> Call | None:
    """The call as it is now: what is counted later is not counted in it."""
    return None if call is None else replace(call, turns=dict(call.turns))


def _state(generator: torch.Generator | None) -> Tensor | None:
    return None if generator is None else generator.get_state()


def _is_compiled(forward: Callable) -> bool:
    """Whether `torch.compile` made this function or method, and not one around it, which has the same attributes."""
    function = getattr(forward, "__func__", forward)
    return getattr(function, "_torchdynamo_wrapper_id", None) == id(function)


def _as_written(forward: Any) -> Callable:
    """What `torch.compile` was given, if it made this function; of a compiled method, bound as that is."""
    if not _is_compiled(forward):
        return forward
    written = forward._torchdynamo_orig_callable
    return MethodType(written, forward.__self__) if isinstance(forward, MethodType) else written


def _check_compiled(scope: Scope) -> None:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # it takes a second to import, and is where it was used
    if dynamo is None:
        return
    parts = {scope.model, *(tap.module for tap in scope.taps)}
    for module in modules_of(scope.model):
        if isinstance(module, dynamo.OptimizedModule) and any(inner in parts for inner in modules_of(module)):
            path = next(path for path, named_one in scope.model.named_modules() if named_one is module)
            name = path or "model"
            raise InterventionError(
                f"{path or 'the model'} went through torch.compile(module), inside which hooks never fire; compile in "
                f"place with {name}.compile(), or pass the original: {name}._orig_mod."
            )
