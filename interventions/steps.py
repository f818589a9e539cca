"""Steps of a generation: which tokens of a call are written, by the step at which the model first read them.

Step 0 is the prompt, and step k the k-th generated token, which the model reads to generate the next one. Steps belong
to tokens and not to calls. So a model that generates without a cache, reading the whole sequence again for every token,
computes the same as one with a cache.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from interventions.arguments import is_whole, listed
from interventions.errors import InterventionError
from interventions.models.calls import Call
from interventions.models.places import Place
from interventions.names import shown
from interventions.positions import Columns, Positions, Selection, is_mask, select, select_columns

_MASK = re.compile("mask(?!ed)|padding", re.I)
_LENGTHS = re.compile("(^|_)len(gth)?s?$", re.I)
Steps = int | slice | range | Iterable[int] | None


def parse_steps(steps: object) -> slice | frozenset[int] | None:
    """Return `steps` as a slice or a set of numbers; None, all steps, stays None.

    Raises:
        InterventionError: `steps` is empty, or holds something else than whole numbers from 0 on.

    >>> sorted(parse_steps([2, 1])), parse_steps(slice(1, None))
    ([1, 2], slice(1, None, None))
    """
    if steps is None:
        return steps
    try:
        if isinstance(steps, slice):
            ends = (steps.start, steps.stop, steps.step)
            if steps.step == 0 or not all(each is None or is_whole(each) for each in ends):
                raise TypeError("not a number, or a step of 0")
            return steps
        steps = listed(steps) if isinstance(steps, Tensor) else steps
        several = isinstance(steps, Iterable) and not isinstance(steps, Mapping | bytes)
        entries: list[Any] = list(steps) if several else [steps]  # type: ignore[call-overload]
        if not all(map(is_whole, entries)):
            raise TypeError("not a number")
        numbers = frozenset(index(each) for each in entries)
    except TypeError as error:
        raise InterventionError(
            f"steps={shown(steps)} are not whole numbers; write steps=0 for the prompt, steps=[1, 2] or "
            "steps=slice(1, None) for all that is generated."
        ) from error
    if not numbers or min(numbers) < 0:
        raise InterventionError(
            f"steps={steps!r} {'holds ' + str(min(numbers)) if numbers else 'selects nothing'}; steps count from 0, "
            "the prompt; leave steps out for all."
        )
    return numbers


def steps_text(steps: slice | frozenset[int] | None) -> str:
    """Return parsed steps as a user writes them: `0`, `[1, 2]` or `slice(1, None, None)`."""
    if not isinstance(steps, frozenset):
        return repr(steps)
    return str(min(steps)) if len(steps) == 1 else str(sorted(steps))


def includes(step: int, steps: slice | frozenset[int] | None) -> bool:
    """Return whether a step is among the parsed `steps`."""
    if isinstance(steps, slice):
        return step in range(*steps.indices(step + 1))
    return steps is None or step in steps


@dataclass(eq=False)  # not frozen, which takes several times as long to make
class Window:
    """The tokens of the sequence that one activation holds.

    Attributes:
        batch: the number of sequences.
        reach: the length of the sequence so far, or that of the prompt if it is longer.
        total: the length of the sequence so far.
        offset: the number of tokens before the first of the activation.
        new: the number of tokens read in earlier calls. An activation that holds them again, as keys and values from
            a cache do, is written only from there on.
        prompt: the length of the prompt; None where it is not known.
        mask: True for each token up to `reach` that is no padding; None where none is padding, or nothing is counted.
    """

    batch: int
    reach: int
    total: int
    offset: int
    new: int
    prompt: int | None
    mask: Bool[Tensor, "batch token"] | None = None

    @cached_property
    def real(self) -> Bool[Tensor, "batch token"]:
        """True for each token up to `reach` that is no padding. Where nothing is counted, all are taken for real."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.batch, self.reach, dtype=torch.bool, device="cpu")

    def step_of(self, column: int) -> int:
        """Return the step at which a token, counted from the start of the sequence, was first read."""
        return 0 if self.prompt is None or column < self.prompt else column - self.prompt + 1


