"""The sources of interchanges: other rows of the batch, or the same text with some words replaced."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary

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
        scores = _uniform(ids, generator)
        counts = (eligible.sum(1) * self.share).long().clamp(min=1 if self.share else 0)
        chosen = eligible & (scores.masked_fill(~eligible, 2).argsort(1).argsort(1) < counts[:, None])
        return {**batch, "input_ids": torch.where(chosen, self._draw_words(ids, special, vocabulary, generator), ids)}

    def _refuse_unknown(self, vocabulary: int | None) -> None:
        """Refuse tokens that the models do not know; they are read once, as they may be on the device."""
        if vocabulary in _known.setdefault(self, set()):
            return
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
        _known[self].add(vocabulary)

    def _draw_words(self, ids: Tensor, special: Tensor, vocabulary: int | None, generator: torch.Generator) -> Tensor:
        draws = _uniform(ids, generator)
        if self.candidates is not None:
            drawn = ids.clone()
            for token, choices in self.candidates.items():
                table = torch.tensor(list(choices)).to(ids.device, non_blocking=True)
                drawn = torch.where(ids == token, table[(draws * len(table)).long()], drawn)
            return drawn
        if self.words is not None:
            words = self.words.to(ids.device, non_blocking=True)
            return words[(draws * len(words)).long()]
        if vocabulary is None:
            raise DistillError("InContext knows no vocabulary for this model; give words=torch.arange(...).")
        return _draw_besides(torch.where(special, ids, vocabulary), vocabulary, draws)


_known: WeakKeyDictionary[InContext, set[int | None]] = WeakKeyDictionary()
"""The vocabularies that have all tokens which a rule names."""


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return random numbers from [0, 1), drawn where the generator is and moved to the device of `like`."""
    return torch.rand(like.shape, generator=generator, device=generator.device).to(like.device, non_blocking=True)


def _draw_besides(left_out: Tensor, vocabulary: int, uniform: Tensor) -> Tensor:
    """Return tokens of a vocabulary beside some; how many are left stays on the device.

    Args:
        left_out: the tokens that are not drawn; those from `vocabulary` on are none.
        vocabulary: the number of tokens.
        uniform: a random number from [0, 1) for each token to draw.
    """
    allowed = torch.ones(vocabulary + 1, dtype=torch.bool, device=uniform.device)
    allowed = allowed.index_fill(0, left_out.flatten(), False)[:vocabulary]
    rank = allowed.cumsum(0)
    return torch.searchsorted(rank, (uniform * rank[-1]).long() + 1)
