"""Swaps and zeros as copies: one of the activation, into which slices of the source are copied.

They write the same bits as the operators do, in a few operations, none of which waits for the device.
"""

import torch
from torch import Tensor

from interventions.execution.targets import Known, as_selection
from interventions.locations import Dims, Location
from interventions.models.axes import in_layout
from interventions.positions import Columns, Selection, stretches_of

_MOST = 4
"""More slices than these take longer than an index of each vector."""


def is_plain(state: Tensor) -> bool:
    """Return whether slices can be copied into a tensor: it is of torch itself, and in no transform of `torch.func`."""
    if type(state) is not Tensor or state.layout is not torch.strided:
        return False
    return 1 < state.ndim < 6 and torch._C._functorch.peek_interpreter_stack() is None


def is_like(source: Tensor, state: Tensor) -> bool:
    """Return whether a source is of the kind of a state: its dtype, its device, its number of axes."""
    return (
        is_plain(source) and source.dtype == state.dtype and source.device == state.device and source.ndim == state.ndim
    )


def whole(state: Tensor, source: Tensor | None) -> Tensor:
    """Return a copy of the source, or zeros, in the memory layout of a state."""
    return in_layout(torch.zeros_like(state) if source is None else source.clone(), state)


Piece = tuple[slice | Selection, slice | Selection]
"""Tokens that are written, and those that are taken for them."""


def pieces_of(
    to: Selection | Columns | None, taken: Selection | Columns | None, width: int, known: Known
) -> tuple[Piece, ...]:
    """Return the tokens to copy, as slices where a few of them suffice.

    Args:
        to: the tokens that are written; None is all of them.
        taken: those that are taken, as many.
        width: the number of all tokens.
        known: what is known in the running call.
    """
    if to is None or taken is None:
        return ((slice(0, width), slice(0, width)),)
    if isinstance(to, Selection) or isinstance(taken, Selection):
        return ((as_selection(to), as_selection(taken)),)
    if len(to.numbers) == 1:
        a, b = to.numbers[0], taken.numbers[0]
        return ((slice(a, a + 1), slice(b, b + 1)),)
    key = ("pieces", id(to), id(taken))
    if key not in known:
        stretches = stretches_of(to.numbers, taken.numbers)
        few = tuple([(slice(a, a + length), slice(b, b + length)) for a, b, length in stretches])
        known[key] = few if len(few) <= _MOST else ((to.selection, taken.selection),), to, taken
    return known[key][0]


def cuts_of(location: Location, vectors: Tensor) -> list[tuple[int, int, int]] | None:
    """Return the heads and dims that a location names, each as an axis, its first and its number of entries.

    Returns:
        None where they are no stretch, or not all there.
    """
    cuts = []
    for indices, axis in ((location.heads, -2), (location.dims, -1)):
        if indices is not None:
            if not _is_stretch(indices) or vectors.ndim < 2 - axis or indices[-1] >= vectors.shape[axis]:
                return None
            cuts.append((axis, indices[0], len(indices)))
    return cuts


def _is_stretch(indices: Dims) -> bool:
    return indices[-1] - indices[0] == len(indices) - 1 and (len(indices) < 3 or list(indices) == sorted(indices))


def narrowed(vectors: Tensor, cuts: list[tuple[int, int, int]]) -> Tensor:
    """Return a view of the heads and dims of vectors."""
    for cut in cuts:
        vectors = vectors.narrow(*cut)
    return vectors


def read(vectors: Tensor, tokens: slice | Selection) -> Tensor:
    """Return the vectors of some tokens: of a slice a view."""
    if isinstance(tokens, slice):
        return vectors.narrow(1, tokens.start, tokens.stop - tokens.start)
    there = tokens.to(vectors.device)
    return vectors[there.rows, there.columns]


def put(vectors: Tensor, tokens: slice | Selection, value: Tensor | None) -> None:
    """Write a value, or zeros, into the vectors of some tokens."""
    if isinstance(tokens, slice):
        there = vectors.narrow(1, tokens.start, tokens.stop - tokens.start)
        there.zero_() if value is None else there.copy_(value)
        return
    places = tokens.to(vectors.device)
    vectors.index_put_((places.rows, places.columns), vectors.new_zeros(()) if value is None else value)


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors may lie in one memory; unknown of those that wrap others, as an all-reduced state."""
    try:
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    except RuntimeError:
        return True
