"""How well a model answers: shares with their intervals."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from distill.causal.feed import chunks
from distill.causal.model import CausalModel
from distill.causal.values import Values
from distill.data.rows import Rows, batches
from distill.errors import DistillError, checked
from distill.evaluation.intervals import Share, bootstrap, wilson
from distill.evaluation.similarity import cka, representational_similarity
from distill.interchange.swap import encoded
from distill.losses import cross_entropy
from distill.models.class_labels import has_classes
from distill.models.finite import check_answers
from distill.models.inputs import (
    answer_mask,
    device_of,
    evaluating,
    following,
    refuse_valueless,
    students,
    to_device,
    uncompiled,
)
from distill.models.loss_masks import IGNORED, answer_labels, answers_by_decoder, label_place, labelled
from distill.models.numbering import numbered_as
from distill.models.outputs import answered
from distill.models.trials import answer_of, translated
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
    """The share of rows (of labelled tokens, for token models) that `model` answers right, with its Wilson interval.

    Args:
        model: a classifier or a language model.
        data: as `fit` takes it: a Task or the name of one (its test rows), a file, or rows in any form that `Rows.of`
            takes. Or a causal model, whose answers are the right ones.
        values: of a causal model, the examples: `causal_model.sample(1000, generator)`.
        batch_size: rows of a forward.
        answers: what of the output of the model is its answer, as for `fit`.

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
    right = total = 0
    with answered((model,), answers):
        for logits, labels in _answers(model, data, batch_size, "accuracy"):
            right += int((logits.argmax(-1) == labels).sum())
            total += len(labels)
    return wilson(right, total)


def _accuracy_under(
    causal_model: CausalModel, network: nn.Module, values: Values | None, batch_size: int, answers: Any
) -> Share:
    """The share of examples that a network answers as a causal model does."""
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
@dataclass(frozen=True)
class Calibration:
    """Whether a model is right as often as it is sure.

    Attributes:
        error: the expected calibration error, from 0 to 1.
        accuracy: how often its most probable class is the label.
        confidence: the mean probability of that class. Above the accuracy, the model is too sure.

    >>> print(Calibration(0.05, Share(0.9, 0.88, 0.92, 1000), 0.95))
    calibration error 0.050: accuracy 0.900 [0.880, 0.920], confidence 0.950
    """

    error: float
    accuracy: Share
    confidence: float

    def __post_init__(self) -> None:
        if not (0 <= self.error <= 1 and 0 <= self.confidence <= 1):
            raise DistillError(
                f"Calibration(error={self.error}, confidence={self.confidence}) has values that are not from 0 to 1; "
                "use calibration(model, data)."
            )

    def __str__(self) -> str:
        return f"calibration error {self.error:.3f}: accuracy {self.accuracy}, confidence {self.confidence:.3f}"


@checked
def calibration(
    model: nn.Module, data: Any, *, bins: int = 15, batch_size: int = 128, answers: Any = None
) -> Calibration:
    """The expected calibration error of `model` on rows (on labelled tokens, for token models), with its accuracy.

    `data` and `answers` are those of `accuracy`.

    Raises:
        DistillError: data without labels, or no bins.
    """
    confidences, correct = [], []
    with answered((model,), answers):
        for logits, labels in _answers(model, data, batch_size, "calibration"):
            if logits.shape[-1] < 2:
                raise DistillError("calibration is of classes, and this model has one output; use it for a classifier.")
            confidence, chosen = logits.cpu().double().softmax(-1).max(-1)  # in float32 sure answers would all be 1
            confidences.append(confidence)
            correct.append(chosen == labels.cpu())
    confidence, right = torch.cat(confidences), torch.cat(correct)
    error = expected_calibration_error(confidence, right, bins)
    return Calibration(float(error), wilson(int(right.sum()), len(right)), float(confidence.mean()))


