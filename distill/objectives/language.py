"""Objectives of language models: masked language modelling (MLM) and causal language modelling (CLM).

With the student's logits z_t at token t of the text x,

    MLM = CE(z_t, x_t), averaged over the tokens t that were masked
    CLM = CE(z_t, x_{t+1}), averaged over the tokens t.

Devlin et al. 2018 (BERT, arXiv:1810.04805), section 3.1; Radford et al. 2018, Improving Language Understanding by
Generative Pre-Training, section 3.1. MLM is a term of distillation in Sanh et al. 2019 (arXiv:1910.01108), section 3.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distill.errors import DistillError, checked
from distill.losses import cross_entropy
from distill.losses.chunked import LazyLogits, mean_in_chunks
from distill.losses.common import is_labelled
from distill.models.head import lazy_logits
from distill.models.host_copies import on_both
from distill.models.inputs import MASKED, TEACHERS, following, writes_labels
from distill.models.loss_masks import LABELS
from distill.objectives.objective import About, Objective
from distill.objectives.step import Step, zero_of
from interventions import on_host

FOLLOWING = "next_tokens"


@checked
class MaskedLM(Objective):
    """Masked language modelling: cross-entropy of the tokens that were masked, for the student. Term `mlm`.

    In every step each token that is neither special nor padding is chosen with probability `share`, at least one of
    each text; of the chosen, 80 % become the mask token, 10 % a random one, 10 % stay. Teacher and student read the
    same masked text.

    Devlin et al. 2018 (BERT, arXiv:1810.04805), section 3.1; as a term of distillation: Sanh et al. 2019
    (arXiv:1910.01108), section 3.

    Args:
        tokenizer: has the mask token, the special tokens and the number of tokens. None: the data is masked already,
            and its column `labels`, `[batch, token]`, holds the tokens, −100 where none was masked.
        share: the probability that a token is chosen.
        replaced: the shares of the chosen tokens that become the mask token, and a random token.
    """

    about = About(("mlm",), "CE(z_s, token) over the masked tokens", "Devlin et al. 2018, arXiv:1810.04805")

    def __init__(
        self, tokenizer: Any = None, *, share: float = 0.15, replaced: tuple[float, float] = (0.8, 0.1)
    ) -> None:
        super().__init__()
        if not 0 < share <= 1 or min(replaced) < 0 or sum(replaced) > 1:
            raise DistillError(
                f"MaskedLM(share={share}, replaced={replaced}) are no shares; use e.g. share=0.15, replaced=(0.8, 0.1)."
            )
        self.share, self.replaced = share, replaced
        self.needs = () if tokenizer is not None else ("labels",)
        self.mask_token: int | None = None
        if tokenizer is not None:
            self.mask_token = _mask_token(tokenizer)
            self.tokens, self.special = len(tokenizer), tuple(tokenizer.all_special_ids)

    in_chunks = True

    def alter(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Mapping[str, Tensor]:
        """Return the batch with tokens masked and with what they were; a batch that is masked already is returned."""
        if self.mask_token is None or MASKED in batch:
            return batch
        if TEACHERS + "input_ids" in batch:
            raise DistillError(
                "MaskedLM masks the text that both models read, and here the teacher reads tokens of its own; give "
                "data that is masked already, and MaskedLM()."
            )
        if "input_ids" not in batch:
            raise DistillError(f"MaskedLM masks input_ids and the data has {', '.join(batch)}; leave it out.")
        ids = batch["input_ids"]
        eligible = ~torch.isin(ids, torch.tensor(self.special, device=ids.device))
        for column, counts in (("attention_mask", 1), ("special_tokens_mask", 0)):
            if column in batch:
                eligible = eligible & (batch[column] == counts)
        draws = torch.rand(3, *ids.shape, generator=generator, device=generator.device).to(ids.device)
        first = draws[0].masked_fill(~eligible, 2)
        chosen = eligible & ((first < self.share) | (first == first.amin(1, keepdim=True)))
        masked = torch.where(chosen & (draws[1] < self.replaced[0]), self.mask_token, ids)
        random = chosen & (draws[1] >= self.replaced[0]) & (draws[1] < sum(self.replaced))
        masked = torch.where(random, (draws[2] * self.tokens).long().clamp(max=self.tokens - 1), masked)
        return {**batch, "input_ids": masked.to(ids.dtype), MASKED: ids.masked_fill(~chosen, -100)}

    def counts(self, batch: Mapping[str, Tensor]) -> Mapping[str, int]:
        """Return the number of masked tokens, where they were masked in this step."""
        return {MASKED: int((batch[MASKED] != -100).sum())} if MASKED in batch else {}

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the term `mlm`; 0 where no token happens to be masked."""
        logits = lazy_logits(step.student) or step.student.logits
        labels = step.batch[MASKED] if MASKED in step.batch else step.labels_in_place("MaskedLM()")
        _refuse_other_shapes(logits, labels, "MaskedLM")
        return {"mlm": _cross_entropy(step, logits, labels, MASKED if MASKED in step.batch else LABELS)}

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        if self.mask_token is None:
            return ""
        return f"mask_token={self.mask_token}, tokens={self.tokens}, share={self.share}, replaced={self.replaced}"


