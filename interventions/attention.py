"""What happens inside an attention, with its query, key, value, scores, pattern and heads put through functions."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from interventions.errors import InterventionError

Change = Callable[[str, Tensor], Tensor]  # from a site and what is there to what shall be there
Store = Callable[[str, Tensor, Tensor], None]  # keeps a new key or value where the old one is cached

_SOFTMAX = frozenset({functional.softmax, torch.softmax, Tensor.softmax, torch.special.softmax})
_PATTERNS = frozenset({"attention_scores", "attention_pattern"})


def attend(
    implementation: Callable,
    eager: Callable,
    sites: frozenset[str],
    change: Change,
    store: Store,
    module: nn.Module,
    *states: Any,
    attention_mask: Any = None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """What an attention function of transformers returns, with everything at `sites` changed.

    Args:
        implementation: the function that the model would call.
        eager: the model's own eager function, called instead where scores or patterns are asked for.
        sites: those that are read or written; the others are left alone.
        states: query `[batch, head, position, dim]`, key and value, maybe of fewer heads, and maybe mask and settings.
    """
    query, key, value, *rest = states
    attention_mask, *rest = rest or [attention_mask]
    query, key, value = _entering(sites, change, store, module, (query, key, value))
    if sites & _PATTERNS:
        if implementation is not eager:
            attention_mask = _additive(attention_mask, module, query, key, settings)
        with Softmax(change, sites, keys=key.shape[-2]) as softmax:
            output, weights = eager(module, query, key, value, attention_mask, *rest, **settings)
        softmax.check(module)
    else:
        output, weights = implementation(module, query, key, value, attention_mask, *rest, **settings)
    if "attention_heads" in sites:
        _check_axes(output, "attention_heads", module)
        output = change("attention_heads", output)
    return output, weights


class Softmax(TorchFunctionMode):
    """Puts what a softmax is given and what it returns through functions, for the code that runs inside.

    Args:
        keys: how many keys there are. One more column is a sink, which is no key and stays.
        heads: how many heads lie beside the examples in tensors of three axes, `[batch · head, query, key]`.
    """

    def __init__(
        self, change: Change, sites: frozenset[str], *, keys: int | None = None, heads: int | None = None
    ) -> None:
        super().__init__()
        self.change, self.sites, self.keys, self.heads, self.count = change, sites, keys, heads, 0

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
        scores = self._changed("attention_scores", scores)
        return self._changed("attention_pattern", func(scores, *rest, **settings))

    def _changed(self, site: str, state: Tensor) -> Tensor:
        if site not in self.sites:
            return state
        flat = state.ndim == 3
        rows = state.unflatten(0, (-1, self.heads or 1)) if flat else state
        sinks = 0 if self.keys is None else rows.shape[-1] - self.keys
        if sinks not in (0, 1):
            raise InterventionError(
                f"the softmax runs over {rows.shape[-1]} entries and there are {self.keys} keys, so {site} cannot be "
                "told; name another site."
            )
        new = self.change(site, rows[..., : rows.shape[-1] - sinks] if sinks else rows)
        if sinks:
            new = torch.cat([new, rows[..., -sinks:]], -1)
        return new.flatten(0, 1) if flat else new

    def check(self, module: nn.Module) -> None:
        """Raise unless there was one softmax: else it is not known which one is meant."""
        if self.count > 1:
            raise InterventionError(
                f"{type(module).__name__} computed {self.count} softmaxes in one call (attention in pieces?), so its "
                "scores and pattern cannot be told; use attention_heads, or name another place."
            )


class Products(TorchFunctionMode):
    """The same for code that calls `scaled_dot_product_attention` itself."""

    def __init__(self, change: Change, sites: frozenset[str], module: nn.Module, store: Store) -> None:
        super().__init__()
        self.change, self.sites, self.module, self.store = change, sites, module, store

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attended(*args, **(kwargs or {}))

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **settings: Any) -> Tensor:
        query, key, value = _entering(self.sites, self.change, self.store, self.module, (query, key, value))
        if self.sites & _PATTERNS:
            with Softmax(self.change, self.sites, keys=key.shape[-2]):
                output = _eager_product(query, key, value, *args, **settings)
        else:
            output = functional.scaled_dot_product_attention(query, key, value, *args, **settings)
        if "attention_heads" in self.sites:
            output = _heads_first(self.change, "attention_heads", output, self.module)
        return output


def store_in_cache(cache: object, name: str, module: nn.Module, old: Tensor, new: Tensor) -> None:
    """Keep `new` in the cache where it holds `old`: a changed key or value is to be seen by later steps too.

    Args:
        name: "keys" or "values".

    Raises:
        InterventionError: the cache holds it in another form.
    """
    kept = [(i, layer, getattr(layer, name, None)) for i, layer in _layers(cache)]
    kept = [(i, layer, held) for i, layer, held in kept if isinstance(held, Tensor) and held.ndim == old.ndim]
    for _, layer, held in kept:
        if held is old:
            setattr(layer, name, new)
            return
        if _same_memory(held, old) and held.shape[-2] <= old.shape[-2]:  # a window: the last of what was attended to
            setattr(layer, name, new[..., new.shape[-2] - held.shape[-2] :, :])
            return
    index = getattr(module, "layer_idx", None)
    mine = next((layer for i, layer, held in kept if i == index and held.numel()), None)
    if mine is not None:
        raise InterventionError(
            f"the {type(mine).__name__} of {type(module).__name__} keeps its {name} in another form, so what is "
            "written would be lost at the next step; generate with use_cache=False."
        )


def _layers(cache: object) -> Iterator[tuple[int, Any]]:
    for part in (getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None)):
        yield from enumerate(getattr(part, "layers", ()))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _entering(
    sites: frozenset[str], change: Change, store: Store, module: nn.Module, states: tuple[Tensor, Tensor, Tensor]
) -> Iterator[Tensor]:
    for site, state in zip(("query", "key", "value"), states, strict=True):
        if site not in sites:
            yield state
            continue
        new = _heads_first(change, site, state, module)
        if site != "query" and new is not state:
            store(site, state, new)
        yield new


def _heads_first(change: Change, site: str, state: Tensor, module: nn.Module) -> Tensor:
    """`[batch, head, position, dim]` through a function of `[batch, position, head, dim]`."""
    _check_axes(state, site, module)
    turned = state.transpose(1, 2)
    new = change(site, turned)
    return state if new is turned else new.transpose(1, 2)


def _check_axes(state: Tensor, site: str, module: nn.Module) -> None:
    if state.ndim != 4:
        raise InterventionError(
            f"the {site} of {type(module).__name__} has shape {list(state.shape)}, in which heads cannot be told "
            "apart; name another place by path: Location(module='…')."
        )


def _additive(mask: Any, module: nn.Module, query: Tensor, key: Tensor, settings: dict[str, Any]) -> Tensor | None:
    """The mask as an eager function takes it: added to the scores."""
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
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention`, written out."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attn_mask
    pattern = functional.softmax(scores, -1)
    return functional.dropout(pattern, dropout_p, dropout_p > 0) @ value
