"""Where the sources of interchanges come from, and at which positions base and source are interchanged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from distill.errors import DistillError, checked
from interventions import shown


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


@checked
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


@checked
@dataclass(frozen=True)
class Crossway(Shuffle):
    """As `Shuffle`, and every pair serves both ways: base and source change parts, the positions with them.

    The terms are the mean of the two directions. Causal-Distill (arXiv:2112.02505) has it as `--include_crossway`; its
    published runs do not use it, and its code leaves the positions where they were.
    """


@checked
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
        if self.candidates is not None and not all(self.candidates.values() if self.candidates else [()]):
            raise DistillError(
                f"InContext(candidates={shown(self.candidates)}) has nothing to draw from; name some for each token, "
                "e.g. candidates={7: [8, 9]}."
            )

    def draw(
        self, batch: Mapping[str, Tensor], vocabulary: int | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The batch with tokens replaced."""
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
        return {**batch, "input_ids": torch.where(chosen, self._drawn(ids, special, vocabulary, generator), ids)}

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
