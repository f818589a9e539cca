"""Which answers to labelled rows are right, of several models, so that their accuracies are compared row by row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from distill.comparison.trained_students import TrainedStudent
from distill.data.rows import Rows
from distill.evaluation.answers.labelled_answers import few_answers, labelled_answers
from distill.models.class_labels import are_classes, has_classes
from distill.models.outputs import answered
from distill.statistics.figures import Figure, ratio
from distill.statistics.mcnemar import Discordance
from distill.statistics.sharing import Sharing


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """The answers to labelled rows that are right, of the runs of every student.

    Attributes:
        rows: the row of each answer; rows of token models have several.
        sharing: what the rows that have answers have in common.
        right: which answers of each run are right, by the names of students.
    """

    rows: Int[Tensor, " answers"]
    sharing: Sharing
    right: Mapping[str, tuple[Bool[Tensor, " answers"], ...]]

    def sums(self, student: str) -> list[tuple[Tensor, Tensor]]:
        """Return for each run of a student how many answers to each row are right, and how many there are."""
        places = self.rows.unique(return_inverse=True)[1]
        total = places.bincount().double()
        return [(torch.zeros_like(total).index_add_(0, places, each.double()), total) for each in self.right[student]]

    def figures(self, student: str) -> tuple[Figure, ...]:
        """Return the accuracy of each run of a student."""
        return tuple(found for each in self.sums(student) if (found := ratio(*each)) is not None)

    def discordance(self, first: str, second: str) -> tuple[Discordance, ...]:
        """Return which of two students wins rows of the other, run by run; empty for unequal numbers of runs."""
        one, other = self.right[first], self.right[second]
        if len(one) != len(other):
            return ()
        return tuple(Discordance(int((b & ~a).sum()), int((a & ~b).sum())) for a, b in zip(one, other, strict=True))


def labelled_rows(
    students: Mapping[str, Sequence[TrainedStudent]], rows: Rows, teacher: Any, answers: Any, batch_size: int
) -> LabelledRows | None:
    """Return which answers to rows are right; None where the rows have no classes, or a model answers none.

    Args:
        students: the runs of each.
        rows: with or without labels.
        teacher: the teacher, beside whom `answers` are given.
        answers: which part of a model's output is its answer.
        batch_size: rows of a forward.
    """
    if not has_classes(rows):
        return None
    right, places = {}, torch.empty(0, dtype=torch.long)
    for name, runs in students.items():
        found = []
        for run in runs:
            with answered((teacher, run.model), answers):
                if not _answers_classes(run.model, rows):
                    return None
                batches = list(labelled_answers(run.model, rows, batch_size, "compare"))
            found.append(torch.cat([(logits.argmax(-1) == labels).cpu() for logits, labels, _ in batches]))
            places = torch.cat([each for *_, each in batches])
        right[name] = tuple(found)
    numbers = places.unique()
    made_of = (None, None) if rows.clusters is None else (rows.clusters[numbers],) * 2
    return LabelledRows(places, Sharing(numbers, numbers, *made_of), right)


def _answers_classes(model: Any, rows: Rows) -> bool:
    """Return whether a model answers rows with one of several classes."""
    if not isinstance(model, nn.Module):
        return False
    logits = few_answers(model, rows)
    return logits is not None and are_classes(model, logits, rows)
