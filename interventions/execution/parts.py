"""The part of a vector that a location names: some heads, some dims, or coordinates in a subspace.

A location names heads h₁ … hₖ and dims d₁ … dₙ of a vector x `[…, head, dim]`: its entries are x[…, h, d]. With a
subspace the part is the coordinates of those entries in it.
"""

import torch
from torch import Tensor

from interventions.devices import indices_on
from interventions.errors import InterventionError
from interventions.locations import Dims, Location
from interventions.models.axes import axis, to_vectors
from interventions.models.places import Place

_KEY_SITES = ("key", "value")
"""Sites with fewer heads than the query where heads share keys."""


def part_of(state: Tensor, location: Location, place: Place) -> Tensor:
    """Return the heads, dims or coordinates of an activation that a location names.

    Args:
        state: the activation at `place`, in the axes of the model.

    Returns:
        A tensor with the axes of `state`; with a subspace, `[batch, position, …, coordinate]`.

    Raises:
        InterventionError: a head or a dimension that the activation does not have.
    """
    axes = place.axes_of(state)
    if location.subspace is not None:
        return select_part(to_vectors(state, axes), location)
    if location.heads is not None:
        place.check_axes(state, location)
    for name, indices in (("h", location.heads), ("d", location.dims)):
        if indices is not None:
            _check_width(location, "heads" if name == "h" else "dims", indices, state.shape[axis(axes, name)])
            state = state.index_select(axis(axes, name), indices_on(state.device, indices))
    return state


def select_part(vectors: Tensor, location: Location) -> Tensor:
    """Return the part of vectors `[…, dim]` or `[…, head, dim]` that a location names."""
    return coordinates_of(select_entries(vectors, location), location)


def coordinates_of(entries: Tensor, location: Location) -> Tensor:
    """Return the coordinates of entries in the location's subspace, or the entries where it has none."""
    return entries if location.subspace is None else location.subspace.coordinates(entries)


def select_entries(vectors: Tensor, location: Location) -> Tensor:
    """Return the heads and dims of vectors that a location names, before a subspace is applied.

    Raises:
        InterventionError: a head or a dimension that the vectors do not have.
    """
    for name, indices, dim in (("heads", location.heads, -2), ("dims", location.dims, -1)):
        if indices is not None:
            _check_width(location, name, indices, vectors.shape[dim])
            vectors = _take(vectors, indices, dim)
    # In one layout, so that a subspace computes the same bits of base and source.
    return vectors if location.subspace is None else vectors.contiguous()


def replace_part(vectors: Tensor, value: Tensor, location: Location) -> Tensor:
    """Return `vectors` with `value` in place of the part that a location names."""
    if location.subspace is not None:
        value = location.subspace.replace(select_entries(vectors, location), value)
    if location.dims is not None:
        rows = vectors if location.heads is None else _take(vectors, location.heads, -2)
        value = _put(rows, value, location.dims, -1)
    return value if location.heads is None else _put(vectors, value, location.heads, -2)


def unmasked(scores: Tensor) -> Tensor:
    """Return attention scores with 0 in place of the lowest number, which marks masked keys."""
    return scores.masked_fill(is_masked(scores), 0)


def is_masked(scores: Tensor) -> Tensor:
    """Return which attention scores are of masked keys."""
    return scores < torch.finfo(scores.dtype).min / 4


def _take(vectors: Tensor, indices: Dims, dim: int) -> Tensor:
    """Return the entries of `vectors` with these indices along an axis."""
    if isinstance(indices, range) and indices.step == 1:
        return vectors.narrow(dim, indices.start, len(indices))
    return vectors.index_select(dim, indices_on(vectors.device, indices))


def _put(vectors: Tensor, value: Tensor, indices: Dims, dim: int) -> Tensor:
    """Return `vectors` with `value` at these indices along an axis."""
    if isinstance(indices, range):
        return torch.slice_scatter(vectors, value, dim, indices.start, indices.stop, indices.step)
    return vectors.index_copy(dim, indices_on(vectors.device, indices), value)


def _check_width(location: Location, name: str, indices: Dims, width: int) -> None:
    """Raise InterventionError for an index at or beyond the width of its axis."""
    if max(indices) >= width:
        site = location.site if location.module is None else location.io
        grouped = " key and value" if site in _KEY_SITES else ""
        what = f"there are {width}{grouped} heads" if name == "heads" else f"the width there is {width}"
        raise InterventionError(
            f"{location} names {name[:-1]} {max(indices)} and {what}; write {name}=range(0, {width})."
        )
