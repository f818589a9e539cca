"""Checks that what is written fits where it is written: the source, the value of an operator, the logits of a loss."""

from torch import Tensor

from interventions.errors import InterventionError
from interventions.execution.parts import coordinates_of
from interventions.execution.targets import last_of
from interventions.locations import Location
from interventions.models.calls import CallContext
from interventions.models.places import Place
from interventions.operators import Operator
from interventions.positions import Columns, Positions, Selection

_PATTERNS = ("attention_scores", "attention_pattern")
"""The places of which each vector is a row over the keys, and so as wide as the text is long."""


def check_fits(vectors: Tensor, location: Location, io: str, source: Tensor, read: Location) -> None:
    """Raise InterventionError for vectors of another shape than the written ones, from another model or place.

    Args:
        vectors: the entries at the location that is written.
        location: that location.
        io: its place in its module.
        source: the entries at the location that is read.
        read: the location that is read.
    """
    shape, source_shape = coordinates_of(vectors, location).shape, coordinates_of(source, read).shape
    leading = 1 if vectors.ndim < 3 else 2
    if len(shape) == len(source_shape) and (io in _PATTERNS or shape[leading:] == source_shape[leading:]):
        return
    raise InterventionError(
        f"{location} is {list(shape)} where it is written and {read} is {list(source_shape)} where it is read, so the "
        f"vectors do not fit; name parts of one size: dims=range(0, {min(shape[-1], source_shape[-1])}) in at= and in "
        "source_at={…: …}."
    )


def check_shapes(
    vectors: Tensor,
    source: Tensor,
    to: Selection | Columns | None,
    context: CallContext,
    *,
    location: Location,
    io: str,
    positions: Positions,
) -> None:
    """Raise InterventionError for a source that lacks vectors to write, or has others.

    Args:
        vectors: the activation that is written, `[batch, position, …, dims]`.
        source: that of the source.
        to: the vectors to write; None is all of them.
        context: the running call of the model.
        location: the location that is written.
        io: its place in its module.
        positions: the positions that say which vectors; None is no positions.
    """
    fits = source.shape == vectors.shape if to is None else _outside_of_tokens(source) == _outside_of_tokens(vectors)
    if fits and (to is None or last_of(to) < source.shape[1]):
        return
    raise InterventionError(
        f"{location} has shape {list(vectors.shape)} in the base run and {list(source.shape)} in the source run; "
        + (
            "swap in the prompt only: steps=0."
            if positions is None and context.call is not None and context.call.past > 0
            else "each of its rows is one of keys, so both must be as long; pad both batches to one length."
            if io in _PATTERNS and positions is not None
            else "pad both batches to one length, or say which tokens: positions=… and source_positions=…."
        )
    )


def check_value(value: object, base: Tensor, op: Operator, location: Location) -> None:
    """Raise InterventionError for a value of an operator that is no tensor like the base."""
    if not isinstance(value, Tensor) or value.shape != base.shape or value.dtype != base.dtype:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InterventionError(
            f"operator {op!r} returned {got} for {base.dtype} {list(base.shape)} at {location}; return a tensor like "
            "its first argument, e.g. value.expand_as(base).to(base.dtype)."
        )


def check_labels(place: Place, context: CallContext) -> None:
    """Raise InterventionError for logits that are written after the model has computed its loss from them."""
    if place.io == "logits" and context.call is not None and context.call.arguments.get("labels") is not None:
        raise InterventionError(
            "logits are written when the loss has been computed from the old ones; leave labels out and compute the "
            "loss from the output: cross_entropy(output.logits, labels)."
        )


def _outside_of_tokens(vectors: Tensor) -> tuple[int, ...]:
    """Return the shape of vectors without the axis of tokens."""
    return (vectors.shape[0], *vectors.shape[2:])
