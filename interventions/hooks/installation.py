"""Puts the hooks and replaced methods of a scope on a user's model, and takes them off again.

When a block ends, the model is as it was, wherever an interrupt struck: what undoes a change is noted before the change
is made, and may run again.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, cast
from weakref import ReferenceType, ref

from torch import nn
from torch.nn.modules import module as torch_modules
from torch.utils.hooks import RemovableHandle

from interventions.hooks.attention_taps import make_get_interface
from interventions.hooks.checkpointing import checkpoint_under_scopes
from interventions.hooks.compiled import MARK, check_not_compiled, is_compiled
from interventions.hooks.methods import make_deepcopy, make_forward, make_generate, make_get_compiled_call
from interventions.hooks.replacements import Holder, Makes, replace_attributes, replaced, restore_attributes
from interventions.hooks.scopes import Scope, close_scope, open_here, open_scope
from interventions.hooks.taps import Tap
from interventions.models.structure import Structure, structure_of

_CHECKPOINTING = "_gradient_checkpointing_func"
_COMPILED_CALL = "_compiled_call_impl"
_numbers = count(-1, -1)


@contextmanager
def opened(scope: Scope) -> Iterator[Scope]:
    """Let `scope` act on its model inside the block.

    Raises:
        InterventionError: the model, or a part that is tapped, went through `torch.compile(module)`, where hooks
            never fire.
    """
    user = object()
    try:  # as `ending`, written out: a generator inside a generator takes as long as a hook
        try:
            try:
                scope.acquire(user, install)
                open_scope(scope)
                yield scope
            finally:
                _close(scope, user)
        finally:
            _close(scope, user)
    finally:
        _close(scope, user)


def _close(scope: Scope, user: object) -> None:
    if user in scope.users or scope.undos or scope.hooks or scope in open_here():
        scope.release(user)
        close_scope(scope)


def install(scope: Scope) -> None:
    """Put the hooks and replaced methods of a scope on its model."""
    structure = structure_of(scope.model)
    models = structure.unwrapped
    tapped = [scope.model, *[tap.module for tap in scope.taps]]
    around = structure.around(tapped)
    check_not_compiled(scope.model, around)
    for model in models:
        _hook_input(scope, model, scope.enter_model, prepend=True)
    for module in scope.watched:
        _hook_output(scope, module, scope.hand_on_output, prepend=True)
    for tap in scope.taps:
        _install_tap(scope, tap)
    for model in models:
        _hook_output(scope, model, scope.leave_model, always_call=True)
    generating = [part for part in structure.where("generates", _generates) if part not in models]
    for part in generating:
        _hook_input(scope, part, scope.enter_part, prepend=True)
        _hook_output(scope, part, scope.leave_part, always_call=True)
    for model in (*models, *generating):
        _replace(scope, [model], _methods_of(scope, model))
    checkpointing = [each for each in structure.where("checkpoints", _may_checkpoint) if _CHECKPOINTING in vars(each)]
    _replace(scope, checkpointing, {_CHECKPOINTING: _make_checkpointing})
    blocks = [block for tap in scope.taps if tap.after is not None for block in tap.after.stack.blocks]
    touched = [*scope.watched, *scope.replayed, *blocks, *generating, *checkpointing]
    _replace_forwards(scope, structure, around if not touched else structure.around([*tapped, *touched]))


def _replace_forwards(scope: Scope, structure: Structure, around: Sequence[nn.Module]) -> None:
    """Replace the `forward` of modules that are answered or compiled in place.

    Hooks run outside of compiled code, and what has some inside runs as it was written. Compiled modules in which this
    scope does nothing are left alone.

    Args:
        around: the modules in which the scope does something, and all those around them.
    """
    in_place, compiled = [], []
    for each in around:
        if each._compiled_call_impl is not None or (id(each), _COMPILED_CALL) in replaced:
            in_place.append(each)
        forward: Any = each.__dict__.get("forward") or type(each).forward
        if (id(each), "forward") in replaced or (hasattr(forward, MARK) and is_compiled(forward)):
            compiled.append(each)
    if in_place or compiled:
        above = set(structure.above(around))
        scope.eager.update(each for each in (*in_place, *compiled) if each in scope.attentions or each in above)
    _replace(scope, list(dict.fromkeys([*scope.replayed, *compiled, *in_place])), {"forward": make_forward})
    _replace(scope, in_place, {_COMPILED_CALL: _make_nothing})  # second, as `forward` is compiled as this was


def _generates(module: nn.Module) -> bool:
    return callable(getattr(type(module), "generate", None))


def _may_checkpoint(module: nn.Module) -> bool:
    """Return whether gradient checkpointing can be turned on for a module: transformers looks for this attribute."""
    return hasattr(module, "gradient_checkpointing") or _CHECKPOINTING in vars(module)


def _make_nothing(module: nn.Module) -> None:
    """Return None in place of a compiled call, so that the module runs as it was written."""


def _make_checkpointing(module: nn.Module) -> Callable:
    return partial(checkpoint_under_scopes, install, vars(module)[_CHECKPOINTING])


def _install_tap(scope: Scope, tap: Tap) -> None:
    if tap.after is not None:
        for block in dict.fromkeys(tap.after.stack.blocks):
            _hook_output(scope, block, partial(scope.note_block, tap), prepend=True)
    if tap.inside_attention:
        _install_attention_tap(scope, tap)
    elif tap.io == "input":
        _hook_input(scope, tap.module, partial(scope.tap_input, tap))
    else:
        _hook_output(scope, tap.module, partial(scope.tap_output, tap))
        if len(tap.module._forward_hooks) > 1:
            _capture_last(scope, tap.module)


def _install_attention_tap(scope: Scope, tap: Tap) -> None:
    if tap.kind == "interface":  # called in front of the functions with which transformers attends
        from transformers.modeling_utils import AttentionInterface

        _replace(scope, [AttentionInterface], {"get_interface": make_get_interface})
    else:
        _replace(scope, [tap.module], {"forward": make_forward})
    if tap.io in ("key", "value"):
        _hook_input(scope, tap.module, scope.note_cache)


def _methods_of(scope: Scope, model: nn.Module) -> Makes:
    """Return the methods of the model, or of a part that generates by itself, that are replaced."""
    makes: dict[str, Callable[[Any], object]] = {}
    if model is scope.model:
        makes["__deepcopy__"] = make_deepcopy
    if callable(getattr(model, "generate", None)):
        makes["generate"] = make_generate
    if callable(getattr(model, "get_compiled_call", None)):
        makes["get_compiled_call"] = make_get_compiled_call
    return makes


def _hook_input(scope: Scope, module: nn.Module, hook: Callable, *, prepend: bool = False) -> None:
    """Register a hook that is called before the forward of a module, with all arguments.

    It is put where torch keeps those of a module, as its `register_…_hook` does at several times the cost. The number
    of a hook is below zero, where torch gives none. So torch counts the hooks of users alone.
    """
    number, hooks, marks = next(_numbers), module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs
    scope.hooks.append((number, hooks, marks))
    marks[number] = True
    hooks[number] = hook
    if prepend:
        hooks.move_to_end(number, last=False)  # type: ignore[attr-defined]


def _hook_output(
    scope: Scope, module: nn.Module, hook: Callable, *, prepend: bool = False, always_call: bool = False
) -> None:
    """Register a hook that is called after the forward of a module, as `_hook_input` does."""
    number, hooks, marks = next(_numbers), module._forward_hooks, module._forward_hooks_always_called
    scope.hooks.append((number, hooks, marks))
    if always_call:
        marks[number] = True
    hooks[number] = hook
    if prepend:
        hooks.move_to_end(number, last=False)  # type: ignore[attr-defined]


def _replace(scope: Scope, holders: Sequence[Holder], makes: Makes) -> None:
    """Replace attributes of modules or classes by `make(holder)` while the scope is open."""
    if holders and makes:
        scope.undos.append(partial(restore_attributes, holders, makes, scope))
        replace_attributes(holders, makes, scope)


def _capture_last(scope: Scope, module: nn.Module) -> None:
    """Move the hooks with which transformers captures hidden states of a module behind the hooks of scopes.

    They stay on a model that once returned `output_hidden_states`, and would still see the state before a tap.
    """
    hooks = cast(OrderedDict, module._forward_hooks)
    order = list(hooks)
    capturing = [key for key in order if _captures(hooks[key])]
    if capturing:
        scope.undos.append(partial(_reorder, hooks, order))
    for key in capturing:
        hooks.move_to_end(key)


def _captures(hook: Callable) -> bool:
    """Return whether a hook is the one with which transformers captures hidden states, which stays on the model."""
    return getattr(hook, "__name__", "") == "output_capturing_hook"


def _reorder(hooks: OrderedDict, order: list[int]) -> None:
    """Put hooks back in an order, those that came later after them."""
    for key in [*order, *(key for key in list(hooks) if key not in order)]:
        if key in hooks:
            hooks.move_to_end(key)


def is_hooked(module: nn.Module) -> bool:
    """Return whether any hook sees the output of a module: of the user, of transformers or of an open scope."""
    return bool(module._forward_hooks)


def is_called_plainly(around: Sequence[nn.Module], head: nn.Module) -> bool:
    """Return whether nothing is lost if the calls of the modules around a head end before it, and it is called later.

    That is so without hooks of users on the head or around it, and without code of torch.compile or accelerate there.

    Args:
        around: the head and the modules around it.
        head: the head.
    """
    anywhere = torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks
    if anywhere or any(each._compiled_call_impl is not None or hasattr(each, "_hf_hook") for each in around):
        return False
    outputs = [hooks for each in (*around, *head.modules()) for hooks in (each._forward_hooks, each._backward_hooks)]
    inputs = [each._forward_pre_hooks for each in head.modules()]
    backward = any(each._backward_pre_hooks for each in (*around, *head.modules()))
    hooks = (pair for each in (*outputs, *inputs) for pair in each.items())
    return not backward and all(number < 0 or _captures(hook) for number, hook in hooks)


@dataclass(frozen=True, eq=False)
class _UserHooks:
    """The hooks of the user on a model, as they were found.

    Attributes:
        count: how many hooks torch had registered anywhere by then.
        ids: the id of each.
        where: the module, "input" or "output" and the number of each.
    """

    count: int
    ids: tuple[int, ...]
    where: tuple[tuple[ReferenceType[nn.Module], str, int], ...]

    @classmethod
    def of(cls, structure: Structure) -> "_UserHooks":
        """Return the hooks on the modules of a model."""
        count, ids, where = RemovableHandle.next_id, [], []
        for module in structure.modules_left():
            if not (module._forward_pre_hooks or module._forward_hooks):
                continue
            for side, hooks in (("input", module._forward_pre_hooks), ("output", module._forward_hooks)):
                for number, hook in list(hooks.items()):  # at once: other threads add hooks meanwhile
                    if number >= 0 and not _captures(hook):
                        ids.append(id(hook))
                        where.append((ref(module), side, number))
        return cls(count, tuple(ids), tuple(where))

    @property
    def still_hold(self) -> bool:
        """True where no hook was registered since, and none of these removed."""
        return self.count == RemovableHandle.next_id and all(
            (module := each()) is not None
            and number in (module._forward_pre_hooks if side == "input" else module._forward_hooks)
            for each, side, number in self.where
        )


def user_hooks(model: nn.Module) -> tuple[int, ...]:
    """Return the ids of the hooks that the user put on a model, which tell whether they are still the same."""
    structure = structure_of(model)
    found: _UserHooks | None = structure.kept.get("user hooks")
    if found is None or not found.still_hold:
        found = structure.kept["user hooks"] = _UserHooks.of(structure)
    return found.ids
