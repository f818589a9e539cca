"""Figures of one model on held-out rows: accuracy, perplexity, and preferences among minimal pairs of sentences."""

from collections.abc import Mapping
from math import exp
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from distill.causal.feed import chunks
from distill.causal.model import CausalModel
from distill.causal.values import Values
from distill.data.rows import Rows, batches
from distill.data.texts.lengths import similar_batches
from distill.errors import DistillError, checked
from distill.evaluation.answers.labelled_answers import labelled_answers, logits_of
from distill.evaluation.calibration import Calibration, calibration, expected_calibration_error
from distill.evaluation.similarity import cka, representational_similarity
from distill.interchange.swap import encoded
from distill.losses import cross_entropy
from distill.models.class_labels import has_classes
from distill.models.finite import check_answers
from distill.models.inputs import (
    device_of,
    evaluating,
    following,
    refuse_valueless,
    to_device,
    uncompiled,
)
from distill.models.loss_masks import answers_by_decoder, labelled
from distill.models.outputs import answered
from distill.models.trials import translated
from distill.processes import are_divided, gather_parts, own_part
from distill.statistics.intervals import Share, bootstrap, wilson
from distill.tasks.loading import held_out
from distill.tasks.minimal_pairs import MinimalPairs
from interventions import run

__all__ = [
    "Calibration",
    "Share",
    "accuracy",
    "batches",
    "bootstrap",
    "calibration",
    "cka",
    "evaluating",
    "expected_calibration_error",
    "has_classes",
    "perplexity",
    "preferences",
    "representational_similarity",
    "wilson",
]


@checked
def accuracy(
    model: nn.Module, data: Any, *, values: Values | None = None, batch_size: int = 128, answers: Any = None
) -> Share:
    """Measure the share of rows (of token models, of labelled tokens) that are answered right.

    The share has its Wilson score interval.

    Args:
        model: a classifier or a language model.
        data: as `fit` takes it: a Task or the name of one (its test rows), a file, or rows in any form that `Rows.of`
            takes. Or a causal model, whose answers are the right ones.
        values: of a causal model, the examples: `causal_model.sample(1000, generator)`.
        batch_size: rows of a forward.
        answers: which part of the output of the model is its answer, as for `fit`.

    Raises:
        DistillError: data without labels, or with a label that is no class of the model; a causal model without values.
    """
    if isinstance(data, CausalModel):
        return _accuracy_under(data, model, values, batch_size, answers)
    if values is not None:
        raise DistillError(
            f"accuracy(data={type(data).__name__}, values=…): values are the examples of a causal model, and "
            "other data holds its own; leave values out."
        )
    with answered((model,), answers):
        if not are_divided():
            return wilson(*_count_right(model, data, batch_size))
        rows = held_out(data, uncompiled(model))
        own = own_part(torch.arange(len(rows)))
        parts = gather_parts(
            lambda: _count_right(model, rows.take(own), batch_size, needed=False) if len(own) else (0, 0)
        )
        right, total = (sum(each) for each in zip(*parts, strict=True))
        return wilson(right, total) if total else wilson(*_count_right(model, rows, batch_size))


def _count_right(model: nn.Module, data: Any, batch_size: int, *, needed: bool = True) -> tuple[int, int]:
    """Return how many answers that have a label are right, and how many there are."""
    right = total = 0
    for logits, labels, _ in labelled_answers(model, data, batch_size, "accuracy", needed=needed):
        right += int((logits.argmax(-1) == labels).sum())
        total += len(labels)
    return right, total


def _accuracy_under(
    causal_model: CausalModel, network: nn.Module, values: Values | None, batch_size: int, answers: Any
) -> Share:
    """Measure the share of examples that a network answers as a causal model does; the arguments are `accuracy`'s."""
    if values is None:
        raise DistillError(
            "accuracy(network, causal_model) has no examples; give some, e.g. "
            "values=causal_model.sample(1000, torch.Generator().manual_seed(0))."
        )
    refuse_valueless(network, "accuracy")
    right, device = 0, device_of(network)
    with evaluating(network), torch.no_grad(), answered((network,), answers), translated():
        for chunk in chunks(values, batch_size):
            batch = to_device(chunk, device)
            found = run(network, encoded(causal_model, network, batch), resumable=False)
            logits = causal_model.decode(found.logits, batch)
            check_answers(logits, "accuracy")
            right += int((logits.argmax(-1) == causal_model.answers(batch)).sum())
    return wilson(right, len(next(iter(values.values()))))


