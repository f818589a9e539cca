"""What the logits of a model stand for: one class of several, several labels at once, or real values."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from distill.errors import DistillError
from distill.losses.chunked import LazyLogits
from distill.models.class_labels import Answers, kind_of_answers
from distill.models.head import lazy_logits
from distill.objectives.step import Step
from distill.teachers.verbs import lazy_answers
from interventions import shown

KINDS = ("classes", "labels", "values")


def both_answers(step: Step) -> tuple[Tensor | LazyLogits, Tensor | LazyLogits]:
    """Return the answers of student and teacher: to be made in parts where the student's run ended before its head."""
    return lazy_pair(step) or (step.student.logits, step.taught.logits)


def lazy_pair(step: Step) -> tuple[LazyLogits, LazyLogits | Tensor] | None:
    """Return the answers of the student, to be made in parts, and those of the teacher, without a graph.

    None where the run of the student went to its end, or where the teacher's whole answers have a graph.
    """
    student = lazy_logits(step.student)
    if student is None:
        return None
    teacher = lazy_answers(step.taught)
    if teacher is None and step.taught.logits.requires_grad:
        return None
    return student, step.taught.logits if teacher is None else teacher


def check_answers(answers: Any, caller: str) -> Answers | None:
    """Return `answers`, or raise DistillError if it is neither None nor a kind of answers; `caller` is named then."""
    is_known = answers is None or (isinstance(answers, str) and answers in KINDS)
    if not is_known:
        raise DistillError(
            f"{caller}(answers={shown(answers)}) is no kind of answers; use 'classes' (softmax), 'labels' (a yes or no "
            "each), 'values' (real numbers), or leave it out."
        )
    return answers


def answers_of(step: Step, logits: Tensor | LazyLogits, chosen: Answers | None, caller: str) -> Answers:
    """Return what the student's logits stand for: as chosen, else by its configuration, else by the labels.

    Where nothing is chosen, `kind_of_answers` says how it is decided.

    Raises:
        DistillError: one logit an example and integer labels, in a model without a configuration.
    """
    if chosen is not None:
        return chosen
    labels = step.batch.get("labels")
    kind = kind_of_answers(step.network, logits, labels)
    if kind is None:
        of = "none" if labels is None else labels.dtype
        raise DistillError(
            f"{caller} cannot tell whether one logit with labels of {of} is a yes or no or a real value; "
            f"say {caller.removesuffix('()')}(answers='labels') or (answers='values')."
        )
    return kind


def decide_answers(step: Step, chosen: Answers | None, caller: str) -> Answers:
    """Return what the logits stand for, as `answers_of` does, by all labels of the data instead of those of a batch."""
    labels = None if step.data is None else step.data.table.get("labels")
    batch = {**step.batch, "labels": labels} if isinstance(labels, Tensor) else step.batch
    return answers_of(replace(step, batch=batch), step.student.logits, chosen, caller)