class CausalLM(Objective):
    """Causal language modelling: cross-entropy of each next token, for the student. Term `clm`.

    The answer at a token is compared with the token after it, unless either is padding. The tokens are the data's
    `labels`, `[batch, token]`, not shifted, −100 where none counts; without that column `input_ids`. An
    encoder–decoder whose decoder has no inputs of its own reads the labels shifted by one: its answer at a position is
    compared with the label there.

    Radford et al. 2018, Improving Language Understanding by Generative Pre-Training, section 3.1.
    """

    about = About(
        ("clm",), "CE(z_s at token t, token t + 1) over the tokens that are no padding", "Radford et al. 2018"
    )

    in_chunks = True

    def counts(self, batch: Mapping[str, Tensor]) -> Mapping[str, int]:
        """Return the number of tokens that follow another."""
        return {FOLLOWING: int((following(batch) != -100).sum())} if "input_ids" in batch else {}

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the term `clm`."""
        logits = lazy_logits(step.student) or step.student.logits
        writes = writes_labels(step.network, step.batch)  # its decoder reads the labels shifted by one already
        step.column("labels" if writes else "input_ids", "CausalLM()")
        if "decoder_input_ids" in step.batch:
            raise DistillError("CausalLM() is for models that read what they write; for encoder–decoders use Labels().")
        labels = step.batch["labels"] if writes else on_both(following, step.batch)
        if not writes:
            logits = logits[:, :-1] if isinstance(logits, Tensor) else logits.mapped(lambda rows: rows[:, :-1])
        _refuse_other_shapes(logits, labels, "CausalLM")
        return {"clm": _cross_entropy(step, logits, labels, LABELS if writes else FOLLOWING)}


def _cross_entropy(step: Step, logits: Tensor | LazyLogits, labels: Tensor, over: str) -> Tensor:
    """Return the cross-entropy of labels that are not −100, as its part of the whole step; 0 where there are none."""
    if not bool((on_host(labels) != -100).any()):
        return zero_of(logits)
    if isinstance(logits, Tensor):
        return step.mean(cross_entropy(logits, labels), over)
    return step.mean(mean_in_chunks(cross_entropy, logits, labels, mask=is_labelled(labels)), over)


def _refuse_other_shapes(logits: Tensor | LazyLogits, labels: Tensor, caller: str) -> None:
    """Raise DistillError if there is not one answer for each label of a token."""
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise DistillError(
            f"{caller}() needs a model that answers at every token, [batch, token, vocabulary], and it answers "
            f"{list(logits.shape)} for tokens {list(labels.shape)}; use Labels() for classifiers."
        )


def _mask_token(tokenizer: Any) -> int:
    """Return the id of the mask token, or raise DistillError if the tokenizer has none."""
    found = getattr(tokenizer, "mask_token_id", None)
    if found is None:
        raise DistillError(
            f"MaskedLM({type(tokenizer).__name__}) has no mask token; use CausalLM() for models that read from left to "
            "right, or set tokenizer.mask_token."
        )
    return int(found)
