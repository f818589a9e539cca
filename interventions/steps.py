"""When, in a generation: which tokens of a call are written, by the step at which they were first read.

Step 0 is the prompt, step k the k-th generated token, read back to generate the next. Tokens belong to steps, and
not calls: so a model that generates without a cache, and reads the whole sequence again for every token, computes the
same as one with a cache.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from interventions.positions import Positions, Selection, is_mask, select

_MASK = re.compile("mask(?!ed)|padding", re.I)
_LENGTHS = re.compile("(^|_)len(gth)?s?$", re.I)
Steps = int | slice | range | Iterable[int] | None


def parse_steps(steps: object) -> slice | frozenset[int] | None:
    """`steps` in a form that `is_in` takes.

    Raises:
        InterventionError: no whole numbers from 0 on, or none at all.
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
        given: list[Any] = (
            list(steps) if isinstance(steps, Iterable) and not isinstance(steps, Mapping | bytes) else [steps]
        )
        if not all(map(is_whole, given)):
            raise TypeError("not a number")
        numbers = frozenset(index(each) for each in given)
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
    """The steps as one writes them."""
    if not isinstance(steps, frozenset):
        return repr(steps)
    return str(min(steps)) if len(steps) == 1 else str(sorted(steps))


def is_in(step: int, steps: slice | frozenset[int] | None) -> bool:
    """Whether a step is among those chosen."""
    if isinstance(steps, slice):
        return step in range(*steps.indices(step + 1))
    return steps is None or step in steps


@dataclass(frozen=True, eq=False)
class Span:
    """The tokens of a sequence that one activation holds.

    Attributes:
        real: which tokens of the sequence are no padding; it reaches to the end of the prompt at least. All of them
            where nobody asks.
        total: how long the sequence is so far.
        offset: how many tokens come before those of the activation.
        new: how many were read in earlier calls; an activation that holds them again (keys) is written only beyond.
        prompt: how many were not generated; None where that is not known.
    """

    real: Bool[Tensor, "batch token"]
    total: int
    offset: int
    new: int
    prompt: int | None

    def step_of(self, column: int) -> int:
        """The step at which a token was read."""
        return 0 if self.prompt is None or column < self.prompt else column - self.prompt + 1


def everything(span: Span, steps: slice | frozenset[int] | None) -> Selection | None:
    """The tokens of the activation that belong to `steps`; None if that is all of it."""
    columns = [c for c in range(span.offset, span.total) if c >= span.new and is_in(span.step_of(c), steps)]
    if len(columns) == span.total - span.offset:
        return None
    batch, device = len(span.real), span.real.device
    rows = torch.arange(batch, device=device).repeat_interleave(len(columns))
    return Selection(rows, (torch.tensor(columns, device=device, dtype=torch.long) - span.offset).repeat(batch))


def chosen(
    span: Span, steps: slice | frozenset[int] | None, positions: Positions
) -> list[tuple[Selection, Bool[Tensor, " n"]]]:
    """For each step of the activation: what `positions` names then, in columns of the sequence, and which of it is new.

    Positions count over the sequence as it is at each step: −1 is each token as it comes.
    """
    parts = []
    for start, end in _ends(span):
        if is_in(span.step_of(end - 1), steps):
            named = select(_until(positions, end, span.prompt), span.real[:, :end])
            new = (named.columns >= max(start, span.offset, span.new)) & (named.columns < min(end, span.total))
            if new.any():
                parts.append((named, new))
    return parts


def _ends(span: Span) -> list[tuple[int, int]]:
    """The first column, and the one behind the last, of each step that the activation holds new tokens of."""
    if span.prompt is None or span.total <= span.prompt:
        return [(0, span.real.shape[1])]
    first = max(span.offset, span.new)
    generated = [(column, column + 1) for column in range(max(first, span.prompt), span.total)]
    return ([(0, span.prompt)] if first < span.prompt else []) + generated


def _until(positions: Positions, end: int, prompt: int | None) -> Positions:
    """A mask over the prompt says no to what is generated."""
    if is_mask(positions) and positions.ndim == 2 and prompt is not None and positions.shape[1] == prompt < end:
        return torch.nn.functional.pad(positions, (0, end - prompt))
    return positions


