"""Answers and weights that are no numbers any more: no figure is made of the first, and the second are not saved."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from distill.errors import DistillError
from interventions import unanswered


def check_answers(logits: Tensor, what: str) -> None:
    """That every answer is one: the class with the highest logit, or a number.

    Args:
        logits: those that are counted, `[…, classes]`.
        what: is measured, for the error.

    Raises:
        DistillError: a logit that is NaN or infinite; −∞ is a class that is masked out, and none where all are.
    """
    wrong = int(unanswered(logits).sum())
    if wrong:
        count = int((~logits.isfinite()).sum())
        raise DistillError(
            f"{what} is of answers, and {wrong} of {logits.shape[:-1].numel()} are none: {count} of {logits.numel()} "
            "logits are NaN or infinite; see whether the weights are: [name for name, each in "
            "model.named_parameters() if not each.isfinite().all()]."
        )


def check_weights(model: nn.Module, step: int, last: Path | None) -> None:
    """That what was trained, and what normalises, is still made of numbers, before it is saved.

    Args:
        model: with the trained parameters.
        step: after which they are looked at.
        last: the checkpoint before, if there is one.

    Raises:
        DistillError: a parameter or a running statistic that is NaN or infinite.
    """
    for name, value in _changing(model).items():
        wrong = int((~value.isfinite()).sum())
        if wrong:
            where = "no checkpoint was saved yet" if last is None else f"the last good checkpoint is {last}"
            raise DistillError(
                f"after step {step}, {wrong} of {value.numel()} values of {name} are NaN or infinite, so nothing is "
                f"saved; {where}; lower the learning rate (lr=…) and run again."
            )


@torch.no_grad()
def _changing(model: nn.Module) -> dict[str, Tensor]:
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    norms = {path: each for path, each in model.named_modules() if isinstance(each, _NormBase) and each.training}
    return trained | {
        f"{path}.{name}".lstrip("."): each for path, norm in norms.items() for name, each in norm.named_buffers()
    }
