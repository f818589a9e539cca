"""Puts the hooks and replaced methods of a scope on a user's model, and takes them off again.

When a block ends, the model is as it was, wherever an interrupt struck: what undoes a change is noted before the change
is made, and may run again.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import nn

from interventions.endings import ending
from interventions.hooks.attention_taps import make_get_interface
from interventions.hooks.checkpointing import checkpoint_under_scopes
from interventions.hooks.compiled import check_not_compiled, contains_any, is_compiled
from interventions.hooks.methods import make_deepcopy, make_forward, make_generate, make_get_compiled_call
from interventions.hooks.replacements import is_replaced, replace_attribute, restore_attribute
from interventions.hooks.scopes import Scope, close_scope, open_scope
from interventions.hooks.taps import Tap
from interventions.models.modules import modules_of
from interventions.models.wrappers import unwrapped

_CHECKPOINTING = "_gradient_checkpointing_func"
_COMPILED_CALL = "_compiled_call_impl"


@contextmanager
def opened(scope: Scope) -> Iterator[Scope]:
    """Let `scope` act on its model inside the block.

    Raises:
        InterventionError: the model, or a part that is tapped, went through `torch.compile(module)`, where hooks
            never fire.
    """
    check_not_compiled(scope.model, {tap.module for tap in scope.taps})
    user = object()
    with ending(partial(_close, scope, user)):
        scope.acquire(user, install)
        open_scope(scope)
        yield scope


def _close(scope: Scope, user: object) -> None:
    scope.release(user)
    close_scope(scope)


def install(scope: Scope) -> None:
    """Put the hooks and replaced methods of a scope on its model."""
    models = unwrapped(scope.model)
    for model in models:
        _hook_input(scope, model, scope.enter_model, prepend=True)
    for module in scope.watched:
        _hook_output(scope, module, scope.hand_on_output, prepend=True)
    for tap in scope.taps:
        _install_tap(scope, tap)
    for model in models:
        _hook_output(scope, model, scope.leave_model, always_call=True)
        _install_generation(scope, model)
    for part in modules_of(scope.model):
        if part not in models and callable(getattr(type(part), "generate", None)):
            _hook_input(scope, part, scope.enter_part, prepend=True)
            _hook_output(scope, part, scope.leave_part, always_call=True)
            _install_generation(scope, part)
    _replace(scope, scope.model, "__deepcopy__", partial(make_deepcopy, scope.model))
    for module in scope.replayed:
        _replace(scope, module, "forward", partial(make_forward, module))
    for module in modules_of(scope.model):
        if _CHECKPOINTING in vars(module):
            _replace(scope, module, _CHECKPOINTING, _make_checkpointing)
    _take_hooks_out_of_compiled_code(scope)


def _take_hooks_out_of_compiled_code(scope: Scope) -> None:
    """Let hooks run outside of code compiled in place, and what has some inside run as it was written.

    Compiled modules in which this scope does nothing are left alone.
    """
    touched: set[nn.Module] | None = None
    for module in modules_of(scope.model):
        in_place = module._compiled_call_impl is not None or is_replaced(module, _COMPILED_CALL)
        if not in_place and not is_compiled(module.forward) and not is_replaced(module, "forward"):
            continue
        touched = _touched(scope) if touched is None else touched
        if module in scope.attentions or contains_any(module, touched):
            scope.eager.add(module)
        elif module not in touched:
            continue
        _replace(scope, module, "forward", partial(make_forward, module))
        if in_place:  # second, as `forward` is compiled as this was
            _replace(scope, module, _COMPILED_CALL, lambda original: None)


def _touched(scope: Scope) -> set[nn.Module]:
    """Return the modules whose calls a scope sees or changes."""
    blocks = [block for tap in scope.taps if tap.after is not None for block in tap.after.stack.blocks]
    parts = [part for part in modules_of(scope.model) if _has_own_way(part)]
    return {*(tap.module for tap in scope.taps), *scope.watched, *scope.replayed, scope.model, *blocks, *parts}


def _has_own_way(module: nn.Module) -> bool:
    """Return whether a module generates by itself, or repeats calls of its parts for gradient checkpointing."""
    return callable(getattr(type(module), "generate", None)) or _CHECKPOINTING in vars(module)


def _make_checkpointing(original: Callable) -> Callable:
    return partial(checkpoint_under_scopes, install, original)


def _install_tap(scope: Scope, tap: Tap) -> None:
    for block in dict.fromkeys(tap.after.stack.blocks if tap.after is not None else ()):
        _hook_output(scope, block, partial(scope.note_block, tap), prepend=True)
    if tap.inside_attention:
        _install_attention_tap(scope, tap)
    elif tap.io == "input":
        _hook_input(scope, tap.module, partial(scope.tap_input, tap))
    else:
        _hook_output(scope, tap.module, partial(scope.tap_output, tap))
        _capture_last(scope, tap.module)


def _install_attention_tap(scope: Scope, tap: Tap) -> None:
    if tap.kind == "interface":  # called in front of the functions with which transformers attends
        from transformers.modeling_utils import AttentionInterface

        _replace(scope, AttentionInterface, "get_interface", make_get_interface)
    else:
        _replace(scope, tap.module, "forward", partial(make_forward, tap.module))
    if tap.io in ("key", "value"):
        _hook_input(scope, tap.module, scope.note_cache)


def _install_generation(scope: Scope, model: nn.Module) -> None:
    if callable(getattr(model, "generate", None)):
        _replace(scope, model, "generate", make_generate)
    if callable(getattr(model, "get_compiled_call", None)):
        _replace(scope, model, "get_compiled_call", partial(make_get_compiled_call, model))


def _hook_input(scope: Scope, module: nn.Module, hook: Callable, *, prepend: bool = False) -> None:
    """Register a hook that is called before the forward of a module."""
    hooks, others = module._forward_pre_hooks, [module._forward_pre_hooks_with_kwargs]
    scope.undos.append(partial(_remove_hook, hook, hooks, others))
    module.register_forward_pre_hook(hook, with_kwargs=True, prepend=prepend)


def _hook_output(
    scope: Scope, module: nn.Module, hook: Callable, *, prepend: bool = False, always_call: bool = False
) -> None:
    """Register a hook that is called after the forward of a module."""
    others = [module._forward_hooks_with_kwargs, module._forward_hooks_always_called]
    scope.undos.append(partial(_remove_hook, hook, module._forward_hooks, others))
    module.register_forward_hook(hook, prepend=prepend, always_call=always_call)


def _replace(scope: Scope, holder: nn.Module | type, name: str, make: Callable[[Any], object]) -> None:
    """Replace an attribute of a module or a class by `make(original)` while the scope is open."""
    scope.undos.append(partial(restore_attribute, holder, name, scope))
    replace_attribute(holder, name, scope, make)


def _remove_hook(hook: Callable, hooks: dict[int, Callable], others: list[dict[int, bool]]) -> None:
    """Remove a hook from a module, by itself: an interrupted registration returned no handle."""
    for key in [key for key, there in list(hooks.items()) if there is hook]:
        for other in others:
            other.pop(key, None)
        hooks.pop(key, None)


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


def user_hooks(model: nn.Module) -> tuple[int, ...]:
    """Return the ids of the hooks that the user put on a model, which tell whether they are still the same."""
    return tuple(
        id(hook)
        for module in modules_of(model)
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in list(hooks.values())  # at once: other threads add hooks meanwhile
        if not _is_of_scope(hook) and not _captures(hook)
    )


def _is_of_scope(hook: Callable) -> bool:
    """Return whether a hook is a method of a scope."""
    return isinstance(getattr(getattr(hook, "func", hook), "__self__", None), Scope)
