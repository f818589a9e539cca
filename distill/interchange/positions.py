"""Span: the positions at which base and source are interchanged, drawn anew in every step.

Of the eligible tokens of each example, count = max(1, ⌊min(len_base, len_source) · share⌋) are drawn, as a contiguous
span or scattered.

Wu et al. 2021 (DIITO, arXiv:2112.02505), section 4.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distill.errors import DistillError, checked
from distill.models.inputs import MASKED

AMONG = ("real", "content", "labelled")


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
        if self.among not in AMONG:
            raise DistillError(f"Span(among={self.among!r}) does not exist; choose one of {', '.join(AMONG)}.")
        if self.most is not None and self.most < 1:
            raise DistillError(f"Span(most={self.most}) interchanges nothing; use 1 or more, or None for no limit.")

    def eligible(self, batch: Mapping[str, Tensor], real: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        """Return the positions that may be drawn.

        Raises:
            DistillError: the data lacks the column that `among` needs.
        """
        if self.among == "real":
            return real
        labels = MASKED if MASKED in batch else "labels"
        column = "special_tokens_mask" if self.among == "content" else labels
        values = batch.get(column)
        if values is None or values.shape != real.shape:
            found = "none" if values is None else list(values.shape)
            raise DistillError(
                f"Span(among={self.among!r}) needs a column {column} of shape {list(real.shape)}, found {found}; use "
                "among='real', or tokenize with return_special_tokens_mask=True."
            )
        values = values.to(real.device)
        return real & (~values.bool() if self.among == "content" else values != -100)

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
        lengths = torch.minimum(base.sum(1), source.sum(1))
        if bool((lengths == 0).any()):
            row = int((lengths == 0).nonzero()[0])
            raise DistillError(
                f"row {row} of the batch has no position to interchange among {self.among!r} tokens; use "
                "Span(among='real')."
            )
        # The small offset keeps products such as 0.29 · 100 = 28.999… from rounding down.
        counts = (lengths * self.share + 1e-6).long().clamp(min=1, max=self.most)
        same = aligned if self.same is None else self.same
        room = (lengths, lengths) if same else (base.sum(1), source.sum(1))
        draws = (uniform[:, 0], uniform[:, 0] if same else uniform[:, 1])
        ranks = [
            self._ranks(counts, space, draw, mask.shape[1])
            for space, draw, mask in zip(room, draws, (base, source), strict=True)
        ]
        return _columns(ranks[0], base), _columns(ranks[1], source)

    def _ranks(self, counts: Tensor, lengths: Tensor, uniform: Tensor, width: int) -> Tensor:
        """Return which of the eligible tokens of each example, counted from 0, are chosen: `[batch, width]`."""
        ranks = torch.arange(width, device=lengths.device)
        if self.consecutive:
            first = (uniform[:, 0] * (lengths - counts + 1)).long().clamp(max=lengths - counts)[:, None]
            return (ranks >= first) & (ranks < first + counts[:, None])
        scores = uniform[:, :width].masked_fill(ranks >= lengths[:, None], 2)
        return scores.argsort(1).argsort(1) < counts[:, None]


def _columns(ranks: Bool[Tensor, "b t"], eligible: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """Return the columns of the eligible tokens whose rank is chosen."""
    rank = (eligible.long().cumsum(1) - 1).clamp(min=0)
    return eligible & ranks.gather(1, rank)
