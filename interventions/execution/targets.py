"""The vectors to write in one call of a place: those of positions and steps, counted over the whole sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from interventions.errors import InterventionError
from interventions.locations import Location
from interventions.models.calls import CallContext
from interventions.models.places import Place
from interventions.positions import Positions, Selection
from interventions.steps import Window, select_positions, select_steps, window_of


@dataclass(frozen=True, eq=False)
class Targets:
    """The vectors to write in one call.

    Attributes:
        to: their rows and columns in the activation; None is all vectors.
        named: for each step of a generation, all tokens that the positions name then, in columns of the sequence, and
            which of them are written now. The vectors of a source follow the same order.
    """

    to: Selection | None
    named: list[tuple[Selection, Tensor]]

    @property
    def is_nothing(self) -> bool:
        """True where no vector is written."""
        return self.to is not None and not len(self.to.rows)


def find_targets(
    vectors: Tensor,
    context: CallContext,
    *,
    location: Location,
    place: Place,
    positions: Positions,
    steps: slice | frozenset[int] | None,
) -> Targets:
    """Return the vectors to write: those of the positions and steps that were not written in earlier calls.

    Args:
        vectors: the activation as `[batch, position, …, dims]`.
        context: the running call of the model.
        location: the location that is written.
        place: its place in the model.
        positions: the tokens to write; None is all of them.
        steps: the steps of a generation in which tokens are written; None is all of them.

    Raises:
        InterventionError: the tokens of the vectors are unknown.
    """
    is_key = place.io in ("key", "value") and context.call is not None and context.call.past > 0
    if is_key and place.side.encodes:
        return Targets(Selection(*torch.zeros(2, 0, dtype=torch.long)), [])  # written before it was cached
    if positions is None and steps is None and not is_key:
        return Targets(None, [])
    if positions is not None:
        check_positions(vectors, location)
    elif vectors.ndim < 3:
        return Targets(None, [])  # without positions there are no steps
    window = _window(vectors, context, location=location, place=place, positions=positions, steps=steps)
    if positions is None:
        return Targets(select_steps(window, steps), [])
    parts = select_positions(window, steps, positions)
    rows = [named.rows[new] for named, new in parts]
    columns = [named.columns[new] - window.offset for named, new in parts]
    none = torch.zeros(0, dtype=torch.long)
    return Targets(Selection(torch.cat([none, *rows]), torch.cat([none, *columns])), parts)


def _window(
    vectors: Tensor,
    context: CallContext,
    *,
    location: Location,
    place: Place,
    positions: Positions,
    steps: slice | frozenset[int] | None,
) -> Window:
    """Return the tokens that the vectors belong to; raise InterventionError where these are unknown."""
    call = context.call
    generation = context.generation if call is None else call.generation
    apart = place.side.encodes and not place.mask  # the tokens of the call are not those of the encoder
    if call is None and generation is None and not apart:
        raise InterventionError(
            f"{location} ran outside a call of the model itself, so padding is unknown; call the model that "
            "was passed to intervene, or leave positions and steps out."
        )
    if context.unsure and not place.side.encodes:
        raise InterventionError(
            f"{location}: {context.unsure}, so prompt and generated tokens cannot be distinguished; "
            "generate without that, or leave positions and steps out."
        )
    if steps is not None and call is not None and call.past and call.prompt is None:
        raise InterventionError(
            f"steps at {location} cannot be counted: this block began when the cache held {call.past} tokens "
            "already; open it before the prompt is read, or leave steps out."
        )
    arguments = [each.arguments for each in (call, generation) if each is not None]
    return window_of(vectors, place, call, arguments, positions)


def check_positions(vectors: Tensor, location: Location) -> None:
    """Raise InterventionError for vectors without an axis of positions."""
    if vectors.ndim < 3:
        raise InterventionError(
            f"{location} has no positions: its shape is {list(vectors.shape)}, [batch, dims]; leave positions out."
        )
