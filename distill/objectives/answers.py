"""What the logits of a model mean: one class of several, several labels at once, or real values."""

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from distill.errors import DistillError
from distill.models.inputs import innermost
from distill.objectives.objective import Step
from interventions import shown

Answers = Literal["classes", "labels", "values"]
KINDS = ("classes", "labels", "values")
PROBLEMS: dict[str, Answers] = {
    "single_label_classification": "classes",
    "multi_label_classification": "labels",
    "regression": "values",
}


def told_answers(answers: Any, asked: str) -> Answers | None:
    """`answers` if it is a kind of answers or None; `asked` is who was given it."""
    is_known = answers is None or (isinstance(answers, str) and answers in KINDS)
    if not is_known:
        raise DistillError(
            f"{asked}(answers={shown(answers)}) is no kind of answers; use 'classes' (softmax), 'labels' (a yes or no "
            "each), 'values' (real numbers), or leave it out."
        )
    return answers


def answers_of(step: Step, logits: Tensor, told: Answers | None, asked: str) -> Answers:
    """What the student's logits mean: as told, as its configuration says, or as the labels look.

    `problem_type` of a transformers configuration decides; else labels that are as many as the logits are multi-label
    where all are from 0 to 1, and real values where not; one logit an example is a real value; all else is classes.

    Raises:
        DistillError: one logit with whole-numbered labels in a model that does not say what it is.
    """
    if told is not None:
        return told
    config = getattr(innermost(step.network), "config", None)
    problem = PROBLEMS.get(getattr(config, "problem_type", None) or "")
    if problem is not None:
        return problem
    labels = step.batch.get("labels")
    real = labels is not None and labels.is_floating_point()
    if logits.ndim == 2 and logits.shape[-1] == 1:
        if labels is not None and not real and config is None:
            raise DistillError(
                f"{asked} cannot tell whether one logit with labels of {labels.dtype} is a yes or no or a real value; "
                f"say {asked.removesuffix('()')}(answers='labels') or (answers='values')."
            )
        return "values"
    if labels is not None and logits.ndim == 2 and labels.shape[1:] == logits.shape[1:]:
        several = bool(((labels == -100) | ((labels >= 0) & (labels <= 1))).all())
        return "labels" if several else "values"
    return "classes"


def decided(step: Step, told: Answers | None, asked: str) -> Answers:
    """What the logits mean, decided once, by all labels of the data and not those of a batch."""
    labels = None if step.data is None else step.data.table.get("labels")
    batch = {**step.batch, "labels": labels} if isinstance(labels, Tensor) else step.batch
    return answers_of(replace(step, batch=batch), step.student.logits, told, asked)
