"""What the logits of a model stand for: one class of several, several labels at once, or real values."""

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from distill.errors import DistillError
from distill.losses.chunked import LazyLogits
from distill.models.inputs import innermost
from distill.objectives.step import Step
from interventions import shown

Answers = Literal["classes", "labels", "values"]
KINDS = ("classes", "labels", "values")
PROBLEMS: dict[str, Answers] = {
    "single_label_classification": "classes",
    "multi_label_classification": "labels",
    "regression": "values",
}


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

    Where nothing is chosen, `problem_type` of a transformers configuration decides. Without one, labels of the shape of
    the logits make several labels an example if all are from 0 to 1, and real values if not; one logit an example is a
    real value; everything else is classes.

    Raises:
        DistillError: one logit an example and integer labels, in a model without a configuration.
    """
    if chosen is not None:
        return chosen
    config = getattr(innermost(step.network), "config", None)
    problem = PROBLEMS.get(getattr(config, "problem_type", None) or "")
    if problem is not None:
        return problem
    labels = step.batch.get("labels")
    real = labels is not None and labels.is_floating_point()
    if logits.ndim == 2 and logits.shape[-1] == 1:
        if labels is not None and not real and config is None:
            raise DistillError(
                f"{caller} cannot tell whether one logit with labels of {labels.dtype} is a yes or no or a real value; "
                f"say {caller.removesuffix('()')}(answers='labels') or (answers='values')."
            )
        return "values"
    if labels is not None and logits.ndim == 2 and labels.shape[1:] == logits.shape[1:]:
        several = bool(((labels == -100) | ((labels >= 0) & (labels <= 1))).all())
        return "labels" if several else "values"
    return "classes"


def decide_answers(step: Step, chosen: Answers | None, caller: str) -> Answers:
    """Return what the logits stand for, as `answers_of` does, by all labels of the data instead of those of a batch."""
    labels = None if step.data is None else step.data.table.get("labels")
    batch = {**step.batch, "labels": labels} if isinstance(labels, Tensor) else step.batch
    return answers_of(replace(step, batch=batch), step.student.logits, chosen, caller)
