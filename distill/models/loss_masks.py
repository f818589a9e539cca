"""The loss mask: the answers of a model that a loss is over.

    mask[b, t] = token t of row b is no padding ∧ the label of the answer at t is not −100

A causal language model predicts at t the token at t + 1, so the label of that answer is the one at t + 1; in all other
models the label of an answer is at its own position. If tokens have no labels, only padding is left out.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from jaxtyping import Shaped
from torch import Tensor

from distill.data.missing import IGNORED
from distill.errors import DistillError
from distill.losses.chunked import LazyLogits
from distill.models.host_copies import host_columns, on_both
from distill.models.inputs import answer_mask, innermost, mask_of, writes_labels
from distill.models.token_positions import starts

CHOICES = ("labelled", "all")
"""Choices of tokens: those whose answer has a label that is not −100, or all that are no padding."""
LabelPlace = Literal["none", "here", "next"]
"""The place of the label of the answer at a token: there, at the next token, or none: labels belong to examples."""

TOKENS, ALL, SOURCE, LABELS = "tokens", "all tokens", "source tokens", "labels"
"""Kinds of means: over the answers in the loss mask, over all that are no padding, over the tokens of an encoder whose
decoder answers, and over the labels at their own places."""

NEXT, HERE = ("ForCausalLM", "ForConditionalGeneration"), ("ForMaskedLM", "ForTokenClassification")
AT_THEIR_PLACES = frozenset({"XLNetLMHeadModel", "XLMWithLMHeadModel", "FlaubertWithLMHeadModel"})
LOOKED_AT = 256
"""The number of rows that are read to find the place of labels."""


def checked_tokens(tokens: Any, owner: str) -> str:
    """Return the setting `tokens` of `owner`, after a check that it is one of `CHOICES`.

    Raises:
        DistillError: any other value.
    """
    if tokens not in CHOICES:
        raise DistillError(
            f"{owner}(tokens={tokens!r}) does not exist; use 'labelled' (those whose label is not -100, where tokens "
            "have labels) or 'all' (all that are no padding)."
        )
    return str(tokens)


def label_place(
    model: Any, logits: Tensor | LazyLogits | None, batch: Mapping[str, Tensor], table: Mapping[str, Any] | None = None
) -> LabelPlace:
    """Return the place of the label of the answer at a token.

    For models of transformers their class, which names their loss, decides. For others the labels decide: labels that
    equal the tokens at their places belong to a language model that predicts the next token. Labels that are shifted
    already, each the token after its place, stay at their places.

    Args:
        model: the model that answers.
        logits: its answers to the batch; None for a model without logits.
        batch: the columns, on the device of the model.
        table: the columns of all data, which decide; None is the batch.
    """
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if labels is None or logits is None or labels.ndim != 2 or logits.ndim != 3 or labels.shape != logits.shape[:2]:
        return "none"
    if answers_by_decoder(model, batch):
        return "here"
    known = _place_by_class(innermost(model))
    if known in ("here", "none") or ids is None or ids.shape != labels.shape:
        return known or "here"
    rows = batch if table is None else table
    if _are_tokens(rows["labels"], rows["input_ids"], 0):
        return "next"
    return "next" if known == "next" and not _are_tokens(rows["labels"], rows["input_ids"], 1) else "here"


def expects_next(model: Any) -> bool:
    """Return whether the class of a model of transformers says that it predicts the next token."""
    return _place_by_class(innermost(model)) == "next"


def predicts_next(model: Any) -> bool:
    """Return whether the class of a model says that it predicts the next token of its own inputs, as decoders do."""
    is_pair = getattr(getattr(innermost(model), "config", None), "is_encoder_decoder", False)
    return not is_pair and expects_next(model)


def answers_by_decoder(model: Any, batch: Mapping[str, Tensor]) -> bool:
    """Return whether a decoder answers, so that the labels do not belong to the tokens that the encoder reads."""
    return "decoder_input_ids" in batch or writes_labels(model, batch)


def answer_labels(
    batch: Mapping[str, Tensor], place: LabelPlace, real: Shaped[Tensor, "batch token"] | None
) -> Tensor | None:
    """Return the label of each answer, `[batch, token]`, −100 for ignored ones; None if tokens have no labels.

    Args:
        batch: the columns.
        place: the place of the labels.
        real: which positions are no padding; None for all.
    """
    labels = batch.get("labels")
    if labels is None or place == "none" or labels.ndim != 2:
        return None
    found = labels if labels.is_floating_point() else labels.long()
    kept = None if real is None or real.shape != labels.shape else real.bool()
    if place == "next":
        if "position_ids" in batch and batch["position_ids"].shape == found.shape:  # no document predicts the next
            found = found.masked_fill(starts(batch), IGNORED)
        found = torch.cat([found[:, 1:], torch.full_like(found[:, :1], IGNORED)], 1)
        kept = None if kept is None else kept & torch.cat([kept[:, 1:], torch.zeros_like(kept[:, :1])], 1)
    return found if kept is None else found.masked_fill(~kept, IGNORED)


def loss_masks(model: Any, batch: Mapping[str, Tensor], place: LabelPlace) -> dict[str, Tensor | None]:
    """Return the positions that each kind of mean is over, `[batch, token]`; None for all positions."""
    return on_both(partial(_loss_masks, model, place), batch)


def _loss_masks(model: Any, place: LabelPlace, batch: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    real = answer_mask(model, batch)
    labels = answer_labels(batch, place, real)
    return {TOKENS: real if labels is None else labels != IGNORED, ALL: real, SOURCE: mask_of(batch)}


def labelled(model: Any, batch: Mapping[str, Tensor], place: LabelPlace) -> Tensor | None:
    """Return which labels, at their own places, are not ignored, in the shape of the labels; None without labels."""
    if "labels" not in batch:
        return None
    here = None if place == "none" else answer_labels(batch, "here", answer_mask(model, batch))
    return (batch["labels"] if here is None else here) != IGNORED


def examples_with(kind: str) -> str:
    """Return the name of the mean over the examples that have any position of a kind."""
    return f"examples with {kind}"


def counts_of(model: Any, batch: Mapping[str, Tensor], place: LabelPlace) -> dict[str, int]:
    """Return the number of values that each kind of mean is over."""
    batch = host_columns(batch)
    rows = len(next(iter(batch.values())))
    counts = {"examples": rows}
    for kind, mask in loss_masks(model, batch, place).items():
        counts[kind] = rows if mask is None else int(mask.sum())
        counts[examples_with(kind)] = rows if mask is None else int(mask.bool().any(1).sum())
    labels = labelled(model, batch, place)
    return counts if labels is None else {**counts, LABELS: int(labels.sum())}


def _place_by_class(model: Any) -> LabelPlace | None:
    """Return the place where the class of a model expects labels; None if the class does not decide it."""
    names = {cls.__name__ for cls in type(model).__mro__}
    if names & AT_THEIR_PLACES:
        return "here"
    loss = getattr(model, "loss_type", None)
    if isinstance(loss, str):
        return "next" if loss.endswith(NEXT) else "here" if loss in HERE else "none"
    if not hasattr(model, "loss_type"):  # no model of transformers
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return "next" if names & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) else None


def _are_tokens(labels: Iterable[Tensor], ids: Iterable[Tensor], ahead: int) -> bool:
    """Return whether, in the first rows, the labels that are not −100 equal the tokens so many places ahead."""
    some = False
    for row, tokens in islice(zip(labels, ids, strict=True), LOOKED_AT):
        if row.shape != tokens.shape or row.is_floating_point():
            return False
        here, there = row[: len(row) - ahead], tokens[ahead:]
        counts = here != IGNORED
        if not bool((here == there.to(here))[counts].all()):
            return False
        some = some or bool(counts.any())
    return some
