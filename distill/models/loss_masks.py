"""The loss mask: which answers of a model a loss is over.

mask[b, t] = token t of row b is no padding ∧ the label of the answer at t is not −100

A causal language model answers at t what comes after it, so the label of that answer is the one at t + 1; all other
models have the labels of their answers at their own places. Where no token has a label, padding alone is left out.
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Literal

import torch
from jaxtyping import Shaped
from torch import Tensor

from distill.errors import DistillError
from distill.models.inputs import answer_mask, innermost, mask_of, writes_labels
from distill.models.token_positions import starts

CHOICES = ("labelled", "all")
"""Which tokens count: those whose answer has a label that is not −100, or all that are no padding."""
LabelPlace = Literal["none", "here", "next"]
"""Where the label of the answer at a token stands: there, at the next token, or nowhere: labels are of examples."""

TOKENS, ALL, SOURCE, LABELS = "tokens", "all tokens", "source tokens", "labels"
"""Kinds of means: over the answers that count, all that are no padding, the tokens of an encoder where the decoder
answers, and the labels at their own places."""

IGNORED = -100
NEXT, HERE = ("ForCausalLM", "ForConditionalGeneration"), ("ForMaskedLM", "ForTokenClassification")
AT_THEIR_PLACES = frozenset({"XLNetLMHeadModel", "XLMWithLMHeadModel", "FlaubertWithLMHeadModel"})
LOOKED_AT = 256
"""Rows by which is decided where labels stand."""


def checked_tokens(tokens: Any, asked: str) -> str:
    """`tokens` if it is a choice of tokens; `asked` is who was given it."""
    if tokens not in CHOICES:
        raise DistillError(
            f"{asked}(tokens={tokens!r}) does not exist; use 'labelled' (those whose label is not -100, where tokens "
            "have labels) or 'all' (all that are no padding)."
        )
    return str(tokens)


def label_place(
    model: Any, logits: Tensor | None, batch: Mapping[str, Tensor], table: Mapping[str, Any] | None = None
) -> LabelPlace:
    """Where the label of the answer at a token stands.

    Models of transformers say by their class what their loss is. Of others the labels decide: those that are the tokens
    at their places are of a language model that answers what comes next. Labels that are shifted already, each the
    token after its place, stay where they are.

    Args:
        model: that answers.
        logits: its answers to the batch; None of a model that only embeds.
        batch: the columns, on the device.
        table: the columns of all data, by which to decide; None is the batch.
    """
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if labels is None or logits is None or labels.ndim != 2 or logits.ndim != 3 or labels.shape != logits.shape[:2]:
        return "none"
    if answers_by_decoder(model, batch):
        return "here"
    known = _known(innermost(model))
    if known in ("here", "none") or ids is None or ids.shape != labels.shape:
        return known or "here"
    rows = batch if table is None else table
    if _are_tokens(rows["labels"], rows["input_ids"], 0):
        return "next"
    return "next" if known == "next" and not _are_tokens(rows["labels"], rows["input_ids"], 1) else "here"


def answers_by_decoder(model: Any, batch: Mapping[str, Tensor]) -> bool:
    """Whether a decoder answers, so that the labels are not those of the tokens that the encoder reads."""
    return "decoder_input_ids" in batch or writes_labels(model, batch)


def answer_labels(
    batch: Mapping[str, Tensor], place: LabelPlace, real: Shaped[Tensor, "batch token"] | None
) -> Tensor | None:
    """The label of each answer, `[batch, token]`, −100 where none counts; None where tokens have no labels.

    Args:
        batch: the columns.
        place: where the labels stand.
        real: which positions are no padding; None for all.
    """
    labels = batch.get("labels")
    if labels is None or place == "none" or labels.ndim != 2:
        return None
    found = labels if labels.is_floating_point() else labels.long()
    kept = None if real is None or real.shape != labels.shape else real.bool()
    if place == "next":
        if "position_ids" in batch and batch["position_ids"].shape == found.shape:  # no document says the next one
            found = found.masked_fill(starts(batch), IGNORED)
        found = torch.cat([found[:, 1:], torch.full_like(found[:, :1], IGNORED)], 1)
        kept = None if kept is None else kept & torch.cat([kept[:, 1:], torch.zeros_like(kept[:, :1])], 1)
    return found if kept is None else found.masked_fill(~kept, IGNORED)


def loss_masks(model: Any, batch: Mapping[str, Tensor], place: LabelPlace) -> dict[str, Tensor | None]:
    """Which positions each kind of mean is over, `[batch, token]`; None where all count."""
    real = answer_mask(model, batch)
    labels = answer_labels(batch, place, real)
    return {TOKENS: real if labels is None else labels != IGNORED, ALL: real, SOURCE: mask_of(batch)}


def labelled(model: Any, batch: Mapping[str, Tensor], place: LabelPlace) -> Tensor | None:
    """Which labels count at their own places, in the shape of the labels; None where there are no labels."""
    if "labels" not in batch:
        return None
    here = None if place == "none" else answer_labels(batch, "here", answer_mask(model, batch))
    return (batch["labels"] if here is None else here) != IGNORED


def examples_with(kind: str) -> str:
    """The kind of a mean over the examples that have any position of a kind."""
    return f"examples with {kind}"


def counts_of(model: Any, batch: Mapping[str, Tensor], place: LabelPlace) -> dict[str, int]:
    """Over how many values means are, by kind."""
    rows = len(next(iter(batch.values())))
    counts = {"examples": rows}
    for kind, mask in loss_masks(model, batch, place).items():
        counts[kind] = rows if mask is None else int(mask.sum())
        counts[examples_with(kind)] = rows if mask is None else int(mask.bool().any(1).sum())
    labels = labelled(model, batch, place)
    return counts if labels is None else {**counts, LABELS: int(labels.sum())}


def _known(model: Any) -> LabelPlace | None:
    """Where the class of a model expects labels; None where it does not say."""
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
    """Whether the labels that count are the tokens so many places ahead, in the first rows, and any counts."""
    some = False
    for mine, tokens in islice(zip(labels, ids, strict=True), LOOKED_AT):
        if mine.shape != tokens.shape or mine.is_floating_point():
            return False
        here, there = mine[: len(mine) - ahead], tokens[ahead:]
        counts = here != IGNORED
        if not bool((here == there.to(here))[counts].all()):
            return False
        some = some or bool(counts.any())
    return some
