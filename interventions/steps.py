"""When, in a generation: which tokens of a call are written, by the step at which they were first read.

Step 0 is the prompt, step k the k-th generated token, read back to generate the next. Tokens belong to steps, and
not calls: so a model that generates without a cache, and reads the whole sequence again for every token, computes the
same as one with a cache.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import index

import torch
from jaxtyping import Bool
from torch import Tensor

from interventions.calls import Call
from interventions.errors import InterventionError
from interventions.positions import Positions, Selection, select

Steps = int | slice | range | Iterable[int] | None


def parse_steps(steps: object) -> slice | frozenset[int] | None:
    """`steps` in a form that `is_in` takes.

    Raises:
        InterventionError: no whole numbers from 0 on, or none at all.
    """
    if steps is None or isinstance(steps, slice):
        return steps
    try:
        if isinstance(steps, str | bool):
            raise TypeError("not a number")
        numbers = frozenset(map(index, steps if isinstance(steps, Iterable) else (steps,)))
    except TypeError as error:
        raise InterventionError(
            f"steps={steps!r} are not whole numbers; write steps=0 for the prompt, steps=[1, 2] or "
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
        real: which tokens of the sequence are no padding; it reaches to the end of the prompt at least.
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
            named = select(_until(positions, end), span.real[:, :end])
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


def _until(positions: Positions, end: int) -> Positions:
    """A mask over the prompt says no to what is generated."""
    if isinstance(positions, Tensor) and positions.dtype == torch.bool and positions.ndim == 2:
        width = positions.shape[1]
        return positions[:, :end] if width >= end else torch.nn.functional.pad(positions, (0, end - width))
    return positions


def span_of(
    vectors: Tensor, mask: Tensor | None, call: Call | None, *, is_key: bool = False, encodes: bool = False
) -> Span:
    """The tokens that `vectors`, `[batch, token, …]`, are of, in a call of the model.

    It is on the CPU: counting positions asks for many single numbers, and each would wait for the device.

    Args:
        mask: the padding mask that the model, or `generate`, was called with; None: no padding.
        is_key: whether it holds one vector for each token that is attended to, so those of the cache too.
        encodes: whether it belongs to an encoder, whose tokens are all of the prompt.
    """
    batch, width = vectors.shape[:2]
    past = 0 if call is None or encodes else call.past
    tokens = width if call is None or encodes or call.tokens is None or not (past or is_key) else call.tokens
    total = past + tokens
    generates = call is not None and call.generation is not None and not encodes
    prompt = None if call is None or encodes else call.prompt
    real = torch.ones(batch, max(total, prompt or 0) if generates else total, dtype=torch.bool)
    if mask is not None:
        mask = _for_beams(mask, batch).cpu().bool()
        width = mask.shape[-1]
        if mask.ndim != 2 or len(mask) != batch or not (width == total or (generates and width <= real.shape[1])):
            raise InterventionError(
                f"the attention mask has shape {list(mask.shape)} and there are [batch, token] = {[batch, total]}, so "
                "positions cannot be counted over real tokens; leave positions out, or pass a [batch, token] mask."
            )
        real[:, :width] = mask
    return Span(real, total, max(0, total - vectors.shape[1]), past if is_key else 0, prompt)


def _for_beams(mask: Tensor, batch: int) -> Tensor:
    """`generate` repeats each example for beams and for several answers."""
    if mask.ndim == 2 and len(mask) and len(mask) < batch and batch % len(mask) == 0:
        return mask.repeat_interleave(batch // len(mask), 0)
    return mask
