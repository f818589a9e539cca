"""Change the query, key, value, scores, pattern and heads inside an attention while it is computed.

An attention computes scores S = QKᵀ / √d, the pattern P = softmax(S + mask), heads PV and from these its output.
Attention functions of transformers are called with changed states (`attend`); in other code the softmax or the call of
`scaled_dot_product_attention` is intercepted (`changing_attention`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from interventions.endings import ending
from interventions.errors import InterventionError
from interventions.models.attentions import heads_of

M = TypeVar("M", bound=TorchFunctionMode)
_SOFTMAX = frozenset({functional.softmax, torch.softmax, Tensor.softmax, torch.special.softmax})
_STATES = ("query", "key", "value", "attention_mask")
_PATTERNS = frozenset({"attention_scores", "attention_pattern"})


@runtime_checkable
class Change(Protocol):
    """A function from a site of one attention and the state there to a new state.

    Attributes:
        module: the attention.
        sites: the sites that it changes; the others are left alone.
    """

    @property
    def module(self) -> nn.Module: ...

    @property
    def sites(self) -> frozenset[str]: ...

    def __call__(self, site: str, state: Tensor) -> Tensor: ...

    def store(self, site: str, old: Tensor, new: Tensor) -> None:
        """Store a new key or value where the old one is cached."""


def attend(
    change: Change,
    implementation: Callable,
    eager: Callable,
    *states: Any,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return output and pattern of an attention function of transformers, with the states at the sites changed.

    Args:
        change: changes the states.
        implementation: the function that the model would call.
        eager: the eager function of the model, called instead where scores or patterns are changed.
        states: query `[batch, head, position, dim]`, key and value, which may have fewer heads, mask and further
            arguments of the function.
        settings: the arguments given by name.
    """
    given = dict(zip(_STATES, states, strict=False))
    named = {name: settings.pop(name) for name in _STATES if name in settings}
    query, key, value, attention_mask = (({"attention_mask": None} | given | named)[name] for name in _STATES)
    rest = states[len(_STATES) :]
    query, key, value = _change_inputs(change, query, key, value)
    module = change.module
    if change.sites & _PATTERNS:
        if implementation is not eager:
            attention_mask = _make_additive(attention_mask, module, query, key, settings)
        with _using_mode(Softmax(change, keys=key.shape[-2])) as softmax:
            output, weights = eager(module, query, key, value, attention_mask, *rest, **settings)
        softmax.check()
    else:
        output, weights = implementation(module, query, key, value, attention_mask, *rest, **settings)
    if "attention_heads" in change.sites:
        _check_axes(output, "attention_heads", module)
        output = change("attention_heads", output)
    return output, weights


class Softmax(TorchFunctionMode):
    """A mode of torch that changes the scores given to a softmax and the pattern it returns.

    Args:
        change: changes scores and pattern.
        keys: the number of keys. One more column is an attention sink, which is left alone.
        heads: the number of heads that share an axis with the examples in tensors `[batch · head, query, key]`.
    """

    def __init__(self, change: Change, *, keys: int | None = None, heads: int | None = None) -> None:
        super().__init__()
        self.change, self.keys, self.heads, self.count = change, keys, heads, 0

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        settings = dict(kwargs or {})
        if func not in _SOFTMAX:
            return func(*args, **settings)
        scores, *rest = args if args else (settings.pop("input"),)
        if scores.ndim != (4 if self.heads is None or scores.ndim == 4 else 3) or not scores.is_floating_point():
            return func(scores, *rest, **settings)
        self.count += 1
        scores = self._apply("attention_scores", scores)
        return self._apply("attention_pattern", func(scores, *rest, **settings))

    def _apply(self, site: str, state: Tensor) -> Tensor:
        """Return scores or pattern, changed if `change` has the site; a sink is left alone."""
        if site not in self.change.sites:
            return state
        flat = state.ndim == 3
        rows = state.unflatten(0, (-1, self.heads or 1)) if flat else state
        sinks = 0 if self.keys is None else rows.shape[-1] - self.keys
        if sinks not in (0, 1):
            raise InterventionError(
                f"the softmax runs over {rows.shape[-1]} entries and there are {self.keys} keys, so {site} is "
                "unknown; name another site."
            )
        new = self.change(site, rows[..., : rows.shape[-1] - sinks] if sinks else rows)
        if sinks:
            new = torch.cat([new, rows[..., -sinks:]], -1)
        return new.flatten(0, 1) if flat else new

    def check(self) -> None:
        """Raise InterventionError for several softmaxes: it is unknown which one is the attention."""
        _check_one(self.count, self.change, "softmaxes")


