"""Positions: which tokens of each example (or pixels of a feature map) are meant, counted over real tokens only.

Positions count the tokens at the location: those of the text, of an encoder, or the patches, frames and queries of an
image or a sound. Which of them are real is read from the padding mask of the call, if that mask belongs to these
tokens: it has one entry for each, or for each frame that convolutions turn into tokens. A mask is never cut or padded
to fit, and one without padding makes all tokens real. In the tower of images or sounds all tokens are real if no mask
for them is passed. Where the model changes the number of tokens of a text (pads it to windows, pools it, puts an image
before it) and its mask has padding, counting raises an error; a boolean mask over all tokens then says which are meant.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeGuard

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interventions.arguments import is_whole
from interventions.devices import moved
from interventions.errors import InterventionError
from interventions.host_copies import on_host
from interventions.names import shown

Positions = int | slice | range | Sequence[int] | Sequence[Sequence[int]] | Tensor | None


@dataclass(frozen=True, eq=False)
class Selection:
    """Selected tokens of a `[batch, token]` grid, row by row: entry j is token `columns[j]` of example `rows[j]`.

    Attributes:
        rows: `[n]`, the number of the example.
        columns: `[n]`, the number of the token, padding counted.
    """

    rows: Int[Tensor, " n"]
    columns: Int[Tensor, " n"]
    _moved: dict[torch.device, "Selection"] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> "Selection":
        """Return this selection on a device, to which it is moved once, as one tensor."""
        if self.rows.device == device:
            return self
        if device not in self._moved:
            self._moved[device] = Selection(*moved(torch.stack([self.rows, self.columns]), device))
        return self._moved[device]

    def counts(self, batch: int) -> Int[Tensor, " batch"]:
        """Return the number of selected tokens of each example, `[batch]`."""
        return torch.bincount(self.rows, minlength=batch)


@dataclass(eq=False)  # not frozen, which takes several times as long to make
class Columns:
    """The same tokens of each example of a `[batch, token]` grid: a `Selection` that needs no tensors.

    Attributes:
        batch: the number of examples.
        numbers: the numbers of the tokens, padding counted.

    >>> Columns(2, (0, 3)).selection.columns.tolist(), Columns(2, (0, 3)).selection.rows.tolist()
    ([0, 3, 0, 3], [0, 0, 1, 1])
    """

    batch: int
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return self.batch * len(self.numbers)

    @cached_property
    def selection(self) -> Selection:
        """The same tokens row by row."""
        rows = torch.arange(self.batch, device="cpu").repeat_interleave(len(self.numbers))
        return Selection(rows, torch.tensor(self.numbers, dtype=torch.long, device="cpu").repeat(self.batch))


def column_of(position: Positions, length: int) -> int | None:
    """Return the column of one token where none is padding; None where there is none, or `position` is no number."""
    if type(position) is not int or not -length <= position < length:
        return None
    return position + length if position < 0 else position


def select_columns(positions: Positions, batch: int, length: int) -> Columns | None:
    """Return what `select` selects where no token is padding, computed without tensors.

    Returns:
        The tokens; None where they differ from example to example, or `select` is to say what is wrong with them.

    >>> select_columns([0, -1], 2, 5)
    Columns(batch=2, numbers=(0, 4))
    """
    if type(positions) is int:
        column = column_of(positions, length)
        return None if column is None else Columns(batch, (column,))
    numbers: Sequence[int]
    if isinstance(positions, slice):
        _check_slice(positions)
        numbers = range(length)[positions]
    elif type(positions) in (list, tuple, range) and all(type(each) is int for each in positions):  # type: ignore[union-attr]
        numbers = positions  # type: ignore[assignment]
    else:
        return None
    columns = tuple([number + length if number < 0 else number for number in numbers])
    fits = columns and min(columns) >= 0 and max(columns) < length and len(set(columns)) == len(columns)
    return Columns(batch, columns) if fits else None


Stretch = tuple[int, int, int]
"""The first of some consecutive columns, the first of as many others, and their number."""


def stretches_of(columns: Sequence[int], others: Sequence[int]) -> tuple[Stretch, ...]:
    """Return columns and their partners as stretches that are consecutive in both.

    >>> stretches_of((2, 3, 4, 7), (0, 1, 5, 6))
    ((2, 0, 2), (4, 5, 1), (7, 6, 1))
    """
    pairs = list(zip(columns, others, strict=True))
    breaks = [n for n, (a, b) in enumerate(pairwise(pairs), 1) if (b[0] - a[0], b[1] - a[1]) != (1, 1)]
    return tuple((*pairs[start], end - start) for start, end in pairwise([0, *breaks, len(pairs)]))


def select(positions: Positions, real: Bool[Tensor, "batch token"]) -> Selection:
    """Return the tokens that `positions` names, counted over the real tokens of each example.

    Args:
        positions: an int (−1 is the last real token), a slice, a list or 1-D tensor of ints, the same for every
            example; or a `[batch, k]` integer tensor or a list of `batch` lists, one row for each example. Padding, on
            the left or the right, is not counted. Or a `[batch, token]` boolean mask over all tokens.
        real: `[batch, token]`, True where a token is not padding.

    Raises:
        InterventionError: a position outside an example, on padding, or named twice; a tensor of another shape.

    >>> real = torch.tensor([[False, True, True], [True, True, True]])  # the first example is padded on the left
    >>> select([0, -1], real).columns.tolist(), select([0, -1], real).rows.tolist()
    ([1, 2, 0, 2], [0, 0, 1, 1])
    """
    if not isinstance(real, Tensor) or real.dtype != torch.bool or real.ndim != 2:
        raise InterventionError(
            f"real={shown(real)} does not say which tokens are real; give a boolean tensor [batch, token]: "
            "attention_mask.bool()."
        )
    if is_mask(positions):
        return _select_by_mask(positions, real)
    numbers, rows, most = _numbers(positions, real)
    if not numbers.numel():
        raise InterventionError(
            f"positions={_shorten(positions)} selects nothing; leave positions out for all of them."
        )
    counts = real.sum(1)
    lengths = counts[rows]
    absolute = torch.where(numbers < 0, numbers + lengths, numbers)
    _check_range(positions, numbers, rows, lengths, real.shape[1])
    # The columns of the real tokens lie row by row, so token j of a row is the j-th from where the row begins.
    _, order = real.nonzero(as_tuple=True)
    columns = order[(counts.cumsum(0) - counts)[rows] + absolute]
    if most > 1 and torch.unique(rows * real.shape[1] + columns).numel() < columns.numel():
        raise InterventionError(f"positions={_shorten(positions)} names a token twice in one example; name each once.")
    return Selection(rows, columns)


def check_positions(positions: Positions) -> None:
    """Raise for positions that are invalid for every batch, before there is one.

    Raises:
        InterventionError: `positions` is of no type that `select` takes.
    """
    if positions is None or is_mask(positions):
        return
    if isinstance(positions, slice):
        return _check_slice(positions)
    if isinstance(positions, Tensor) and positions.is_complex():
        raise InterventionError(f"positions={shown(positions)} is not understood; give whole numbers.")
    if isinstance(positions, Tensor) and not positions.is_floating_point() and positions.ndim == 2:
        return
    several = isinstance(positions, Sequence) and not isinstance(positions, str | range)
    batch = len(positions) if several and isinstance(positions, Sequence) else 1
    if not any(_rows_of(positions, batch)):
        raise InterventionError(
            f"positions={_shorten(positions)} selects nothing; leave positions out for all of them."
        )


def _check_slice(positions: slice) -> None:
    ends = (positions.start, positions.stop, positions.step)
    if positions.step == 0 or not all(each is None or is_whole(each) for each in ends):
        raise InterventionError(f"positions={positions!r} has no such numbers; write positions=slice(1, -1).")


def is_mask(positions: Positions) -> TypeGuard[Tensor]:
    """Return whether positions are a boolean mask over all tokens, padding included, instead of numbers."""
    return isinstance(positions, Tensor) and positions.dtype == torch.bool


def _select_by_mask(mask: Tensor, real: Tensor) -> Selection:
    if mask.shape != real.shape:
        raise InterventionError(
            f"positions is a mask of shape {list(mask.shape)} and the activation has [batch, token] = "
            f"{list(real.shape)}; give one entry for every token, padding included."
        )
    mask = on_host(mask) if real.is_cpu else mask.to(real.device)
    on_padding = (mask & ~real).any(1)
    if on_padding.any():
        row = int(on_padding.nonzero()[0])
        raise InterventionError(
            f"positions (a mask) names padding in {int(on_padding.sum())} of {len(real)} examples (first: row {row}, "
            f"length {int(real[row].sum())}); combine it with the attention mask: positions=mask & "
            "attention_mask.bool()."
        )
    if not mask.any():
        raise InterventionError("positions is a mask that selects nothing; set at least one entry to True.")
    rows, columns = mask.nonzero(as_tuple=True)
    return Selection(rows, columns)


def _numbers(positions: Positions, real: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the position numbers, still counted over real tokens, and the example of each, both `[n]`.

    Returns:
        Both, and the largest number of positions in an example.
    """
    batch, device = len(real), real.device
    if type(positions) is int and is_whole(positions):
        return torch.full((batch,), positions, device=device), torch.arange(batch, device=device), 1
    if isinstance(positions, slice):
        _check_slice(positions)
        per_row = [list(range(int(length)))[positions] for length in real.sum(1)]
        empty = next((row for row, chosen in enumerate(per_row) if not chosen), None)
        if empty is not None:
            raise InterventionError(
                f"positions={positions!r} selects nothing in row {empty}, which has {int(real[empty].sum())} tokens; "
                "widen the slice, or give each row its own positions as a list of lists."
            )
    elif isinstance(positions, Tensor) and not positions.is_floating_point() and positions.ndim == 2:
        if len(positions) != batch:
            raise InterventionError(
                f"positions has shape {list(positions.shape)} for a batch of {batch}; give one row an example: "
                f"[{batch}, k]."
            )
        rows = torch.arange(batch, device=device).repeat_interleave(positions.shape[1])
        return positions.to(device).long().flatten(), rows, positions.shape[1]
    else:
        per_row = _rows_of(positions, batch)
    counts = [len(p) for p in per_row]
    rows = torch.arange(batch, device=device).repeat_interleave(torch.tensor(counts, device=device))
    return torch.tensor([p for row in per_row for p in row], device=device, dtype=torch.long), rows, max(counts)