@checked
def preferences(
    model: nn.Module, pairs: MinimalPairs, *, batch_size: int = 64, answers: Any = None
) -> dict[str, Share]:
    """Measure how often a causal language model finds the good sentence of a pair more probable than the bad one.

    The probability of a sentence is the product of those of its tokens after the first, each given those before it; the
    first counts where the tokenizer puts a token before it.

    Marvin, Linzen 2018 (arXiv:1808.09031), section 3.

    Args:
        model: a causal language model.
        pairs: sentences that differ in one word, in groups.
        batch_size: sentences of a forward.
        answers: which part of the output of the model is its answer, as for `fit`.

    Returns:
        The share of each group, and that of all pairs as "all".

    Raises:
        DistillError: a model that gives no logits for each token.
    """
    with answered((model,), answers):
        good, bad = (_log_probabilities(model, rows, batch_size) for rows in (pairs.good, pairs.bad))
    right = (good > bad).tolist()
    found = {}
    for group in dict.fromkeys(pairs.groups):
        mine = [each for each, of in zip(right, pairs.groups, strict=True) if of == group]
        found[group] = wilson(sum(mine), len(mine))
    return {**found, "all": wilson(sum(right), len(right))}


def _log_probabilities(model: nn.Module, rows: Rows, batch_size: int) -> Float[Tensor, " sentences"]:
    """Return the log-probability [nats] of each sentence, from its second token on."""
    found = torch.zeros(len(rows), dtype=torch.float64)
    with evaluating(model), torch.no_grad():
        for chosen in similar_batches(rows, batch_size):
            batch = to_device(rows.batch(chosen), device_of(model))
            logits = logits_of(model, batch)
            ids = batch["input_ids"]
            if logits.ndim != 3 or logits.shape[:2] != ids.shape:
                raise DistillError(
                    f"the logits have shape {list(logits.shape)} and the tokens {list(ids.shape)}; minimal pairs need "
                    "a language model, with logits [batch, token, vocabulary]."
                )
            each = logits[:, :-1].float().log_softmax(-1).gather(-1, rearrange(ids[:, 1:], "row token -> row token 1"))
            real = batch.get("attention_mask", torch.ones_like(ids)).bool()
            predicted = real[:, 1:] & real[:, :-1]
            check_answers(logits[:, :-1][predicted], "a preference")
            counted = rearrange(predicted, "row token -> row token 1")
            found[chosen] = reduce(each.masked_fill(~counted, 0.0).cpu().double(), "row token 1 -> row", "sum")
    return found


@checked
def perplexity(model: nn.Module, data: Any, *, batch_size: int = 32, answers: Any = None) -> float:
    """Measure the perplexity of a language model: exp of the mean cross-entropy [nats] of each next token.

    The mean is over the tokens that follow another and are no padding; with a column `labels`, over the labels that are
    not −100. An encoder–decoder predicts the labels, or else the input of its decoder.

    Args:
        model: a language model.
        data: rows of tokens, as `accuracy` takes them.
        batch_size: rows of a forward.
        answers: which part of the output of the model is its answer, as for `fit`.

    Raises:
        DistillError: data without input_ids, or a model that does not answer at every token.
    """
    model = uncompiled(model)
    data = held_out(data, model)
    with answered((model,), answers):
        return _perplexity(model, data, batch_size)


def _perplexity(model: nn.Module, data: Rows, batch_size: int) -> float:
    """Measure the perplexity on rows; the arguments are those of `perplexity`."""
    total = count = 0.0
    with evaluating(model), torch.no_grad():
        for rows in similar_batches(data, batch_size):
            batch = to_device(data.batch(rows), device_of(model))
            logits, labels = _next_tokens(model, batch)
            known = int((labels != -100).sum())
            if known:
                check_answers(logits[labels != -100], "perplexity")
                total += float(cross_entropy(logits, labels)) * known
                count += known
    if not count:
        raise DistillError(f"perplexity needs a token that follows another, and none of the {len(data)} rows has one.")
    return exp(total / count)


def _next_tokens(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the logits of a language model and the tokens that they predict; −100 for tokens that do not count."""
    logits, decodes = logits_of(model, batch), answers_by_decoder(model, batch)
    if decodes and "labels" in batch:
        counts = labelled(model, batch, "here")
        labels = batch["labels"] if counts is None else batch["labels"].masked_fill(~counts, -100)
    else:
        names = {"decoder_input_ids": "input_ids", "decoder_attention_mask": "attention_mask"} if decodes else None
        read = batch if names is None else {names[name]: x for name, x in batch.items() if name in names}
        if "input_ids" not in read:
            raise DistillError(f"perplexity needs a column 'input_ids' and the data has {', '.join(batch)}.")
        if logits.ndim == 3 and logits.shape[1] == read["input_ids"].shape[1]:
            logits = logits[:, :-1]
        labels = following(read)
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise DistillError(
            f"perplexity needs a model that answers at every token, [batch, token, vocabulary], and it answers "
            f"{list(logits.shape)}; use accuracy for classifiers."
        )
    return logits, labels