@checked
def expected_calibration_error(
    confidence: Float[Tensor, " examples"], correct: Shaped[Tensor, " answers"], bins: int = 15
) -> Float[Tensor, ""]:
    """How far confidence and accuracy lie apart: Σ over bins of their share of the examples × |accuracy − confidence|.

    Guo, Pleiss, Sun, Weinberger 2017 (arXiv:1706.04599), section 2, equation 3. Bins are equally wide; an edge belongs
    to the bin below it, (low, high], and 0 to the first. Edges have the dtype of the confidences, so 0.9 in float32
    lies on the edge 0.9.

    Args:
        confidence: the probability of the class that was answered.
        correct: whether it was right.
        bins: how many there are between 0 and 1.

    Returns:
        The error in float64, from 0 to 1.

    Raises:
        DistillError: no bins, no examples, another number of answers, or a confidence that is no probability.

    >>> expected_calibration_error(torch.tensor([0.9, 0.9, 0.6, 0.6]), torch.tensor([1, 0, 1, 1]), bins=10)
    tensor(0.4000, dtype=torch.float64)
    """
    if bins < 1 or not len(confidence) or len(confidence) != len(correct):
        raise DistillError(
            f"{bins} bins of {len(confidence)} confidences and {len(correct)} answers have no calibration error; give "
            "one answer to each confidence, at least one, and bins=15."
        )
    if not ((confidence >= 0) & (confidence <= 1)).all():  # also where one is NaN
        wrong = float(confidence[~((confidence >= 0) & (confidence <= 1))][0])
        raise DistillError(f"a confidence is {wrong:.6g}, which is no probability; take the softmax of the logits.")
    edges = torch.tensor([i / bins for i in range(1, bins)], dtype=confidence.dtype, device=confidence.device)
    bin_of = torch.bucketize(confidence, edges)
    gaps = correct.double() - confidence.double()
    sums = torch.zeros(bins, dtype=torch.float64, device=gaps.device).index_add(0, bin_of, gaps)
    return reduce(sums.abs(), "bins -> ", "sum") / len(gaps)


@checked
def preferences(
    model: nn.Module, pairs: MinimalPairs, *, batch_size: int = 64, answers: Any = None
) -> dict[str, Share]:
    """How often a causal language model finds the good sentence of a pair more probable, by group and over "all".

    The probability of a sentence is the product of those of its tokens after the first, each given those before it; the
    first counts where the tokenizer puts a token before it.

    `answers` says what of the output of the model is its answer, as for `fit`.

    Marvin, Linzen 2018 (arXiv:1808.09031), section 3.

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
    """The log-probability [nats] of each sentence, from its second token."""
    found = []
    with evaluating(model), torch.no_grad():
        for chosen in batches(len(rows), batch_size):
            batch = to_device(rows.batch(chosen), device_of(model))
            logits = _logits(model, batch)
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
            found.append(reduce(each.masked_fill(~counted, 0.0).cpu().double(), "row token 1 -> row", "sum"))
    return torch.cat(found)


def few_answers(model: nn.Module, data: Rows) -> Tensor | None:
    """The logits of a model on two rows; None of one that only embeds."""
    with evaluating(model), torch.no_grad():
        few = students(data.batch(range(min(2, len(data)))))
        return answer_of("the model", model, few, needed=False)


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits of a model on a batch; what fails is said in one line."""
    logits = answer_of("the model", model, batch)
    assert logits is not None
    return logits


