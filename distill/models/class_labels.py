"""Whether the labels of rows are classes, and the answers of a model say which."""

from typing import Any

from torch import Tensor

from distill.data.rows import Rows
from distill.errors import checked
from distill.models.inputs import innermost
from distill.models.loss_masks import IGNORED


def are_classes(model: Any, logits: Tensor, data: Rows) -> bool:
    """Whether logits say which class of several a row or token is, and not real values, or yes or no for each class.

    `problem_type` of a transformers configuration decides; else one logit, and labels as many as the logits, are none.
    """
    config = getattr(innermost(model), "config", None)
    labels = data.batch([0])["labels"]
    other = getattr(config, "problem_type", None) in ("regression", "multi_label_classification")
    return not other and logits.shape[-1] > 1 and not (logits.ndim == 2 and labels.shape[1:] == logits.shape[1:])


@checked
def has_classes(data: Rows) -> bool:
    """Whether rows have labels that are classes, not numbers to regress on, and any of them counts."""
    labels = data.table.get("labels")
    if labels is None or (labels if isinstance(labels, Tensor) else labels[0]).is_floating_point():
        return False
    return any(bool((each != IGNORED).any()) for each in ([labels] if isinstance(labels, Tensor) else labels))
