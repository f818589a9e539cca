"""Tell which axes of an activation are examples, positions and dims, and bring them into one order and back."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from interventions.errors import InterventionError

_CHANNELS_SECOND = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d, nn.MaxPool1d, nn.AvgPool1d)
_CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)
_CHANNELS_LAST = {4: "b x y d", 5: "b x y z d"}
_PLAIN = ("b d", "b t d", "b t h d")
_FEATURE_MAPS = {3: "b d x", 4: "b d x y", 5: "b d x y z"}


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
    pattern = {2: "b d", 3: "b t d", **{n: p for n, p in _FEATURE_MAPS.items() if n > 3}}.get(state.ndim)
    if pattern is None:
        raise InterventionError(
            f"{type(module).__name__} gives a tensor of shape {list(state.shape)}, whose examples and dims cannot be "
            "distinguished; name a place with [batch, dims], [batch, token, dims] or [batch, channels, …]."
        )
    return pattern


def to_vectors(state: Float[Tensor, "..."], axes: str) -> Float[Tensor, "..."]:
    """Return `state` as `[batch, position, dims]`, with heads `[…, head, dims]`, without positions `[batch, dims]`."""
    return state if axes in _PLAIN else rearrange(state, f"{axes} -> {_vectors(axes)}")


def from_vectors(vectors: Float[Tensor, "..."], axes: str, like: Tensor) -> Float[Tensor, "..."]:
    """Return `vectors` in the axes and memory layout of `like`, so that the next module computes the same bits."""
    sizes = dict(zip(axes.split(), like.shape, strict=True))
    state = vectors if axes in _PLAIN else rearrange(vectors, f"{_vectors(axes)} -> {axes}", **sizes)
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
    parts = [part for part in module.modules() if isinstance(part, (*_CONVOLUTIONS, nn.Linear, nn.LayerNorm))]
    convolutions = [part for part in parts if isinstance(part, _CONVOLUTIONS)]
    widths = {width for part in convolutions for width in (part.in_channels, part.out_channels)}
    if state.shape[1] not in widths or any(isinstance(part, nn.Linear) for part in parts):
        return False
    return state.shape[-1] not in widths or parts[0] is convolutions[0]


def _time_first(module: nn.Module) -> bool:
    """Return whether a module, or an attention or recurrent layer of torch right in it, has time first."""
    own = nn.MultiheadAttention | nn.RNNBase
    flags = [part.batch_first for part in (module, *module.children()) if isinstance(part, own)]
    return not all(flags) if flags else getattr(module, "batch_first", None) is False