def _answers(model: nn.Module, data: Any, batch_size: int, what: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch by batch, the logits `[answers, classes]` and classes of whatever has a label.

    Of a causal language model the answer at a token is for the next; padding never counts.
    """
    model = uncompiled(model)
    data = held_out(data, model)
    if "labels" not in data.columns:
        raise DistillError(
            f"{what} needs a column 'labels' and the data has {', '.join(data.columns)}; add it: "
            "data={…, 'labels': …}."
        )
    data = numbered_as(data, model)
    labelled, place = False, None
    with evaluating(model), torch.no_grad():
        for rows in batches(len(data), batch_size):
            batch = to_device(data.batch(rows), device_of(model))
            logits = _logits(model, batch)
            place = label_place(model, logits, batch, data.table) if place is None else place
            found = answer_labels(batch, place, answer_mask(model, batch))
            labels = batch["labels"] if found is None else found
            _check_labels(logits, labels, what)
            counted = labels != IGNORED
            labelled = labelled or bool(counted.any())
            check_labels(labels[counted], logits.shape[-1], what)
            check_answers(logits[counted], what)
            yield logits[counted], labels[counted]
    if not labelled:
        raise DistillError(f"{what} needs a label that is not -100, and none of the {len(data)} rows has one.")


def _check_labels(logits: Tensor, labels: Tensor, what: str) -> None:
    """Raise for labels that are no classes of these answers."""
    if labels.is_floating_point():
        raise DistillError(
            f"{what} counts classes and the labels are {labels.dtype} {list(labels.shape)}; give whole numbers: "
            "data['labels'] = data['labels'].long()."
        )
    if logits.shape[-1] < 2:
        raise DistillError(
            f"{what} is of classes, and the model has one output {list(logits.shape)}, a real value or a yes or no; "
            "compare the values themselves: distill.losses.mean_squared_error(logits, labels)."
        )
    if labels.shape != logits.shape[:-1]:
        raise DistillError(
            f"{what} compares a label with each answer, and the labels are {list(labels.shape)} {labels.dtype} and the "
            f"answers {list(logits.shape)}; give one class an answer, data['labels'] = […].long() of shape "
            f"{list(logits.shape[:-1])}."
        )
    classes = logits.shape[-1]
    wrong = labels[(labels != -100) & ((labels < 0) | (labels >= max(classes, 2)))]
    if len(wrong):
        raise DistillError(
            f"{what} was given label {int(wrong[0])} and the model has {classes} classes (0 to {classes - 1}); map the "
            "labels to its classes: data['labels'] = […]."
        )


@checked
def perplexity(model: nn.Module, data: Any, *, batch_size: int = 32, answers: Any = None) -> float:
    """Exp of the mean cross-entropy [nats] of each next token under a language model.

    Counted are the tokens that follow another, padding left out; with a column `labels`, those of it that are not −100.
    An encoder–decoder writes the labels, or else what its decoder reads.
    `data` and `answers` are those of `accuracy`.

    Raises:
        DistillError: data without input_ids, or a model that does not answer at every token.
    """
    model = uncompiled(model)
    data = held_out(data, model)
    with answered((model,), answers):
        return _perplexity(model, data, batch_size)


def _perplexity(model: nn.Module, data: Rows, batch_size: int) -> float:
    total = count = 0.0
    with evaluating(model), torch.no_grad():
        for rows in batches(len(data), batch_size):
            batch = to_device(data.batch(rows), device_of(model))
            logits, labels = _next(model, batch)
            known = int((labels != -100).sum())
            if known:
                check_answers(logits[labels != -100], "perplexity")
                total += float(cross_entropy(logits, labels)) * known
                count += known
    if not count:
        raise DistillError(f"perplexity needs a token that follows another, and none of the {len(data)} rows has one.")
    return exp(total / count)


def _next(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The answers of a language model and, in their shape, the tokens that they are for; −100 where none counts."""
    logits, decodes = _logits(model, batch), answers_by_decoder(model, batch)
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


def check_labels(labels: Tensor, classes: int, what: str) -> None:
    """That whole-numbered labels are classes of a model, which no answer could be right about otherwise.

    Raises:
        DistillError: one below 0 or above the last class.
    """
    if classes < 2 or labels.is_floating_point():
        return
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise DistillError(
            f"{what} was asked of rows with label {int(outside[0])} and the model has {classes} classes (0 to "
            f"{classes - 1}), so no answer is right; map the labels to its classes, or give −100 to rows that do not "
            "count."
        )