class Products(TorchFunctionMode):
    """A mode of torch that changes the states in a call of `scaled_dot_product_attention`."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change, self.count = change, 0

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.count += 1
        return self._attend(*args, **(kwargs or {}))

    def check(self) -> None:
        """Raise InterventionError for several calls: it is unknown which one is the attention."""
        _check_one(self.count, self.change, "products")

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **settings: Any) -> Tensor:
        """Return the heads that the product computes, with the states at the sites changed."""
        query, key, value = _change_inputs(self.change, query, key, value)
        if self.change.sites & _PATTERNS:
            with _using_mode(Softmax(self.change, keys=key.shape[-2])):
                output = _eager_product(query, key, value, *args, **settings)
        else:
            output = functional.scaled_dot_product_attention(query, key, value, *args, **settings)
        if "attention_heads" in self.change.sites:
            output = _change_heads_first(self.change, "attention_heads", output)
        return output


@contextmanager
def changing_attention(change: Change, *, products: bool) -> Iterator[None]:
    """Change the states of an attention that runs inside the block and is not computed by functions of transformers.

    Args:
        change: changes the states.
        products: whether the attention calls `scaled_dot_product_attention`; else it computes a softmax.
    """
    mode = Products(change) if products else Softmax(change, heads=heads_of(change.module))
    with _using_mode(mode):
        yield
    mode.check()


@contextmanager
def _using_mode(mode: M) -> Iterator[M]:
    """Put a mode on torch's functions inside the block, and take it off also where an interrupt skipped its exit."""

    def end() -> None:
        while any(torch._C._get_function_stack_at(i) is mode for i in range(torch._C._len_torch_function_stack())):
            torch._C._pop_torch_function_stack()

    with ending(end), mode:
        yield mode


def store_in_cache(cache: object, name: str, module: nn.Module, old: Tensor, new: Tensor) -> None:
    """Store a changed key or value in the cache in place of the old one, so that later steps see it.

    Args:
        name: "keys" or "values".
        module: the attention.

    Raises:
        InterventionError: the cache holds it in another form.
    """
    held = [(i, layer, getattr(layer, name, None)) for i, layer in _layers(cache)]
    alike = [(i, layer, state) for i, layer, state in held if isinstance(state, Tensor) and state.ndim == old.ndim]
    for _, layer, state in alike:
        if state is old:
            setattr(layer, name, new)
            return
        if _same_memory(state, old) and state.shape[-2] <= old.shape[-2]:  # a sliding window: the last keys
            setattr(layer, name, new[..., new.shape[-2] - state.shape[-2] :, :])
            return
    index = getattr(module, "layer_idx", None)
    own = next((layer for i, layer, state in alike if i == index and state.numel()), None)
    if own is not None:
        raise InterventionError(
            f"the {type(own).__name__} of {type(module).__name__} keeps its {name} in another form, so the "
            "write would be lost at the next step; generate with use_cache=False."
        )


def _layers(cache: object) -> Iterator[tuple[int, Any]]:
    """Yield the layers of a cache with their numbers, those of self-attention before those of cross-attention."""
    for part in (getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None)):
        yield from enumerate(getattr(part, "layers", ()))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _check_one(count: int, change: Change, what: str) -> None:
    """Raise InterventionError where an attention computed more than one softmax or product."""
    if count > 1:
        raise InterventionError(
            f"{type(change.module).__name__} computed {count} {what} in one call (attention in pieces?), so their "
            "states cannot be distinguished; use attention_output, or name another place."
        )


def _change_inputs(change: Change, *states: Tensor) -> Iterator[Tensor]:
    """Yield query, key and value, changed where `change` has the site; a new key or value is stored in the cache."""
    for site, state in zip(("query", "key", "value"), states, strict=True):
        new = _change_heads_first(change, site, state) if site in change.sites else state
        if site != "query" and new is not state:
            change.store(site, state, new)
        yield new


def _change_heads_first(change: Change, site: str, state: Tensor) -> Tensor:
    """Return a state `[batch, head, position, dim]`, changed by a function of `[batch, position, head, dim]`."""
    _check_axes(state, site, change.module)
    turned = state.transpose(1, 2)
    new = change(site, turned)
    return state if new is turned else new.transpose(1, 2)


def _check_axes(state: Tensor, site: str, module: nn.Module) -> None:
    """Raise InterventionError for a state without four axes, whose heads are unknown."""
    if state.ndim != 4:
        raise InterventionError(
            f"the {site} of {type(module).__name__} has shape {list(state.shape)}, in which heads cannot be "
            "distinguished; name another place by path: Location(module='…')."
        )


def _make_additive(mask: Any, module: nn.Module, query: Tensor, key: Tensor, settings: dict[str, Any]) -> Tensor | None:
    """Return the mask as an eager function takes it, to be added to the scores; None where nothing is masked."""
    if mask is None:
        causal = settings.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        length = query.shape[-2]
        if not causal or length == 1:
            return None
        mask = torch.ones(length, key.shape[-2], dtype=torch.bool, device=query.device).tril()[None, None]
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        kind = f"a mask of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise InterventionError(
            f"attention scores and patterns need eager attention, and this implementation gives {kind}; load the model "
            "with attn_implementation='sdpa' or 'eager'."
        )
    if mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, lowest)


def _eager_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *more: Any,
    **settings: Any,
) -> Tensor:
    """Return what `scaled_dot_product_attention` returns, computed with a softmax that can be intercepted."""
    named = dict(zip(("is_causal", "scale", "enable_gqa"), more, strict=False)) | settings
    if named.get("enable_gqa"):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    scale = named.get("scale")
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if named.get("is_causal"):
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    pattern = functional.softmax(scores, -1)
    return functional.dropout(pattern, dropout_p, dropout_p > 0) @ value
