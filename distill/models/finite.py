"""Checks for NaN and infinity: no accuracy is computed from such answers, and no such weights are saved."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from distill.errors import DistillError
from interventions import unanswered


def check_answers(logits: Tensor, what: str) -> None:
    """Raise DistillError if an answer has no highest logit or is no number.

    A logit of −∞ is a class that is masked out; an answer whose logits are all −∞ is an error too.

    Args:
        logits: the logits that are measured, `[…, classes]`.
        what: the quantity that is measured, for the error.
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
    """Raise DistillError if a trained parameter or a running statistic is NaN or infinite, before it is saved.

    Args:
        model: the model that is trained.
        step: the number of the last step.
        last: the checkpoint before, if there is one.
    """
    for name, value in _trained_values(model).items():
        wrong = int((~value.isfinite()).sum())
        if wrong:
            where = "no checkpoint was saved yet" if last is None else f"the last good checkpoint is {last}"
            raise DistillError(
                f"after step {step}, {wrong} of {value.numel()} values of {name} are NaN or infinite, so nothing is "
                f"saved; {where}; lower the learning rate (lr=…) and run again."
            )


@torch.no_grad()
def _trained_values(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters and the running statistics of norms in train mode, by name."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    norms = {path: each for path, each in model.named_modules() if isinstance(each, _NormBase) and each.training}
    return trained | {
        f"{path}.{name}".lstrip("."): each for path, norm in norms.items() for name, each in norm.named_buffers()
    }
