"""Tell which axes of an activation are examples, positions and dims, and bring them into one order and back."""

from collections.abc import Iterator

from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor, nn

from interventions.errors import InterventionError

_CHANNELS_SECOND = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d, nn.MaxPool1d, nn.AvgPool1d)
_CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)
_DECIDING = (*_CONVOLUTIONS, nn.LayerNorm)
_CHANNELS_LAST = {4: "b x y d", 5: "b x y z d"}
_PLAIN = ("b d", "b t d", "b t h d")
_FEATURE_MAPS = {3: "b d x", 4: "b d x y", 5: "b d x y z"}
_PATTERNS = {2: "b d", 3: "b t d", **{n: pattern for n, pattern in _FEATURE_MAPS.items() if n > 3}}
_EXCHANGED = {"b h t d": (1, 2), "t b d": (0, 1), "t b h d": (0, 1), "b d x": (1, 2)}
"""The axes of which two stand in each other's place."""
_TIMED = (nn.MultiheadAttention, nn.RNNBase)


def axes_of(module: nn.Module, state: Tensor) -> str:
    """Return the axes of an input or output of `module` as an einops pattern: b example, d dim, others positions.

    Two axes are `[batch, dims]` and three `[batch, token, dims]`. Four and five axes are feature maps: dims last where
    the module computes on the last axis (linear, layer norm), else channels second. Channels are second in the three
    axes of one-dimensional convolutions, too, and of modules made of them. Recurrent and attention modules that are
    not `batch_first` have time first.

    Raises:
        InterventionError: fewer than two axes, or more than five.
    """
    if state.ndim == 3 and _time_first(module):
        return "t b d"
    if state.ndim == 3 and (isinstance(module, _CHANNELS_SECOND) or _convolves(module, state)):
        return _FEATURE_MAPS[3]
    if state.ndim in _CHANNELS_LAST and _works_on_last(module, state.shape[-1]):
        return _CHANNELS_LAST[state.ndim]
    pattern = _PATTERNS.get(state.ndim)
    if pattern is None:
        raise InterventionError(
            f"{type(module).__name__} gives a tensor of shape {list(state.shape)}, whose examples and dims cannot be "
            "distinguished; name a place with [batch, dims], [batch, token, dims] or [batch, channels, …]."
        )
    return pattern


def to_vectors(state: Shaped[Tensor, "..."], axes: str) -> Shaped[Tensor, "..."]:
    """Return `state` as `[batch, position, dims]`, with heads `[…, head, dims]`, without positions `[batch, dims]`."""
    if axes in _PLAIN:
        return state
    exchanged = _EXCHANGED.get(axes)
    return rearrange(state, f"{axes} -> {_vectors(axes)}") if exchanged is None else state.transpose(*exchanged)


def are_views(axes: str) -> bool:
    """Return whether vectors in these axes share the memory of their state, whatever its layout."""
    return axes in _PLAIN or axes in _EXCHANGED


def from_vectors(vectors: Shaped[Tensor, "..."], axes: str, like: Tensor) -> Shaped[Tensor, "..."]:
    """Return `vectors` in the axes and memory layout of `like`, so that the next module computes the same bits."""
    if axes in _PLAIN:
        return in_layout(vectors, like)
    if axes in _EXCHANGED:
        return in_layout(vectors.transpose(*_EXCHANGED[axes]), like)
    sizes = dict(zip(axes.split(), like.shape, strict=True))
    return in_layout(rearrange(vectors, f"{_vectors(axes)} -> {axes}", **sizes), like)


def in_layout(state: Tensor, like: Tensor) -> Tensor:
    """Return `state` in the memory layout of `like`: itself, or a copy."""
    return state if state.stride() == like.stride() else like.detach().clone().copy_(state)


def axis(axes: str, name: str) -> int:
    """Return the number of the axis that holds the examples (b), heads (h) or dims (d)."""
    return axes.split().index(name)


def _vectors(axes: str) -> str:
    return f"b ({' '.join(name for name in axes.split() if name not in 'bhd')}) {'h ' if 'h' in axes else ''}d"


def _works_on_last(module: nn.Module, width: int) -> bool:
    """Return whether a module, or a part of it, computes on the last axis, which is `width` wide."""
    inner = [part for part in module.modules() if not any(True for _ in part.children())]
    if any(isinstance(part, nn.Conv2d | nn.Conv3d | nn.BatchNorm2d | nn.BatchNorm3d) for part in inner):
        return False
    widths = (getattr(part, name, None) for part in inner for name in ("in_features", "out_features", "nf", "nx"))
    shapes = (getattr(part, "normalized_shape", None) for part in inner)
    return width in widths or (width,) in shapes


def _convolves(module: nn.Module, state: Tensor) -> bool:
    """Return whether the second of three axes is as wide as the one-dimensional convolutions of a module.

    Where the last axis is as wide too, the first part of the module decides: a convolution, or a norm of the last axis.
    """
    parts: list[nn.Module] = []
    for part in _inside(module):
        if isinstance(part, nn.Linear):  # most blocks hold one, and then the search ends early
            return False
        if isinstance(part, _DECIDING):
            parts.append(part)
    convolutions = [part for part in parts if isinstance(part, _CONVOLUTIONS)]
    widths = {width for part in convolutions for width in (part.in_channels, part.out_channels)}
    if state.shape[1] not in widths:
        return False
    return state.shape[-1] not in widths or parts[0] is convolutions[0]


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and those inside it, each once, in the order of `modules()`, which takes several times as long."""
    seen: set[nn.Module | None] = {None}
    waiting: list[nn.Module | None] = [module]
    while waiting:
        part = waiting.pop()
        if part not in seen:
            seen.add(part)
            yield part  # type: ignore[misc]
            waiting.extend(reversed(part._modules.values()))  # type: ignore[union-attr]


def _time_first(module: nn.Module) -> bool:
    """Return whether a module, or an attention or recurrent layer of torch right in it, has time first."""
    flags = [part.batch_first for part in (module, *module._modules.values()) if isinstance(part, _TIMED)]
    if flags:
        return not all(flags)
    states_it = "batch_first" in vars(module) or hasattr(type(module), "batch_first")
    return states_it and getattr(module, "batch_first", None) is False