def select_steps(window: Window, steps: slice | frozenset[int] | None) -> Columns | None:
    """Return the tokens of the activation that belong to `steps`; None if these are all of them."""
    columns = [c for c in range(window.offset, window.total) if c >= window.new and includes(window.step_of(c), steps)]
    if len(columns) == window.total - window.offset:
        return None
    return Columns(window.batch, tuple([column - window.offset for column in columns]))


Named = tuple[Selection | Columns, Tensor | None]
"""The tokens that positions name at a step, and which of them are new; None is all of them."""


def select_positions(window: Window, steps: slice | frozenset[int] | None, positions: Positions) -> list[Named]:
    """Return, for each of `steps` in the activation, the tokens that `positions` selects and which of them are new.

    Positions count over the sequence as it is at that step, so −1 selects each generated token in turn. Columns count
    from the start of the sequence; a token is new if this call reads it for the first time.
    """
    parts: list[Named] = []
    for start, end in _new_ranges(window):
        if steps is not None and not includes(window.step_of(end - 1), steps):
            continue
        first, last = max(start, window.offset, window.new), min(end, window.total)
        same = select_columns(positions, window.batch, end) if window.mask is None else None
        if same is not None and first <= min(same.numbers) and max(same.numbers) < last:
            parts.append((same, None))
            continue
        named = select(_extend_mask(positions, end, window.prompt), window.real[:, :end]) if same is None else same
        columns = named.selection.columns if isinstance(named, Columns) else named.columns
        new = (columns >= first) & (columns < last)
        if new.any():
            parts.append((named, new))
    return parts


def _new_ranges(window: Window) -> list[tuple[int, int]]:
    """Return the first column, and the one after the last, of each step with new tokens in the activation."""
    if window.prompt is None or window.total <= window.prompt:
        return [(0, window.reach)]
    first = max(window.offset, window.new)
    generated = [(column, column + 1) for column in range(max(first, window.prompt), window.total)]
    return ([(0, window.prompt)] if first < window.prompt else []) + generated


def _extend_mask(positions: Positions, end: int, prompt: int | None) -> Positions:
    """Return the positions at a step that ends at `end`: a mask over the prompt is extended by False."""
    if is_mask(positions) and positions.ndim == 2 and prompt is not None and positions.shape[1] == prompt < end:
        return torch.nn.functional.pad(positions, (0, end - prompt))
    return positions


def window_of(
    vectors: Tensor, place: Place, call: Call | None, arguments: Sequence[Mapping[str, object]], positions: Positions
) -> Window:
    """Return the tokens of the sequence that `vectors`, `[batch, token, …]`, hold in one call of the model.

    If the place holds the sequence that the call reads, past, prompt and generated tokens are those of the call. In an
    encoder all tokens are there from the start. Its tensors are on the CPU, as counting positions reads many single
    numbers, each of which would wait for the device.

    Args:
        vectors: the activation.
        place: where it is in the model.
        call: the call in progress; None for a run of its own, such as that of a source.
        arguments: those of the model, and then those of `generate`; the padding mask is looked up in them, in order.
        positions: the positions to be counted. With None padding does not matter, and a boolean mask needs no
            padding mask.

    Raises:
        InterventionError: the tokens are not those of the sequence, or which of them are padding is not known.
    """
    batch, width = vectors.shape[:2]
    if call is None or place.side.encodes:
        reach, total, offset, new, prompt = width, width, 0, 0, None
    else:
        total, offset, new, prompt = _count_in_call(call, place, width)
        reach = max(total, prompt or 0)
    mask = None if positions is None else _find_mask(place, arguments, (batch, reach, prompt), positions)
    return Window(batch, reach, total, offset, new, prompt, mask)


