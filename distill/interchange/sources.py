"""The sources of interchanges: other rows of the batch, or the same text with some words replaced."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from distill.errors import DistillError, checked
from interventions import shown


@runtime_checkable
class Sources(Protocol):
    """A rule that gives each example of a batch its source."""

    @property
    def aligned(self) -> bool:
        """True if position i means the same in base and source, so that positions are the same in both by default."""
        ...

    def draw(
        self, batch: Mapping[str, Tensor], vocabulary: int | None, generator: torch.Generator
    ) -> Tensor | dict[str, Tensor]:
        """Draw the source of each example: row numbers of the same batch `[batch]`, or a batch of new inputs."""
        ...


@checked
@dataclass(frozen=True)
class Shuffle:
    """Sources from the same batch: a random permutation of its rows, drawn every step.

    Wu et al. 2021 (DIITO, arXiv:2112.02505). No source run is needed, because the batch was run already.
    """

    aligned: bool = False

    def draw(self, batch: Mapping[str, Tensor], vocabulary: int | None, generator: torch.Generator) -> Tensor:
        """Draw a permutation of the rows, `[batch]`."""
        rows = len(next(iter(batch.values())))
        return torch.randperm(rows, generator=generator, device=generator.device)


@checked
@dataclass(frozen=True)
class Crossway(Shuffle):
    """Sources as `Shuffle` draws them, with every pair used in both directions.

    In the second direction base and source change roles, and so do their positions. The terms are the mean of both
    directions. Causal-Distill (arXiv:2112.02505) has this as `--include_crossway`; its published runs do not use it,
    and its code does not exchange the positions.
    """


@checked
@dataclass(frozen=True, eq=False)
class InContext:
    """Sources made from the bases: each is the same text with a share of its tokens replaced by random words.

    "Two Improvements to Causal Distillation". With share 0 the source is the base.

    Args:
        share: the share of the tokens of an example to replace, at least one token unless 0; special tokens
            (`special_tokens_mask` in the data) and padding stay.
        words: token ids to draw from; None is the whole vocabulary without the special tokens of the batch.
        candidates: for a token id the ids to draw from in its place (synonyms, antonyms, …); tokens without an entry
            stay.
    """

    share: float = 0.3
    words: Tensor | None = None
    candidates: Mapping[int, Sequence[int]] | None = None
    aligned: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise DistillError(f"InContext(share={self.share}) is not a share; use a number from 0 to 1, e.g. 0.3.")
        if self.candidates is not None and not all(self.candidates.values() if self.candidates else [()]):
            raise DistillError(
                f"InContext(candidates={shown(self.candidates)}) has nothing to draw from; name some for each token, "
                "e.g. candidates={7: [8, 9]}."
            )

    def draw(
        self, batch: Mapping[str, Tensor], vocabulary: int | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Draw a batch with some tokens replaced."""
        if "input_ids" not in batch:
            raise DistillError(
                f"InContext replaces tokens and this data has no input_ids but {', '.join(batch)}; use "
                "sources=Shuffle()."
            )
        ids = batch["input_ids"]
        real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
        special = batch["special_tokens_mask"].bool() if "special_tokens_mask" in batch else ~real
        self._refuse_unknown(vocabulary)
        eligible = real & ~special
        if self.candidates is not None:
            eligible = eligible & torch.isin(ids, torch.tensor(list(self.candidates), device=ids.device))
        scores = torch.rand(ids.shape, generator=generator, device=generator.device).to(ids.device)
        counts = (eligible.sum(1) * self.share).long().clamp(min=1 if self.share else 0)
        chosen = eligible & (scores.masked_fill(~eligible, 2).argsort(1).argsort(1) < counts[:, None])
        return {**batch, "input_ids": torch.where(chosen, self._draw_words(ids, special, vocabulary, generator), ids)}

    def _refuse_unknown(self, vocabulary: int | None) -> None:
        """Refuse tokens that the models do not know."""
        named = [] if self.words is None else self.words.tolist()
        for token, choices in (self.candidates or {}).items():
            named += [token, *choices]
        wrong = next((token for token in named if token < 0 or (vocabulary is not None and token >= vocabulary)), None)
        if wrong is not None:
            known = "numbers from 0 on" if vocabulary is None else f"0 to {vocabulary - 1}"
            raise DistillError(
                f"InContext draws token {wrong} and the models know {known}; take the numbers of their own tokenizer: "
                "tokenizer.convert_tokens_to_ids(words)."
            )

    def _draw_words(self, ids: Tensor, special: Tensor, vocabulary: int | None, generator: torch.Generator) -> Tensor:
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
