"""A padded batch, split into its samples and joined again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

TOKENS = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "attention_mask")
SIDES = ("", "decoder_")
"""Prefixes of the columns of tokens: none for those of the encoder or the only stack, and those of the decoder."""


@dataclass(frozen=True, eq=False)
class Padded:
    """A batch of a model's inputs in which padding is no part of a sample.

    Padding at the end of a row is cut from the columns of tokens, if their mask is one of the columns; and padding at
    its front, if their positions are one too. Without these it stays: positions may be counted from there.

    Attributes:
        columns: the inputs by name, each `[batch, ...]`.
    """

    columns: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @cached_property
    def lengths(self) -> dict[str, list[int]]:
        """The number of tokens of each row up to its last real one, for each side whose tokens have a mask."""
        found = {}
        for side in SIDES:
            mask = self.columns.get(f"{side}attention_mask")
            if mask is not None and mask.ndim == 2:
                places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
                found[side] = (mask.bool() * places).amax(1).clamp(min=1).tolist()
        return found

    @cached_property
    def starts(self) -> dict[str, list[int]]:
        """The number of tokens of padding before each row that is cut off, for each side whose tokens have a mask."""
        found = {}
        for side in self.lengths:
            mask, positions = self.columns[f"{side}attention_mask"], self.columns.get(f"{side}position_ids")
            is_cut = positions is not None and positions.shape == mask.shape
            found[side] = mask.bool().int().argmax(1).tolist() if is_cut else [0] * len(mask)
        return found

    @property
    def answering(self) -> list[int] | None:
        """The lengths of the rows in answers with one entry a token; None where their tokens have no mask."""
        return self.lengths.get(self._answering_side)

    @property
    def width(self) -> int:
        """The number of tokens of the padded rows, in answers with one entry a token."""
        return self.columns[f"{self._answering_side}attention_mask"].shape[1]

    def tokens_of(self, positions: int) -> str | None:
        """Return the name of the first column with this number of tokens, None if there is none."""
        names = [f"{side}{name}" for side in SIDES for name in TOKENS]
        return next((n for n in names if n in self.columns and self.columns[n].shape[1:2] == (positions,)), None)

    def sample(self, row: int) -> dict[str, Tensor]:
        """Return the columns of one row, without padding."""
        return {
            name: column[row, self.starts[side][row] : self.lengths[side][row]]
            for name, column in self.columns.items()
            if (side := self._side(name)) is not None
        } | {name: column[row] for name, column in self.columns.items() if self._side(name) is None}

    def take(self, rows: Sequence[int]) -> "Padded":
        """Return some of the rows as a batch, no wider than the longest of them."""
        index = torch.tensor(rows, device=next(iter(self.columns.values())).device)
        taken = {}
        for name, column in self.columns.items():
            chosen = column[index]
            taken[name] = chosen if self._side(name) is None else chosen[:, : self._end(name, rows)]
        return Padded(taken)

    def split(self, answers: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return the answer to each row, without the entries of padding, if answers have one entry a token."""
        lengths, starts = self.answering, self.starts.get(self._answering_side)

        def cut(row: int, answer: Tensor) -> Tensor:
            if answer.ndim == 0:
                return answer
            is_of_tokens = lengths is not None and answer.ndim > 2 and answer.shape[1] == self.width
            return answer[row, starts[row] : lengths[row]] if is_of_tokens and starts and lengths else answer[row]

        return [{name: cut(row, answer) for name, answer in answers.items()} for row in range(len(self))]

    def join(self, answers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the answers to all rows; those at padding are 0."""
        lengths, starts, first = self.answering, self.starts.get(self._answering_side), answers[0]
        ragged = (
            lengths is not None
            and starts is not None
            and all(
                value.ndim < 2 or len(value) == end - start
                for answer, start, end in zip(answers, starts, lengths, strict=True)
                for value in answer.values()
            )
        )
        if not ragged or starts is None or max(value.ndim for value in first.values()) < 2:
            return {name: _stack([answer[name] for answer in answers]) for name in first}
        return {name: _pad([answer[name] for answer in answers], starts, self.width) for name in first}

    @property
    def _answering_side(self) -> str:
        return next((side for side in SIDES[::-1] if f"{side}input_ids" in self.columns), SIDES[0])

    def _side(self, name: str) -> str | None:
        """Return the side whose tokens a column holds; None if it holds no tokens, or if they have no mask."""
        side = "decoder_" if name.startswith("decoder_") else ""
        if side not in self.lengths or name.removeprefix(side) not in TOKENS:
            return None
        mask, column = self.columns[f"{side}attention_mask"], self.columns[name]
        return side if column.shape[:2] == mask.shape else None

    def _end(self, name: str, rows: Sequence[int]) -> int:
        side = self._side(name)
        assert side is not None
        return max(self.lengths[side][row] for row in rows)


def _stack(values: Sequence[Tensor]) -> Tensor:
    dtype = _common_dtype(values)
    return values[0] if values[0].ndim == 0 else torch.stack([value.to(dtype) for value in values])


def _pad(values: Sequence[Tensor], starts: Sequence[int], width: int) -> Tensor:
    if values[0].ndim == 0:
        return values[0]
    padded = values[0].new_zeros(len(values), width, *values[0].shape[1:], dtype=_common_dtype(values))
    for row, (value, start) in enumerate(zip(values, starts, strict=True)):
        padded[row, start : start + len(value)] = value
    return padded


def _common_dtype(values: Sequence[Tensor]) -> torch.dtype:
    """Return a dtype that holds all values: some may have been fetched in mixed precision."""
    return reduce(torch.promote_types, {value.dtype for value in values})
