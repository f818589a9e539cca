"""Checks for NaN and infinity: no accuracy is computed from such answers, and no such weights are saved."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool, Int
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
    _refuse(what, _counts(logits, unanswered(logits)).tolist())


@dataclass(eq=False)
class LateChecks:
    """Checks of answers that are made on the device, and looked at together, so that no batch waits for it."""

    _found: list[tuple[str, Int[Tensor, " 4"]]] = field(default_factory=list)

    def note(self, logits: Tensor, counted: Bool[Tensor, "..."], what: str) -> None:
        """Note which answers of those that count are none, as `check_answers` finds them.

        Args:
            logits: the logits that are measured, `[…, classes]`.
            counted: which of them count, `[…]`.
            what: the quantity that is measured, for the error.
        """
        self._found.append((what, _counts(logits, unanswered(logits) & counted, counted)))

    def check(self) -> None:
        """Raise DistillError for the first answers that are none, and forget all.

        Raises:
            DistillError: as `check_answers`.
        """
        counts = torch.stack([each for _, each in self._found]).tolist() if self._found else []
        names = [what for what, _ in self._found]
        self._found.clear()
        for what, found in zip(names, counts, strict=True):
            _refuse(what, found)


def _counts(logits: Tensor, wrong: Tensor, counted: Tensor | None = None) -> Int[Tensor, " 4"]:
    """Return how many answers are none, how many there are, how many of their logits are not finite, and all."""
    infinite = ~logits.isfinite()
    infinite = infinite if counted is None else infinite & counted[..., None]
    answers = torch.tensor(logits.shape[:-1].numel()).to(logits.device) if counted is None else counted.sum()
    return torch.stack([wrong.sum(), answers, infinite.sum(), answers * logits.shape[-1]])


def _refuse(what: str, counts: Sequence[int]) -> None:
    """Raise DistillError for answers of which some are none, by their counts."""
    wrong, answers, infinite, logits = counts
    if wrong:
        raise DistillError(
            f"{what} is of answers, and {wrong} of {answers} are none: {infinite} of {logits} logits are NaN or "
            "infinite; see whether the weights are: [name for name, each in model.named_parameters() if not "
            "each.isfinite().all()]."
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
