"""The methods that stand in for those of a user's model while scopes are open: `forward`, `generate`, `deepcopy`."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from interventions.endings import ending
from interventions.errors import InterventionError
from interventions.hooks.attention import changing_attention
from interventions.hooks.attention_taps import tapped_attention
from interventions.hooks.compiled import compiled_forward, is_compiled, uncompiled
from interventions.hooks.replacements import restore_attributes, users_of
from interventions.hooks.scopes import Scope, acting, open_here
from interventions.models.calls import Generation, generation_of
from interventions.models.structure import structure_of


def make_forward(module: nn.Module) -> Callable:
    """Return a `forward` that returns what an open scope recorded, if one did, or runs with its attention tapped.

    One that was compiled runs as it was written where a scope acts inside of it, and compiled elsewhere.
    """
    original = module.forward
    compiled = None if module._compiled_call_impl is None else compiled_forward(module)

    def forward(*args: object, **kwargs: object) -> object:
        for scope in reversed(open_here()):
            if scope.replay is not None and module in scope.replayed and scope.users:
                try:
                    return scope.replay(module)
                except LookupError:
                    break
        attention = tapped_attention(module)
        kinds = {tap.kind for tap, _ in attention.taps}
        if kinds <= {"interface"}:  # its taps are called where transformers attends
            quick = original if is_compiled(original) else compiled
            if quick is None or any(module in scope.eager for scope in users_of(module, "forward")):
                return uncompiled(original)(*args, **kwargs)
            return quick(*args, **kwargs)
        with changing_attention(attention, products="sdpa" in kinds):
            return uncompiled(original)(*args, **kwargs)

    return forward


def make_generate(model: Any) -> Callable:
    """Return a `generate` that notes the generation in the open scopes of its model."""
    original = model.generate

    def generate(*args: Any, **kwargs: Any) -> object:
        before = [(scope, scope.generation) for scope in acting() if structure_of(scope.model).holds(model)]
        with ending(partial(_set_generations, before)):
            _set_generations([(scope, generation_of(model, args, kwargs)) for scope, _ in before])
            return original(*args, **kwargs)

    return generate


def _set_generations(generations: list[tuple[Scope, Generation | None]]) -> None:
    for scope, generation in generations:
        scope.generation = generation


def make_get_compiled_call(model: Any) -> Callable:
    """Return a `get_compiled_call` that gives `generate` the model itself: compiled, it would not see the scopes."""
    original = model.get_compiled_call

    def get_compiled_call(*args: Any, **kwargs: Any) -> Callable:
        is_tapped = any(structure_of(scope.model).holds(model) for scope in acting())
        return model.__call__ if is_tapped else original(*args, **kwargs)

    return get_compiled_call


def make_deepcopy(model: nn.Module) -> Callable:
    """Return a `__deepcopy__` that refuses to copy the model while a block is open on it."""

    def __deepcopy__(memo: Any) -> object:
        scopes = users_of(model, "__deepcopy__")
        if not any(scope.users for scope in scopes):  # their blocks are over, and an interrupt cut off their end
            for scope in scopes:
                scope.release(None)
            restore_attributes([model], ["__deepcopy__"])
            return copy.deepcopy(model, memo)
        raise InterventionError(
            "the model cannot be copied while a block is open on it: the copy would keep its hooks for ever; copy it "
            "before, or after the block."
        )

    return __deepcopy__
