"""Whether labels are classes, and whether the logits of a model are those of classes."""

from typing import Any, Literal

from torch import Tensor

from distill.data.missing import IGNORED
from distill.data.rows import Rows
from distill.data.sources.lazy_columns import is_floating
from distill.errors import checked
from distill.models.inputs import innermost

Answers = Literal["classes", "labels", "values"]
"""What logits stand for: one class of several, a yes or no for each of several labels, or real values."""
PROBLEMS: dict[str, Answers] = {
    "single_label_classification": "classes",
    "multi_label_classification": "labels",
    "regression": "values",
}


def kind_of_answers(model: Any, logits: Any, labels: Tensor | None) -> Answers | None:
    """Return what logits stand for; None where one logit an example may be a yes or no or a real value.

    `problem_type` of a transformers configuration decides. Without one, labels of the shape of the logits make several
    labels an example if all are from 0 to 1, and real values if not; one logit an example is a real value; everything
    else is classes.

    Args:
        model: the model.
        logits: its answers, of which the shape alone is read.
        labels: those of the data.
    """
    config = getattr(innermost(model), "config", None)
    problem = PROBLEMS.get(getattr(config, "problem_type", None) or "")
    if problem is not None:
        return problem
    if logits.ndim == 2 and logits.shape[-1] == 1:
        unclear = labels is not None and not labels.is_floating_point() and config is None
        return None if unclear else "values"
    if labels is not None and logits.ndim == 2 and labels.shape[1:] == logits.shape[1:]:
        several = bool(((labels == IGNORED) | ((labels >= 0) & (labels <= 1))).all())
        return "labels" if several else "values"
    return "classes"


def are_classes(model: Any, logits: Tensor, data: Rows) -> bool:
    """Return whether logits are those of one class out of several, not real values, nor yes or no for each class.

    The `problem_type` of a transformers configuration decides. Without it, a single logit is no class, and labels of
    the shape of the logits are none.

    Args:
        model: the model.
        logits: its answers.
        data: rows with labels.
    """
    labels = data.batch([0])["labels"]
    return not are_values(model, logits) and not (logits.ndim == 2 and labels.shape[1:] == logits.shape[1:])


def are_values(model: Any, logits: Tensor) -> bool:
    """Return whether a model, by its configuration or its one logit, answers with real values or several labels."""
    config = getattr(innermost(model), "config", None)
    other = getattr(config, "problem_type", None) in ("regression", "multi_label_classification")
    return other or logits.shape[-1] < 2


@checked
def has_classes(data: Rows) -> bool:
    """Return whether rows have labels that are classes, not real values, and any of them is not ignored (−100)."""
    labels = data.table.get("labels")
    if labels is None or is_floating(labels):
        return False
    return any(bool((each != IGNORED).any()) for each in ([labels] if isinstance(labels, Tensor) else labels))
