"""Objectives and sources of the original programs that the library has in another form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distill.errors import DistillError
from distill.interchange.mapping import Entry
from distill.interchange.positions import Span
from distill.losses import cross_entropy, hint, kd, squared_error
from distill.models.inputs import MASKED
from distill.objectives import Objective, Reads, Step
from interventions import Location

AT_EMBEDDING = (Entry((Location(site="embedding"),), (Location(site="embedding"),)),)
"""The mapping that goes with `Spliced`."""


class Patience(Objective):
    """Squared error between the first tokens of chosen layers: `kd.cls` without `--normalize_patience`. Term `pkd`.

    The vectors h of the first token are compared as they are, ‖h_student − h_teacher‖² as a mean over dims, layers and
    examples. With that flag the program takes `PKD(layers)`.

    Sun et al. 2019 (patient knowledge distillation, arXiv:1908.09355).

    Args:
        layers: teacher location → student location.
    """

    def __init__(self, layers: Mapping[Location, Location]) -> None:
        super().__init__()
        self.layers = layers

    def reads(self, mapping: Sequence[Entry]) -> Reads:
        """Return the compared locations of both models."""
        return Reads(tuple(self.layers), tuple(self.layers.values()))

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Compute the term `pkd`."""
        teacher = torch.stack([step.taught.vectors(above)[:, 0] for above in self.layers], 1)
        student = torch.stack([step.student.vectors(below)[:, 0] for below in self.layers.values()], 1)
        return {"pkd": step.mean(hint(student, teacher))}

    def extra_repr(self) -> str:
        """Return the settings, for printing."""
        return ", ".join(f"{above} ↔ {below}" for above, below in self.layers.items())


