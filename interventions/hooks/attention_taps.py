"""The taps inside one attention: they see its query, key, value, scores, pattern and heads, and may replace them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from interventions.hooks.attention import attend, store_in_cache
from interventions.hooks.scopes import acting
from interventions.hooks.taps import Tap
from interventions.models.calls import CallContext


@dataclass(frozen=True, eq=False)
class TappedAttention:
    """One call of an attention whose states are put through taps, one after the other.

    Attributes:
        module: the attention.
        taps: each with the context in which it acts.
        cache: returns the cache that keeps keys and values for later steps; None where there is none.
        written: the sites at which a tap has replaced a state.
    """

    module: nn.Module
    taps: tuple[tuple[Tap, CallContext], ...]
    cache: Callable[[], object]
    written: set[str] = field(default_factory=set)

    @cached_property
    def sites(self) -> frozenset[str]:
        """The sites at which there are taps."""
        return frozenset(tap.io for tap, _ in self.taps)

    def __call__(self, site: str, state: Tensor) -> Tensor:
        for tap, context in self.taps:
            new = tap(state, context) if tap.io == site and context.is_open else None
            if new is not None:
                state = new
                self.written.update({site} if tap.writes else ())
        return state

    def store(self, site: str, old: Tensor, new: Tensor) -> None:
        """Store a changed key or value in the cache, so that later steps see it."""
        cache = self.cache()
        if cache is not None and site in self.written:
            store_in_cache(cache, f"{site}s", self.module, old, new)


def tapped_attention(module: nn.Module) -> TappedAttention:
    """Return the call of an attention that begins, with the taps of all open scopes, the outer ones first."""
    scopes = acting()
    taps = [(tap, scope) for scope in scopes for tap in scope.attentions.get(module, ()) if tap.has_turn(scope)]
    return TappedAttention(module, tuple(taps), partial(_cache_of, module))


def _cache_of(module: nn.Module) -> object:
    """Return the cache of an attention, where an open scope stores what it changes."""
    calls = [scope.call for scope in acting() if scope.stores]
    caches = [call.caches.get(module) for call in calls if call is not None]
    return next((cache for cache in caches if cache is not None), None)


def make_get_interface(interface: Any) -> Callable:
    """Return a `get_interface` of transformers whose attention functions put their states through the open taps."""
    original = interface.get_interface

    def get_interface(self: object, attn_implementation: str, default: Callable) -> Callable:
        implementation = original(self, attn_implementation, default)
        # Compiled blocks are never tapped; and the compiler cannot trace a ContextVar.
        if torch.compiler.is_compiling() or not any(scope.attentions for scope in acting()):
            return implementation
        return partial(_attend, implementation, default)

    return get_interface


def _attend(implementation: Callable, eager: Callable, module: nn.Module, *args: Any, **kwargs: Any) -> object:
    """Return what an attention function returns, with its states put through the open taps."""
    attention = tapped_attention(module)
    if not attention.sites:
        return implementation(module, *args, **kwargs)
    return attend(attention, implementation, eager, *args, **kwargs)