def span_of(
    vectors: Tensor, place: Place, call: Call | None, arguments: Sequence[Mapping[str, object]], positions: Positions
) -> Span:
    """The tokens that `vectors`, `[batch, token, …]`, are of, in a call of the model.

    Past, prompt and generated tokens are those of the call where the place holds the sequence that it reads. Elsewhere
    all tokens are there from the start. It is on the CPU: counting positions asks for many single numbers, and each
    would wait for the device.

    Args:
        call: the call that is going on; None for a run by itself, as that of a source.
        arguments: what the model, and then what `generate` was called with, in which the padding mask is.
        positions: what is counted; with None padding does not matter, and a mask may name tokens of which nobody knows.

    Raises:
        InterventionError: tokens that are not those of the sequence; padding that cannot be told.
    """
    batch, width = vectors.shape[:2]
    if call is None or place.side.encodes:
        span = Span(torch.ones(batch, width, dtype=torch.bool), width, 0, 0, None)
    else:
        span = _within(call, place, batch, width)
    return span if positions is None else replace(span, real=_real(place, arguments, span, positions))


def _within(call: Call, place: Place, batch: int, width: int) -> Span:
    """The tokens of an activation of the sequence that a call reads, as if none were padding."""
    is_key, past = place.io in ("key", "value"), call.past
    slots = is_key and getattr(call.arguments.get("past_key_values"), "is_compileable", False)  # of a static cache
    tokens = call.tokens if call.tokens is not None and (past or slots) else width
    if past and not is_key and tokens != width:
        raise InterventionError(
            f"{place.path or 'the model'} holds {width} tokens in a call that reads {tokens}, {past} being in the "
            "cache, so which of the sequence they are cannot be told; leave positions and steps out."
        )
    total = past + tokens
    known = call.prompt is not None and call.tokens is not None
    # What of the sequence was generated is told by what the call reads; an image in the prompt makes it longer.
    prompt = total - (past + call.tokens - call.prompt) if known else None  # type: ignore[operator]
    real = torch.ones(batch, max(total, prompt or 0), dtype=torch.bool)
    return Span(real, total, max(0, total - width), past if is_key else 0, prompt)


def _real(
    place: Place, arguments: Sequence[Mapping[str, object]], span: Span, positions: Positions
) -> Bool[Tensor, "batch token"]:
    """Which tokens of a span are no padding, by the first mask that is one of all of them, or of the prompt."""
    batch, reach = span.real.shape
    masks = [each.get(place.mask) for each in arguments]
    given = next((mask for mask in masks if isinstance(mask, Tensor)), None)
    for number, mask in enumerate(masks):
        if not isinstance(mask, Tensor):
            continue
        mask = mask if number == 0 else _for_beams(mask, batch)
        for end in dict.fromkeys((reach, span.prompt or reach)):
            real = place.real({place.mask: mask}, batch, end) if mask.shape[-1] == end or end == reach else None
            if real is not None:
                return torch.nn.functional.pad(real, (0, reach - end), value=True)  # what is generated is no padding
    if is_mask(positions):
        return span.real
    if given is None:
        _check_named(place, arguments[0] if arguments else {}, batch, reach)
        return span.real
    raise InterventionError(
        f"the attention mask has shape {list(given.shape)} and there are [batch, token] = {[batch, reach]}, so "
        "positions cannot be counted over real tokens; say which of all tokens are meant by a mask, "
        f"positions=torch.ones({batch}, {reach}).bool(), or leave positions out."
    )


def _check_named(place: Place, arguments: Mapping[str, object], batch: int, width: int) -> None:
    """Raise where a mask or lengths of another name were given, so that what is counted may be padding."""
    if not place.side.supposed:
        return
    for name, value in arguments.items():
        if isinstance(value, Tensor) and _tells_padding(name, value.detach(), batch, width):
            raise InterventionError(
                f"positions at {place.path or 'the model'} count real tokens, and which are real is not known: the "
                f"model was given {name}, {list(value.shape)}, and no {place.mask}; if it is a mask of 1 where tokens "
                f"are real, interventions.register_blocks(type(model).__name__, masks={{'': {name!r}}}); else say "
                f"which of all tokens are meant: positions=torch.ones({batch}, {width}).bool()."
            )


def _tells_padding(name: str, value: Tensor, batch: int, width: int) -> bool:
    """Whether an argument looks like a mask of so many tokens with padding in it, or like their lengths."""
    if _MASK.search(name) and value.shape == (batch, width):
        return set(value.unique().tolist()) == {0, 1}
    if _LENGTHS.search(name) and value.shape == (batch,) and not value.is_floating_point():
        return bool(((value >= 0) & (value <= width)).all()) and bool((value < width).any())
    return False


def _for_beams(mask: Tensor, batch: int) -> Tensor:
    """`generate` repeats each example for beams and for several answers."""
    if mask.ndim == 2 and len(mask) and len(mask) < batch and batch % len(mask) == 0:
        return mask.repeat_interleave(batch // len(mask), 0)
    return mask
