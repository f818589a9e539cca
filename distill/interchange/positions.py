"""The rules that draw the positions at which base and source are interchanged, and the first of them, Span.

Of the eligible tokens of each example, Span draws count = max(1, ⌊min(len_base, len_source) · share⌋), as a contiguous
span or scattered. Scattered draws a fixed number of tokens, Answer takes the one at which the model answers.

Wu et al. 2021 (DIITO, arXiv:2112.02505), section 4.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.errors import DistillError, checked
from distill.models.inputs import MASKED
from interventions import shown

AMONG = ("real", "content", "labelled")
Masks = tuple[Tensor, Tensor]
Ranks = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@runtime_checkable
class PositionRule(Protocol):
    """A rule that draws the positions of each base and of its source, as many in both."""

    def numbers(self, width: int) -> int:
        """Return how many random numbers a draw takes for each of base and source, of tokens `width` wide."""
        ...

    def eligible(self, batch: Mapping[str, Tensor], real: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        """Return the positions that may be drawn: those of the real ones that the rule is about."""
        ...

    def draw(
        self,
        base: Bool[Tensor, "b t"],
        source: Bool[Tensor, "b s"],
        uniform: Float[Tensor, "b 2 w"],
        *,
        aligned: bool = False,
    ) -> tuple[Bool[Tensor, "b t"], Bool[Tensor, "b s"]]:
        """Return the positions to write in the base and those to read in the source, as masks with equal counts a row.

        Args:
            base, source: the eligible positions.
            uniform: random numbers from [0, 1), of which `numbers(max(t, s))` or more are given for each side.
            aligned: whether position i means the same in base and source.
        """
        ...


@checked
@dataclass(frozen=True)
class Span:
    """A random share of the tokens: max(1, ⌊min(len_base, len_source) · share⌋) positions of each example.

    Wu et al. 2021 (DIITO, arXiv:2112.02505), section 4.

    Args:
        share: the share of the tokens, above 0 and up to 1; 1 is as many as the shorter of the two has.
        consecutive: a random contiguous span; False scatters the positions.
        same: the same positions in base and source. None: as the sources say (`aligned`), so independent draws for
            unrelated sources.
        among: `"real"` tokens (never padding), `"content"` ones (no special tokens either; the data must have
            `special_tokens_mask`), or `"labelled"` ones (label not −100: the masked tokens of a masked language model).
        most: the most positions in an example; None is no limit.
    """

    share: float = 0.3
    consecutive: bool = True
    same: bool | None = None
    among: str = "real"
    most: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise DistillError(f"Span(share={self.share}) is not a share above 0 and up to 1; use e.g. Span(0.3).")
        _check_among("Span", self.among)
        if self.most is not None and self.most < 1:
            raise DistillError(f"Span(most={self.most}) interchanges nothing; use 1 or more, or None for no limit.")

    def numbers(self, width: int) -> int:
        """Return how many random numbers a draw takes for each of base and source: where a span starts, or all."""
        return 1 if self.consecutive else width

    def eligible(self, batch: Mapping[str, Tensor], real: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        """Return the positions that may be drawn.

        Raises:
            DistillError: the data lacks the column that `among` needs.
        """
        return _tokens_among("Span", self.among, batch, real)

    def draw(
        self,
        base: Bool[Tensor, "b t"],
        source: Bool[Tensor, "b s"],
        uniform: Float[Tensor, "b 2 w"],
        *,
        aligned: bool = False,
    ) -> tuple[Bool[Tensor, "b t"], Bool[Tensor, "b s"]]:
        """Return the positions to write in the base and those to read in the source, as masks with equal counts a row.

        Args:
            base, source: the eligible positions.
            uniform: random numbers from [0, 1); w = 1 is enough for a consecutive span, max(t, s) otherwise.
            aligned: the value of `same` if that is None.

        Raises:
            DistillError: an example without an eligible position.
        """
        lengths = _shorter("Span", self.among, base, source)
        # The small offset keeps products such as 0.29 · 100 = 28.999… from rounding down.
        counts = (lengths * self.share + 1e-6).long().clamp(min=1, max=self.most)
        same = aligned if self.same is None else self.same
        return _chosen(counts, (base, source), uniform, same, _neighbors if self.consecutive else _scattered)


@checked
@dataclass(frozen=True)
class Scattered:
    """A number of random tokens of each example, scattered over it; `Scattered(1)` is one token.

    Where base or source has fewer tokens, as many are taken as the shorter of the two has.

    Args:
        count: how many tokens of each example.
        same: the same places in base and source, counted from the first eligible token of each; False draws them apart.
        among: the tokens to draw from, as for `Span`: "real", "content" or "labelled".
    """

    count: int = 2
    same: bool = True
    among: str = "real"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise DistillError(f"Scattered(count={self.count}) interchanges nothing; use 1 or more: Scattered(1).")
        _check_among("Scattered", self.among)

    def numbers(self, width: int) -> int:
        """Return how many random numbers a draw takes for each of base and source: one a token."""
        return width

    def eligible(self, batch: Mapping[str, Tensor], real: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        """Return the positions that may be drawn.

        Raises:
            DistillError: the data lacks the column that `among` needs.
        """
        return _tokens_among("Scattered", self.among, batch, real)

    def draw(
        self,
        base: Bool[Tensor, "b t"],
        source: Bool[Tensor, "b s"],
        uniform: Float[Tensor, "b 2 w"],
        *,
        aligned: bool = False,
    ) -> tuple[Bool[Tensor, "b t"], Bool[Tensor, "b s"]]:
        """Return the positions to write in the base and those to read in the source, as masks with equal counts a row.

        Args:
            base, source: the eligible positions.
            uniform: random numbers from [0, 1), w ≥ max(t, s).
            aligned: not used; `same` says whether the places are the same.

        Raises:
            DistillError: an example without an eligible position.
        """
        counts = _shorter("Scattered", self.among, base, source).clamp(max=self.count)
        return _chosen(counts, (base, source), uniform, self.same, _scattered)


def _check_among(owner: str, among: str) -> None:
    if among not in AMONG:
        raise DistillError(f"{owner}(among={among!r}) does not exist; choose one of {', '.join(AMONG)}.")


def _tokens_among(
    owner: str, among: str, batch: Mapping[str, Tensor], real: Bool[Tensor, "b t"]
) -> Bool[Tensor, "b t"]:
    """Return the real, content or labelled tokens of a batch.

    Raises:
        DistillError: the data lacks the column that `among` needs.
    """
    if among == "real":
        return real
    labels = MASKED if MASKED in batch else "labels"
    column = "special_tokens_mask" if among == "content" else labels
    values = batch.get(column)
    if values is None or values.shape != real.shape:
        found = "none" if values is None else list(values.shape)
        raise DistillError(
            f"{owner}(among={among!r}) needs a column {column} of shape {list(real.shape)}, found {found}; use "
            "among='real', or tokenize with return_special_tokens_mask=True."
        )
    values = values.to(real.device)
    return real & (~values.bool() if among == "content" else values != -100)


def _shorter(owner: str, among: str, base: Bool[Tensor, "b t"], source: Bool[Tensor, "b s"]) -> Int[Tensor, " b"]:
    """Return how many eligible tokens the shorter of base and source has.

    Raises:
        DistillError: an example without one.
    """
    lengths = torch.minimum(base.sum(1), source.sum(1))
    if bool((lengths == 0).any()):
        row = int((lengths == 0).nonzero()[0])
        raise DistillError(
            f"row {row} of the batch has no position to interchange among {among!r} tokens; use {owner}(among='real')."
        )
    return lengths


def _chosen(counts: Tensor, masks: Masks, uniform: Tensor, same: bool, draws: Ranks) -> Masks:
    """Return the drawn positions of base and source.

    Args:
        counts: how many of each example.
        masks: the eligible positions of base and source.
        uniform: random numbers, `[batch, 2, number]`.
        same: the same ranks in both, among those that the shorter has.
        draws: which ranks are drawn: `_neighbors` or `_scattered`.
    """
    both = [mask.sum(1) for mask in masks]
    room = [torch.minimum(*both)] * 2 if same else both
    numbers = (uniform[:, 0], uniform[:, 0] if same else uniform[:, 1])
    base, source = (
        by_rank(draws(counts, space, drawn, mask.shape[1]), mask)
        for space, drawn, mask in zip(room, numbers, masks, strict=True)
    )
    return base, source


def _neighbors(counts: Tensor, lengths: Tensor, uniform: Tensor, width: int) -> Tensor:
    """Return which of the eligible tokens of each example, counted from 0, are in a span: `[batch, width]`."""
    ranks = torch.arange(width, device=lengths.device)
    first = (uniform[:, 0] * (lengths - counts + 1)).long().clamp(max=lengths - counts)[:, None]
    return (ranks >= first) & (ranks < first + counts[:, None])


def _scattered(counts: Tensor, lengths: Tensor, uniform: Tensor, width: int) -> Tensor:
    """Return which of the eligible tokens of each example, counted from 0, are scattered ones: `[batch, width]`."""
    ranks = torch.arange(width, device=lengths.device)
    scores = uniform[:, :width].masked_fill(ranks >= lengths[:, None], 2)
    return scores.argsort(1).argsort(1) < counts[:, None]


def refuse_no_rule(owner: str, positions: Any) -> None:
    """Raise DistillError for what is neither a rule of positions nor None."""
    if positions is not None and (isinstance(positions, type) or not isinstance(positions, PositionRule)):
        raise DistillError(
            f"{owner}(positions={shown(positions)}) draws no tokens; use positions=Span(0.3), or None for all."
        )


def by_rank(ranks: Bool[Tensor, "b t"], eligible: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """Return the columns of the eligible tokens whose rank is chosen."""
    rank = (eligible.long().cumsum(1) - 1).clamp(min=0)
    return eligible & ranks.gather(1, rank)