class SquaredLogits(Objective):
    """Squared error between logits, summed over the classes, a mean over positions: `--alpha_mse`. Term `mse`."""

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Compute the term `mse`."""
        student = step.student.logits
        mask = step.mask(student, tokens="all")
        return {"mse": step.mean(squared_error(student, step.taught.logits, mask=mask), mask)}


class MaskedKD(Objective):
    """Knowledge distillation at the masked tokens alone: `--restrict_ce_to_mask`. Term `kd`.

    Args:
        temperature: softens both answers.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Compute the term `kd`."""
        student, labels = step.student.logits, step.column(MASKED, "MaskedKD()")
        if not (labels != -100).any():
            return {"kd": 0.0 * student.sum()}
        loss = kd(student, step.taught.logits, self.temperature, mask=labels != -100)
        return {"kd": step.mean(loss, MASKED)}

    def counts(self, batch: Mapping[str, Tensor]) -> Mapping[str, int]:
        """Count the masked tokens."""
        return _masked(batch)

    def extra_repr(self) -> str:
        """Return the settings, for printing."""
        return f"temperature={self.temperature}"


class CountedMaskedLM(Objective):
    """Masked language modeling that prefers rare tokens. Term `mlm`, the cross-entropy over the chosen tokens.

    ⌈share · tokens⌉ tokens of the batch are chosen without replacement, with the probabilities of their ids. Both
    models read the masked text, as in the original.

    Sanh et al. 2019 (DistilBERT, arXiv:1910.01108), section 4; the smoothing is that of XLM (arXiv:1901.07291).

    Args:
        probabilities: of each token of the vocabulary to be chosen, up to a factor; 0 for special tokens.
        mask_id: the id of the mask token.
        share: the share of tokens that are chosen.
        words: the shares of the chosen tokens that are masked, kept, and replaced by a random token.
        every_row: whether at least one token of every row is chosen, for interchanges of these tokens.
    """

    def __init__(
        self,
        probabilities: Float[Tensor, " vocabulary"],
        mask_id: int,
        *,
        share: float = 0.15,
        words: tuple[float, float, float] = (0.8, 0.1, 0.1),
        every_row: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise DistillError(f"--mlm_mask_prop {share} is not a share above 0 and up to 1; use e.g. 0.15.")
        if min(words) < 0 or abs(sum(words) - 1) > 1e-6:
            raise DistillError(
                f"--word_mask {words[0]}, --word_keep {words[1]} and --word_rand {words[2]} are the shares of the "
                "chosen tokens and must add up to 1; use e.g. 0.8, 0.1 and 0.1."
            )
        self._weights = probabilities  # no buffer: it is neither saved nor cast with the model
        self.mask_id, self.share, self.words, self.every_row = mask_id, share, words, every_row

    def alter(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Mapping[str, Tensor]:
        """Return the batch with masked tokens, and a column of the tokens that they replace."""
        ids = batch["input_ids"]
        real = _real(batch)
        chosen = self._choose(ids, real, generator)
        draws = torch.rand(ids.shape, generator=generator, device=generator.device).to(ids.device)
        random = torch.randint(len(self._weights), ids.shape, generator=generator, device=generator.device).to(
            ids.device
        )
        masked, kept, _ = self.words
        replaced = torch.where(draws < masked, self.mask_id, torch.where(draws < masked + kept, ids, random))
        return {**batch, "input_ids": torch.where(chosen, replaced, ids), MASKED: ids.masked_fill(~chosen, -100)}

    def counts(self, batch: Mapping[str, Tensor]) -> Mapping[str, int]:
        """Count the masked tokens."""
        return _masked(batch)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Compute the term `mlm`."""
        student, labels = step.student.logits, step.column(MASKED, "CountedMaskedLM()")
        if not (labels != -100).any():
            return {"mlm": 0.0 * student.sum()}
        return {"mlm": step.mean(cross_entropy(student, labels), MASKED)}

    def extra_repr(self) -> str:
        """Return the settings, for printing."""
        return f"share={self.share}, words={self.words}"

    def _choose(
        self, ids: Tensor, real: Bool[Tensor, "rows tokens"], generator: torch.Generator
    ) -> Bool[Tensor, "rows tokens"]:
        """Draw the tokens that are to be predicted."""
        probabilities = self._weights.to(ids.device)[ids] * real
        # The largest p / Exp(1) are a sample without replacement, in proportion to p (Efraimidis, Spirakis 2006).
        noise = torch.empty(ids.shape, device=generator.device).exponential_(generator=generator).to(ids.device)
        keys = probabilities / noise.clamp(min=1e-30)
        count = min(-int(-self.share * int(real.sum()) // 1), int((keys > 0).sum()))
        chosen = torch.zeros_like(real).flatten().scatter(0, keys.flatten().topk(count).indices, True).view_as(real)
        if self.every_row:
            best = torch.zeros_like(real).scatter(1, keys.argmax(1, keepdim=True), True)
            chosen = chosen | (best & (keys > 0))
        return chosen


@dataclass(frozen=True)
class Spliced:
    """Sources that are the base with a span of tokens from another example of the batch: `--data_augment`.

    With the mapping `AT_EMBEDDING` and `positions=None` the counterfactual runs are runs of these texts.

    Args:
        span: draws the tokens that are replaced, and those that replace them.
        aligned: always True: a position of the source is that of the base.
    """

    span: Span
    aligned: bool = True

    def draw(
        self, batch: Mapping[str, Tensor], vocabulary: int | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return the batch with tokens replaced."""
        ids = batch["input_ids"]
        rows, width = ids.shape
        others = torch.randperm(rows, generator=generator, device=generator.device).to(ids.device)
        real = _real(batch)
        uniform = torch.rand(rows, 2, width, generator=generator, device=generator.device).to(ids.device)
        eligible = self.span.eligible(batch, real)
        in_others = self.span.eligible({name: column[others] for name, column in batch.items()}, real[others])
        written, read = self.span.draw(eligible, in_others, uniform)
        return {**batch, "input_ids": ids.masked_scatter(written, ids[others][read])}


def _real(batch: Mapping[str, Tensor]) -> Bool[Tensor, "rows tokens"]:
    """Return which tokens are no padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _masked(batch: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of masked tokens, by the name of their column."""
    return {MASKED: int((batch[MASKED] != -100).sum())} if MASKED in batch else {}
