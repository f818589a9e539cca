"""Where the sources of interchanges come from, and at which positions base and source are interchanged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distill.errors import DistillError
from distill.models.inputs import MASKED

AMONG = ("real", "content", "labelled")


@runtime_checkable
class Pairs(Protocol):
    """Says where the source of each example of a batch comes from."""

    @property
    def aligned(self) -> bool:
        """Whether position i means the same in base and source, so that positions are the same in both by default."""
        ...

    def draw(
        self, batch: Mapping[str, Tensor], vocabulary: int | None, generator: torch.Generator
    ) -> Tensor | dict[str, Tensor]:
        """The source of each example: rows of the batch itself `[batch]`, or a batch of new inputs."""
        ...


@dataclass(frozen=True)
class Shuffle:
    """The source of an example is another example of its batch, by a random permutation drawn every step.

    Wu et al. 2021 (DIITO, arXiv:2112.02505); no source run is needed, because the batch was run already.
    """

    aligned: bool = False

    def draw(self, batch: Mapping[str, Tensor], vocabulary: int | None, generator: torch.Generator) -> Tensor:
        """A permutation of the rows `[batch]`."""
        rows = len(next(iter(batch.values())))
        return torch.randperm(rows, generator=generator, device=generator.device)


@dataclass(frozen=True)
class Crossway(Shuffle):
    """As `Shuffle`, and every pair serves both ways: base and source change parts, the positions with them.

    The terms are the mean of the two directions. Causal-Distill (arXiv:2112.02505) has it as `--include_crossway`; its
    published runs do not use it, and its code leaves the positions where they were.
    """


@dataclass(frozen=True, eq=False)
class InContext:
    """The source of an example is the same text with a share of its tokens replaced by random words.

    "Two Improvements to Causal Distillation". share 0 is the text itself.

    Args:
        share: the share of the tokens of an example that is replaced, at least one token unless 0; special tokens
            (`special_tokens_mask` in the data) and padding stay.
        words: token ids to draw from; None is the whole vocabulary but the special tokens of the batch.
        candidates: token id → ids to draw from for it (synonyms, antonyms, …); tokens without an entry stay.
    """

    share: float = 0.3
    words: Tensor | None = None
    candidates: Mapping[int, Sequence[int]] | None = None
    aligned: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise DistillError(f"InContext(share={self.share}) is not a share; use a number from 0 to 1, e.g. 0.3.")

    def draw(
        self, batch: Mapping[str, Tensor], vocabulary: int | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The batch with tokens replaced."""
        if "input_ids" not in batch:
            raise DistillError(
                f"InContext replaces tokens and this data has no input_ids but {', '.join(batch)}; use pairs=Shuffle()."
            )
        ids = batch["input_ids"]
        real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
        special = batch["special_tokens_mask"].bool() if "special_tokens_mask" in batch else ~real
        eligible = real & ~special
        if self.candidates is not None:
            eligible = eligible & torch.isin(ids, torch.tensor(list(self.candidates), device=ids.device))
        scores = torch.rand(ids.shape, generator=generator, device=generator.device).to(ids.device)
        counts = (eligible.sum(1) * self.share).long().clamp(min=1 if self.share else 0)
        chosen = eligible & (scores.masked_fill(~eligible, 2).argsort(1).argsort(1) < counts[:, None])
        return {**batch, "input_ids": torch.where(chosen, self._drawn(ids, special, vocabulary, generator), ids)}

    def _drawn(self, ids: Tensor, special: Tensor, vocabulary: int | None, generator: torch.Generator) -> Tensor:
        draws = torch.rand(ids.shape, generator=generator, device=generator.device).to(ids.device)
        if self.candidates is not None:
            drawn = ids.clone()
            for token, choices in self.candidates.items():
                table = torch.tensor(list(choices), device=ids.device)
                drawn = torch.where(ids == token, table[(draws * len(table)).long()], drawn)
            return drawn
        words = self.words
        if words is None:
            if vocabulary is None:
                raise DistillError("InContext knows no vocabulary for this model; give words=torch.arange(...).")
            allowed = torch.ones(vocabulary, dtype=torch.bool, device=ids.device)
            allowed[ids[special]] = False
            words = allowed.nonzero()[:, 0]
        words = words.to(ids.device)
        return words[(draws * len(words)).long()]


@dataclass(frozen=True)
class Span:
    """Which positions are interchanged: a share of the tokens, count = max(1, ⌊min(len_base, len_source) · share⌋).

    Wu et al. 2021 (DIITO, arXiv:2112.02505), section 4.

    Args:
        share: the share of the tokens, above 0 and up to 1; 1 is all that both have.
        consecutive: a random contiguous span; False scatters the positions.
        same: the same positions in base and source. None: as the pairs say (`aligned`), so independent draws for
            unrelated sources.
        among: `"real"` tokens (never padding), `"content"` ones (no special tokens either; the data must have
            `special_tokens_mask`), or `"labelled"` ones (label not −100: the masked tokens of a masked language model).
        most: at most so many in each example; None is no limit.
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
        """The positions that may be drawn."""
        if self.among == "real":
            return real
        labels = MASKED if MASKED in batch else "labels"
        column = "special_tokens_mask" if self.among == "content" else labels
        values = batch.get(column)
        if values is None or values.shape != real.shape:
            found = "none" if values is None else list(values.shape)
            raise DistillError(
                f"Span(among={self.among!r}) needs a column {column} of shape {list(real.shape)}, found {found}; use "
                "among='real', or tokenise with return_special_tokens_mask=True."
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
        """The positions to write in the base and those to take from the source, as masks with as many in each row.

        Args:
            base, source: the eligible positions.
            uniform: numbers from [0, 1) that decide; w = 1 is enough for a consecutive span, max(t, s) otherwise.
            aligned: what `same=None` means.

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
        # The small offset keeps products such as 0.29 · 100 = 28.999… from losing one.
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
        """Which of the eligible tokens of each example, counted from 0, are chosen: `[batch, width]`."""
        ranks = torch.arange(width, device=lengths.device)
        if self.consecutive:
            first = (uniform[:, 0] * (lengths - counts + 1)).long().clamp(max=lengths - counts)[:, None]
            return (ranks >= first) & (ranks < first + counts[:, None])
        scores = uniform[:, :width].masked_fill(ranks >= lengths[:, None], 2)
        return scores.argsort(1).argsort(1) < counts[:, None]


def _columns(ranks: Bool[Tensor, "b t"], eligible: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """The columns in which the eligible tokens of the chosen ranks stand."""
    rank = (eligible.long().cumsum(1) - 1).clamp(min=0)
    return eligible & ranks.gather(1, rank)