def _rows_of(positions: Any, batch: int) -> list[list[int]]:
    """Return the position numbers of each example."""
    if isinstance(positions, Tensor):
        if positions.is_floating_point() or positions.ndim > 1:
            raise InterventionError(
                f"positions is a {positions.dtype} tensor of shape {list(positions.shape)}; "
                "give integers [k] or [batch, k], or a boolean mask [batch, token]."
            )
        positions = positions.tolist()
    if is_whole(positions):
        return [[positions]] * batch
    try:
        if isinstance(positions, str | bytes | Set | Mapping):
            raise TypeError("a string is a sequence too, and a set has no order")
        if len(positions) and all(isinstance(p, Sequence | range) for p in positions):
            if len(positions) != batch:
                raise InterventionError(
                    f"positions lists {len(positions)} examples and the batch has {batch}; give one list an example."
                )
            per_row = [[_whole(p) for p in row] for row in positions]
        else:
            per_row = [[_whole(p) for p in positions]] * batch
    except (TypeError, AttributeError) as error:
        raise InterventionError(
            f"positions={_shorten(positions)} is not understood; give an int, a slice, a list, a [batch, k] tensor, a "
            "list of lists or a boolean [batch, token] mask."
        ) from error
    return per_row


def _whole(number: Any) -> int:
    if isinstance(number, bool):
        raise TypeError("a list of bools would be taken for 0 and 1")
    whole: int = number.__index__()
    if not is_whole(whole):
        raise TypeError("no tensor holds a number beyond 64 bits")
    return whole


def _check_range(positions: Positions, numbers: Tensor, rows: Tensor, lengths: Tensor, width: int) -> None:
    """Raise InterventionError for numbers beyond the real tokens of their example."""
    wrong = (numbers < -lengths) | (numbers >= lengths)
    if not wrong.any():
        return
    first = int(wrong.nonzero()[0])
    examples = torch.unique(rows[wrong])
    number, row, length = int(numbers[first]), int(rows[first]), int(lengths[first])
    fault = "padding" if -width <= number < width else "no token"
    raise InterventionError(
        f"positions={_shorten(positions)} names {fault} in {len(examples)} of {int(rows.max()) + 1} examples (first: "
        f"position {number} of row {row}, length {length}); count from the end with positions=-1, or give each row "
        "its own."
    )


def _shorten(positions: object) -> str:
    """Return the positions as an error quotes them, in at most 40 characters."""
    text = f"tensor{list(positions.shape)}" if isinstance(positions, Tensor) else repr(positions)
    return text if len(text) <= 40 else text[:37] + "…"
