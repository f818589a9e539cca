"""The positions of activations and answers that are no padding, and the answers of a source beside those of a base."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from distill.models.inputs import decoder_masked, real_tokens
from distill.teachers.verbs import grid_of
from interventions import Location, Run, architecture


def real_positions(base: Run, at: Location, batch: Mapping[str, Tensor]) -> Bool[Tensor, "batch _"]:
    """Return which positions of a location are no padding; one real position where the activations have none."""
    rows, *width = grid_of(base, at.whole)
    if not width:
        return torch.ones(rows, 1, dtype=torch.bool)
    masked, column = decoder_masked(base.model, batch), architecture(base.model).place(at).mask
    return real_tokens(masked, rows, width[0], base.logits.device, column=column)


def real_answers(logits: Tensor, batch: Mapping[str, Tensor]) -> Bool[Tensor, "batch token"]:
    """Return which tokens of a token model's answers are no padding."""
    decodes = {"decoder_input_ids", "decoder_attention_mask"} & batch.keys()
    column = "decoder_attention_mask" if decodes else "attention_mask"
    rows, width = logits.shape[:2]
    return real_tokens(batch, rows, width, logits.device, column=column)


def columns_of_answers(
    source: Tensor, source_batch: Mapping[str, Tensor], base: Tensor, base_batch: Mapping[str, Tensor]
) -> Int[Tensor, "batch token"] | None:
    """Return for each token of the base the column of the source's token of the same number; −1 where there is none."""
    if base.ndim == 2:
        return None
    there, here = real_answers(source, source_batch), real_answers(base, base_batch)
    columns = torch.argsort((~there).int(), dim=1, stable=True)
    rank = (here.cumsum(1) - 1).clamp(min=0)
    found = columns.gather(1, rank.clamp(max=columns.shape[1] - 1))
    return found.where(rank < there.sum(1, keepdim=True), -1)
