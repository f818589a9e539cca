"""Where in the data: which tokens (pixels of a feature map) of each example, counted over real tokens only.

The tokens are those of the place: of the text, of an encoder, or patches, frames and queries beside the text. The
padding mask of a call counts where it is the mask of these tokens: of as many, or of the frames that convolutions
make tokens of. It is neither cut nor filled up. A mask without padding says that all tokens are real. Beside the
text, in the tower of images or sounds, all tokens count if no mask of theirs is given. Where a text was made into
another number of tokens (padded to windows, pooled, with an image before it) and padding is in its mask, counting is
refused, and a boolean mask says which are meant.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interventions.arguments import is_whole
from interventions.errors import InterventionError
from interventions.names import shown

Positions = int | slice | range | Sequence[int] | Sequence[Sequence[int]] | Tensor | None


@dataclass(frozen=True, eq=False)
class Selection:
    """Chosen places of a `[batch, token]` grid, row by row: entry j is token `columns[j]` of example `rows[j]`."""

    rows: Int[Tensor, " n"]
    columns: Int[Tensor, " n"]

    def to(self, device: torch.device) -> "Selection":
        """The same on a device."""
        return Selection(self.rows.to(device), self.columns.to(device))

    def counts(self, batch: int) -> Int[Tensor, " batch"]:
        """How many places of each example are chosen."""
        return torch.bincount(self.rows, minlength=batch)


def select(positions: Positions, real: Bool[Tensor, "batch token"]) -> Selection:
    """The places that `positions` names among the real tokens.

    Args:
        positions: an int (−1 is the last real token), a slice, a list or 1-D tensor of ints (the same for every
            example), a `[batch, k]` integer tensor or a list of `batch` lists (each example's own), all counted over
            the real tokens of each example, left or right padded; or a `[batch, token]` boolean mask over all columns.
        real: True where a token is not padding.

    Raises:
        InterventionError: a position outside an example, on padding, or named twice; a tensor of another shape.
    """
    if not isinstance(real, Tensor) or real.dtype != torch.bool or real.ndim != 2:
        raise InterventionError(
            f"real={shown(real)} does not say which tokens are real; give a boolean tensor [batch, token]: "
            "attention_mask.bool()."
        )
    if is_mask(positions):
        return _from_mask(positions, real)
    numbers, rows = _numbers(positions, real)
    if not numbers.numel():
        raise InterventionError(f"positions={_short(positions)} selects nothing; leave positions out for all of them.")
    lengths = real.sum(1)[rows]
    absolute = torch.where(numbers < 0, numbers + lengths, numbers)
    _check_range(positions, numbers, rows, lengths, real.shape[1])
    # The j-th real token of a row stands in the column where the running count of real tokens first reaches j + 1.
    order = torch.argsort((~real).int(), dim=1, stable=True)
    columns = order[rows, absolute]
    if torch.unique(rows * real.shape[1] + columns).numel() < columns.numel():
        raise InterventionError(f"positions={_short(positions)} names a token twice in one example; name each once.")
    return Selection(rows, columns)


def check_positions(positions: Positions) -> None:
    """Raise for what names no positions in any batch.

    Raises:
        InterventionError: it is nothing that `select` takes.
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
        raise InterventionError(f"positions={_short(positions)} selects nothing; leave positions out for all of them.")


def _check_slice(positions: slice) -> None:
    ends = (positions.start, positions.stop, positions.step)
    if positions.step == 0 or not all(each is None or is_whole(each) for each in ends):
        raise InterventionError(f"positions={positions!r} has no such numbers; write positions=slice(1, -1).")


def is_mask(positions: Positions) -> TypeGuard[Tensor]:
    """Whether positions are given as a mask over all tokens, padding included: nothing is counted then."""
    return isinstance(positions, Tensor) and positions.dtype == torch.bool


def _from_mask(mask: Tensor, real: Tensor) -> Selection:
    if mask.shape != real.shape:
        raise InterventionError(
            f"positions is a mask of shape {list(mask.shape)} and the activation has [batch, token] = "
            f"{list(real.shape)}; give one entry for every token, padding included."
        )
    mask = mask.to(real.device)
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


def _numbers(positions: Positions, real: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers asked for and the example each belongs to, before they are turned into columns."""
    batch, device = len(real), real.device
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
        return positions.to(device).long().flatten(), rows
    else:
        per_row = _rows_of(positions, batch)
    rows = torch.arange(batch, device=device).repeat_interleave(torch.tensor([len(p) for p in per_row], device=device))
    return torch.tensor([p for row in per_row for p in row], device=device, dtype=torch.long), rows


def _rows_of(positions: Any, batch: int) -> list[list[int]]:
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
            f"positions={_short(positions)} is not understood; give an int, a slice, a list, a [batch, k] tensor, a "
            "list of lists or a boolean [batch, token] mask."
        ) from error
    return per_row


def _whole(number: Any) -> int:
    if isinstance(number, bool):
        raise TypeError("a list of bools would be taken for 0 and 1")
    return number.__index__()


def _check_range(positions: Positions, numbers: Tensor, rows: Tensor, lengths: Tensor, width: int) -> None:
    wrong = (numbers < -lengths) | (numbers >= lengths)
    if not wrong.any():
        return
    first = int(wrong.nonzero()[0])
    examples = torch.unique(rows[wrong])
    number, row, length = int(numbers[first]), int(rows[first]), int(lengths[first])
    fault = "padding" if -width <= number < width else "no token"
    raise InterventionError(
        f"positions={_short(positions)} names {fault} in {len(examples)} of {int(rows.max()) + 1} examples (first: "
        f"position {number} of row {row}, length {length}); count from the end with positions=-1, or give each row "
        "its own."
    )


def _short(positions: object) -> str:
    text = f"tensor{list(positions.shape)}" if isinstance(positions, Tensor) else repr(positions)
    return text if len(text) <= 40 else text[:37] + "…"