def _count_in_call(call: Call, place: Place, width: int) -> tuple[int, int, int, int | None]:
    """Return `total`, `offset`, `new` and `prompt` of the window of an activation in a call that reads its sequence."""
    is_key, past = place.io in ("key", "value"), call.past
    slots = is_key and getattr(
        call.arguments.get("past_key_values"), "is_compileable", False
    )  # as long as a static cache
    tokens = call.tokens if call.tokens is not None and (past or slots) else width
    if past and not is_key and tokens != width:
        raise InterventionError(
            f"{place.path or 'the model'} holds {width} tokens in a call that reads {tokens}, {past} being in the "
            "cache, so their places in the sequence are not known; leave positions and steps out."
        )
    total = past + tokens
    known = call.prompt is not None and call.tokens is not None
    # An image makes the prompt longer than its tokens, so the generated tokens are counted from the end.
    prompt = total - (past + call.tokens - call.prompt) if known else None  # type: ignore[operator]
    return total, max(0, total - width), past if is_key else 0, prompt


def _find_mask(
    place: Place, arguments: Sequence[Mapping[str, object]], sizes: tuple[int, int, int | None], positions: Positions
) -> Bool[Tensor, "batch token"] | None:
    """Return True for each token that is no padding, by the first mask that fits the sequence or the prompt.

    Args:
        sizes: the number of sequences, their length, and that of the prompt.

    Returns:
        None where none is padding.
    """
    batch, reach, prompt = sizes
    first = None
    for number, each in enumerate(arguments):
        mask = each.get(place.mask)
        if not isinstance(mask, Tensor):
            continue
        first = mask if first is None else first
        mask = mask if number == 0 else _for_beams(mask, batch)
        for end in dict.fromkeys((reach, prompt or reach)):
            real = place.real({place.mask: mask}, batch, end) if mask.shape[-1] == end or end == reach else None
            if real is not None:  # generated tokens are no padding
                return None if real.all() else torch.nn.functional.pad(real, (0, reach - end), value=True)
    if is_mask(positions):
        return None
    if first is None:
        _check_named(place, arguments[0] if arguments else {}, batch, reach)
        return None
    raise InterventionError(
        f"the attention mask has shape {list(first.shape)} and there are [batch, token] = {[batch, reach]}, so "
        "positions cannot be counted over real tokens; name the tokens by a mask over all of them, "
        f"positions=torch.ones({batch}, {reach}).bool(), or leave positions out."
    )


def _check_named(place: Place, arguments: Mapping[str, object], batch: int, width: int) -> None:
    """Raise where a mask or lengths were passed under another name, so that positions may count padding."""
    if not place.side.supposed:
        return
    for name, value in arguments.items():
        if isinstance(value, Tensor) and _marks_padding(name, value.detach(), batch, width):
            raise InterventionError(
                f"positions at {place.path or 'the model'} count real tokens, and which are real is not known: the "
                f"model was given {name}, {list(value.shape)}, and no {place.mask}; if it is a mask of 1 where tokens "
                f"are real, interventions.register_blocks(type(model).__name__, masks={{'': {name!r}}}); else name "
                f"the tokens by a mask over all of them: positions=torch.ones({batch}, {width}).bool()."
            )


def _marks_padding(name: str, value: Tensor, batch: int, width: int) -> bool:
    """Return whether an argument looks like a mask with padding over these tokens, or like their lengths."""
    if _MASK.search(name) and value.shape == (batch, width):
        return set(value.unique().tolist()) == {0, 1}
    if _LENGTHS.search(name) and value.shape == (batch,) and not value.is_floating_point():
        return bool(((value >= 0) & (value <= width)).all()) and bool((value < width).any())
    return False


def _for_beams(mask: Tensor, batch: int) -> Tensor:
    """Return the mask with each example repeated, as `generate` does for beams and for several answers."""
    if mask.ndim == 2 and len(mask) and len(mask) < batch and batch % len(mask) == 0:
        return mask.repeat_interleave(batch // len(mask), 0)
    return mask
