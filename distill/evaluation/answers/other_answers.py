"""The answers of a model that are no classes: several labels a row, or real values, measured under their labels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.rows import Rows
from distill.data.sources.lazy_columns import some_rows
from distill.data.texts.lengths import similar_batches
from distill.evaluation.answers.labelled_answers import logits_of
from distill.evaluation.answers.real_values import RealValues, real_values
from distill.evaluation.answers.several_labels import SeveralLabels, several_labels
from distill.models.class_labels import kind_of_answers
from distill.models.finite import check_answers
from distill.models.inputs import device_of, evaluating, students, to_device
from distill.processes import gather_parts, own_part

ROWS = 128
"""Rows of a forward."""
MEASURES: dict[str, Callable[[Sequence[tuple[Tensor, Tensor]]], Any]] = {
    "labels": several_labels,
    "values": real_values,
}


def other_answers(student: nn.Module, logits: Tensor, rows: Rows) -> SeveralLabels | RealValues | None:
    """Return the figures of answers that are several labels a row or real values; None where they are neither.

    Where several processes divide measurements, each computes the answers to its part of the rows.

    Args:
        student: answers.
        logits: its answers to the first rows.
        rows: with or without labels.

    Raises:
        DistillError: labels of another shape than the answers, or answers that are not finite.
    """
    labels = rows.table.get("labels")
    known = None if labels is None else some_rows(labels)
    if not isinstance(known, Tensor) or logits.ndim != 2:
        return None
    kind = kind_of_answers(student, logits, known)
    fits = known.shape[1:] in ((), (logits.shape[-1],)) and known[0].numel() == logits.shape[-1]
    if kind not in MEASURES or not fits:
        return None
    own = own_part(torch.arange(len(rows)))
    parts = gather_parts(lambda: _answers(student, rows, own))
    return MEASURES[kind]([each for part in parts for each in part])


def _answers(student: nn.Module, rows: Rows, chosen: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return logits and labels of some rows, batch by batch."""
    found = []
    with evaluating(student), torch.no_grad():
        for part in similar_batches(rows, ROWS, chosen):
            batch = to_device(rows.batch(part), device_of(student))
            logits = logits_of(student, students(batch))
            check_answers(logits, "evaluate")
            found.append((logits.cpu(), batch["labels"].cpu()))
    return found
