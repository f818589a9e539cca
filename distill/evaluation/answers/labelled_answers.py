"""The answers of a model to rows, batch by batch, beside the labels of the rows."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.missing import IGNORED
from distill.data.rows import Rows
from distill.data.texts.lengths import similar_batches
from distill.errors import DistillError
from distill.evaluation.progress import counting
from distill.losses.chunked import LazyLogits, logits_at, size_of_parts
from distill.models.finite import check_answers
from distill.models.head import Heads
from distill.models.inputs import answer_mask, device_of, evaluating, students, to_device, uncompiled
from distill.models.loss_masks import answer_labels, label_place
from distill.models.numbering import numbered_as
from distill.models.trials import answer_of, lazy_answer_of
from distill.tasks.loading import held_out


def few_answers(model: nn.Module, data: Rows) -> Tensor | None:
    """Return the logits of a model on the first two rows; None for a model that has none, as one that only embeds."""
    with evaluating(model), torch.no_grad():
        few = students(data.batch(range(min(2, len(data)))))
        return answer_of("the model", model, few, needed=False)


def parts_of(logits: Tensor | LazyLogits, counted: Tensor, at_once: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield the places of the answers that count, some at a time: fewer where their logits are made then.

    Args:
        logits: the answers, `[*batch, classes]`.
        counted: which of them count, `[*batch]`.
        at_once: how many of whole logits are taken together.
    """
    places = counted.nonzero(as_tuple=True)
    size = at_once if isinstance(logits, Tensor) else size_of_parts(len(places[0]))
    yield from zip(*(each.split(size) for each in places), strict=True)


def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits of a model on a batch.

    Raises:
        DistillError: the model fails on the batch, or has no logits.
    """
    logits = answer_of("the model", model, batch)
    assert logits is not None
    return logits


def labelled_answers(
    model: nn.Module, data: Any, batch_size: int, what: str, *, needed: bool = True
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the logits `[answers, classes]`, the classes and the rows of answers that have a label, batch by batch.

    Rows of similar length are in one batch, so they come in another order than in the data. The answer of a causal
    language model at a token is for the next token; padding has no label. Where the logits of a batch are large, they
    are made and yielded in parts.

    Args:
        model: a classifier or a language model.
        data: rows with labels, as `accuracy` takes them.
        batch_size: rows of a forward.
        what: the name of the figure, for error messages.
        needed: raise DistillError where no row has a label.

    Raises:
        DistillError: rows without labels, or labels that are no classes of the model.
    """
    model = uncompiled(model)
    data = held_out(data, model)
    if "labels" not in data.columns:
        raise DistillError(
            f"{what} needs a column 'labels' and the data has {', '.join(data.columns)}; add it: "
            "data={…, 'labels': …}."
        )
    data = numbered_as(data, model)
    labelled, place, heads = False, None, Heads()
    with evaluating(model), torch.no_grad(), counting("rows", len(data)) as count:
        for rows in similar_batches(data, batch_size):
            batch = to_device(data.batch(rows), device_of(model))
            logits = lazy_answer_of("the model", model, batch, heads)
            place = label_place(model, logits, batch, data.table) if place is None else place
            found = answer_labels(batch, place, answer_mask(model, batch))
            labels = batch["labels"] if found is None else found
            check_classes(logits, labels, what)
            counted = labels != IGNORED
            labelled = labelled or bool(counted.any())
            check_labels(labels[counted], logits.shape[-1], what)
            for places in parts_of(logits, counted, max(1, counted.numel())):
                answers = logits_at(logits, places)
                check_answers(answers, what)
                yield answers, labels[places], rows[places[0].cpu()]
            count(len(rows))
    if needed and not labelled:
        raise DistillError(f"{what} needs a label that is not -100, and none of the {len(data)} rows has one.")


def check_classes(logits: Tensor | LazyLogits, labels: Tensor, what: str) -> None:
    """Raise DistillError for labels whose type, shape or values are not those of classes of these answers."""
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
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= max(classes, 2)))]
    if len(wrong):
        raise DistillError(
            f"{what} was given label {int(wrong[0])} and the model has {classes} classes (0 to {classes - 1}); map the "
            "labels to its classes: data['labels'] = […]."
        )


def check_labels(labels: Tensor, classes: int, what: str) -> None:
    """Raise DistillError for a whole-numbered label below 0 or above the last class: no answer could be right."""
    if classes < 2 or labels.is_floating_point():
        return
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise DistillError(
            f"{what} is requested of rows with label {int(outside[0])} and the model has {classes} classes (0 to "
            f"{classes - 1}), so no answer is right; map the labels to its classes, or give −100 to rows that do not "
            "count."
        )
