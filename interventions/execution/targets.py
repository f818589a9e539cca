"""The vectors to write in one call of a place, and those that their source gives: counted over the whole sequence.

They follow from positions, steps and padding, which most places of a call share. So what one write has worked out is
kept with the running call, and the others take it from there. All of it is worked out on the host; where masks or
positions lie on another device, they are copied to the host once in a call of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interventions.devices import is_on_host
from interventions.errors import InterventionError
from interventions.host_copies import kept_copy
from interventions.locations import Location
from interventions.models.calls import CallContext
from interventions.models.places import Place
from interventions.names import shown
from interventions.positions import Columns, Positions, Selection, is_mask, select, select_columns
from interventions.steps import Named, Window, select_positions, select_steps, window_of

Known = dict[Any, Any]
"""What is known in the running call of the model. Each entry holds the objects by whose ids its key tells them."""


@dataclass(eq=False)  # not frozen, which takes several times as long to make
class Targets:
    """The vectors to write in one call.

    Attributes:
        to: their rows and columns in the activation; None is all vectors.
        named: for each step of a generation, all tokens that the positions name then, in columns of the sequence, and
            which of them are written now. The vectors of a source follow the same order.
    """

    to: Selection | Columns | None
    named: Sequence[Named] = ()

    @property
    def is_nothing(self) -> bool:
        """True where no vector is written."""
        return self.to is not None and not len(self.to)


_ALL = Targets(None)


def known_in(context: CallContext) -> Known:
    """Return what is known in the running call of the model; nothing outside of one."""
    return {} if context.call is None else context.call.known


def find_targets(
    vectors: Tensor,
    context: CallContext,
    *,
    location: Location,
    place: Place,
    positions: Positions,
    steps: slice | frozenset[int] | None,
    of_source: Sequence[object] = (),
) -> Targets:
    """Return the vectors to write: those of the positions and steps that were not written in earlier calls.

    Args:
        vectors: the activation as `[batch, position, …, dims]`.
        context: the running call of the model.
        location: the location that is written.
        place: its place in the model.
        positions: the tokens to write; None is all of them.
        steps: the steps of a generation in which tokens are written; None is all of them.
        of_source: masks and positions of the source, which are copied to the host along with those of the base.

    Raises:
        InterventionError: the tokens of the vectors are unknown.
    """
    is_key = place.io in ("key", "value") and context.call is not None and context.call.past > 0
    if is_key and place.side.encodes:
        return Targets(Columns(len(vectors), ()))  # written before it was cached
    if positions is None and steps is None and not is_key:
        return _ALL
    if positions is not None:
        check_positions(vectors, location)
    elif vectors.ndim < 3:
        return _ALL  # without positions there are no steps
    known = known_in(context)
    moments = (steps.start, steps.stop, steps.step) if isinstance(steps, slice) else steps
    key = ("to", _key_of(positions), moments, *_key_of_window(vectors, place))
    kept = known.get(key)
    if kept is None:
        plain = steps is None and reads_all(vectors, context, place)
        named = select_columns(positions, vectors.shape[0], vectors.shape[1]) if plain else None
        if named is not None:
            targets = Targets(named, [(named, None)])
        else:
            running = [] if context.call is None else [context.call.arguments.get(place.mask)]
            _copy_to_host([*running, positions, *of_source], known)
            given = on_host(positions, known)
            window = _window(vectors, context, location=location, place=place, positions=given, steps=steps)
            targets = _targets_in(window, steps, given)
        kept = known[key] = targets, positions, place.side
    return kept[0]


def reads_all(vectors: Tensor, context: CallContext, place: Place) -> bool:
    """Return whether a call reads a whole sequence, none of which is padding, so that all tokens count."""
    call, side = context.call, place.side
    if call is None or call.past or call.generation is not None or call.prompt != call.tokens or context.unsure:
        return False
    if side.supposed or place.io in ("key", "value"):
        return False
    return pads_none(call.arguments.get(side.mask), vectors, call.known)


def pads_none(mask: object, vectors: Tensor, known: Known) -> bool:
    """Return whether a mask is none, or lies on the host and masks none of the tokens of an activation."""
    if not isinstance(mask, Tensor):
        return True
    if not is_on_host(mask) or mask.shape != vectors.shape[:2]:
        return False
    key = ("none masked", id(mask), _version_of(mask))
    kept = known.get(key)
    if kept is None:
        kept = known[key] = bool(mask.all()), mask
    return kept[0]


def _targets_in(window: Window, steps: slice | frozenset[int] | None, positions: Positions) -> Targets:
    """Return the vectors of a window to write."""
    if positions is None:
        return Targets(select_steps(window, steps))
    parts = select_positions(window, steps, positions)
    first, new = parts[0] if len(parts) == 1 else (None, None)
    if isinstance(first, Columns) and new is None:
        shift = window.offset
        to = Columns(window.batch, tuple([column - shift for column in first.numbers])) if shift else first
        return Targets(to, parts)
    none = torch.zeros(0, dtype=torch.long, device="cpu")
    chosen = [_chosen(*part) for part in parts]
    rows, columns = [each.rows for each in chosen], [each.columns - window.offset for each in chosen]
    return Targets(Selection(torch.cat([none, *rows]), torch.cat([none, *columns])), parts)


def find_taken(
    vectors: Tensor,
    known: Known,
    written: tuple[Targets, int],
    *,
    location: Location,
    place: Place,
    mask: Tensor | None,
    positions: Positions,
) -> Selection | Columns:
    """Return the vectors of a source that positions name, in the order of the written ones.

    Args:
        vectors: the activation of the source as `[batch, position, …, dims]`.
        known: what is known in the running call.
        written: the vectors to write, and the number of examples of the base.
        location: the location that is written.
        place: where the source was read.
        mask: which of its tokens are real; None is all of them.
        positions: the tokens to take.

    Raises:
        InterventionError: base and source differ in examples, or in the tokens of an example.
    """
    check_positions(vectors, location)
    targets, batch = written
    key = ("taken", id(targets), id(mask), _version_of(mask), _key_of(positions), *_key_of_window(vectors, place))
    kept = known.get(key)
    if kept is None:
        if len(vectors) != batch:
            raise InterventionError(
                f"the base has {batch} examples and the source of {location} {len(vectors)}; give one source an "
                "example (beams and several answers repeat each prompt: repeat_interleave the source as often)."
            )
        selected = select_in_source(vectors, known, place=place, mask=mask, positions=positions)
        kept = known[key] = _follow(selected, targets, batch), targets, mask, positions, place.side
    return kept[0]


def _follow(selected: Selection | Columns, targets: Targets, batch: int) -> Selection | Columns:
    """Return, of the selected tokens of a source, those for the tokens that are written now, in their order."""
    if isinstance(selected, Columns) and isinstance(targets.to, Columns) and len(selected) == len(targets.to):
        return selected
    tokens = as_selection(selected)
    for named, _ in targets.named:
        _check_counts(as_selection(named).counts(batch), tokens.counts(batch))
    parts = [_chosen(tokens, new) for _, new in targets.named]
    return Selection(torch.cat([part.rows for part in parts]), torch.cat([part.columns for part in parts]))


def _check_counts(counts: Tensor, source_counts: Tensor) -> None:
    """Raise InterventionError where base and source differ in the tokens of an example."""
    if not torch.equal(counts, source_counts):
        row = int((counts != source_counts).nonzero()[0])
        raise InterventionError(
            f"positions selects {int(counts[row])} tokens of base row {row} and {int(source_counts[row])} of its "
            "source; give source_positions=… with as many, e.g. a list of lists."
        )


def select_in_source(
    vectors: Tensor, known: Known, *, place: Place, mask: Tensor | None, positions: Positions
) -> Selection | Columns:
    """Return the tokens of a source that positions name, counted over real tokens."""
    given = on_host(positions, known)
    same = select_columns(given, len(vectors), vectors.shape[1]) if mask is None else None
    if same is not None:
        return same
    window = window_of(vectors, place, None, [{place.mask: on_host(mask, known)}], given)
    same = select_columns(given, window.batch, window.reach) if window.mask is None else None
    return select(given, window.real) if same is None else same


def on_host(value: Any, known: Known) -> Any:
    """Return positions or a mask on the host; those on another device are copied once in a call of the model."""
    if not isinstance(value, Tensor) or is_on_host(value):
        return value
    key = ("host", *_key_of(value))
    if key not in known:
        kept = kept_copy(value)
        if kept is None and value.is_meta:
            raise InterventionError(
                f"positions or a mask, {shown(value)}, lie on the device meta and hold no values; give them on another "
                "one, e.g. positions=[0, -1]."
            )
        known[key] = value.cpu() if kept is None else kept, value
    return known[key][0]


def _copy_to_host(values: Sequence[object], known: Known) -> None:
    """Copy several masks and positions to the host at once, for `on_host`, so that a device is waited for once."""
    away = [each for each in values if isinstance(each, Tensor) and not (is_on_host(each) or each.is_meta)]
    away = [each for each in away if not (each.is_floating_point() or each.is_complex()) and kept_copy(each) is None]
    if len(away) < 2:
        return
    away = list({_key_of(value): value for value in away if ("host", *_key_of(value)) not in known}.values())
    if len({value.device for value in away}) != 1:
        return
    copied = torch.cat([value.flatten().long() for value in away]).cpu().split([value.numel() for value in away])
    for value, copy in zip(away, copied, strict=True):
        known["host", *_key_of(value)] = copy.reshape(value.shape).to(value.dtype), value


def _chosen(named: Selection | Columns, new: Tensor | None) -> Selection:
    """Return the tokens that are new."""
    tokens = as_selection(named)
    return tokens if new is None else Selection(tokens.rows[new], tokens.columns[new])


def as_selection(tokens: Selection | Columns) -> Selection:
    """Return tokens row by row."""
    return tokens.selection if isinstance(tokens, Columns) else tokens


def vectors_of(vectors: Tensor, tokens: Selection | Columns | None) -> Tensor:
    """Return the vectors of some tokens, `[n, …, dims]`; all of them for None."""
    if tokens is None:
        return vectors
    selection = as_selection(tokens).to(vectors.device)
    return vectors[selection.rows, selection.columns]


def last_of(tokens: Selection | Columns) -> int:
    """Return the number of the last token."""
    return max(tokens.numbers) if isinstance(tokens, Columns) else int(tokens.columns.max())


def _key_of(positions: object) -> Any:
    """Return what tells positions from others: an int, or the object itself and its version."""
    return positions if positions is None or type(positions) is int else (id(positions), _version_of(positions))


def _version_of(value: object) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _key_of_window(vectors: Tensor, place: Place) -> tuple[Any, ...]:
    """Return what tells the window of an activation from others in one call."""
    shape = vectors.shape
    return shape[0], shape[1], id(place.side), place.lengths, place.io in ("key", "value")


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
    known = known_in(context)
    key = ("window", None if positions is None else is_mask(positions), *_key_of_window(vectors, place))
    if key not in known:
        arguments = [each.arguments for each in (call, generation) if each is not None]
        for number, each in enumerate(arguments):
            mask = each.get(place.mask)
            if mask is not (copy := on_host(mask, known)):
                arguments[number] = {**each, place.mask: copy}
        known[key] = window_of(vectors, place, call, arguments, positions), place.side
    return known[key][0]


def check_positions(vectors: Tensor, location: Location) -> None:
    """Raise InterventionError for vectors without an axis of positions."""
    if vectors.ndim < 3:
        raise InterventionError(
            f"{location} has no positions: its shape is {list(vectors.shape)}, [batch, dims]; leave positions out."
        )
