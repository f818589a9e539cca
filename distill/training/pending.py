"""The records of steps whose numbers are still on the device, which are fetched together, by one wait for it.

On an accelerator Python starts the kernels of the next steps while the device computes this one. To read a loss waits
until everything before it is done, so that the device has nothing to do; hence losses are read once in some steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from distill.errors import DistillError
from distill.training.checkpoints import Checkpoints
from distill.training.progress import Record

LOOK_EVERY = 10
"""The number of steps on an accelerator after which their losses are read, and looked at for NaN."""


def steps_between_looks(device: torch.device) -> int:
    """Return after how many steps losses are read: each on a CPU, which nothing waits for."""
    return 1 if device.type == "cpu" else LOOK_EVERY


@dataclass(eq=False)
class Pending:
    """The records of the steps since the last look, with their losses and terms on the device.

    Args:
        checkpoints: those of the training, of which the one that gave a loss that is not finite is discarded.
        report: is called with each record once its numbers are known.
    """

    checkpoints: Checkpoints | None = None
    report: Callable[[Record], None] | None = None
    _records: list[Record] = field(default_factory=list)
    _values: list[list[Tensor]] = field(default_factory=list)
    _unseen: list[Record] = field(default_factory=list)

    def add(self, step: int, total: int, loss: Tensor, terms: Mapping[str, Tensor], *, lr: float) -> Record:
        """Return the record of a step, whose loss and terms are fetched when one of them is read, or at the next look.

        Args:
            step: its number, from 1.
            total: the number of steps.
            loss: the loss, a scalar.
            terms: the terms, scalars.
            lr: the learning rate.
        """
        record = Record.pending(step, total, tuple(terms), lr, self._fetch)
        self._records.append(record)
        self._values.append([value.detach() for value in (loss, *terms.values())])
        return record

    def look(self) -> None:
        """Fetch what is pending, and raise DistillError at the first loss that is not finite."""
        self._fetch()
        seen, self._unseen = self._unseen, []
        for record in seen:
            if not isfinite(record.loss):
                raise not_finite(record.step, record.loss, record.terms, self.checkpoints)
            if self.report is not None:
                self.report(record)

    def _fetch(self) -> None:
        """Fetch the numbers of all pending records, by one transfer."""
        if not self._records:
            return
        values = [value for each in self._values for value in each]
        numbers = iter(torch.stack(values).tolist() if len(values) > 1 else [values[0].item()])
        for record in self._records:
            record.know(next(numbers), [next(numbers) for _ in range(record.pending_terms)])
        self._unseen += self._records
        self._records, self._values = [], []


def not_finite(step: int, loss: float, terms: Mapping[str, Any], checkpoints: Checkpoints | None) -> DistillError:
    """Return the error of a loss that is not finite, after the checkpoint that gave it was discarded.

    Args:
        step: the number of the step, from 1.
        loss: the loss.
        terms: its terms; an empty mapping where activations are not finite.
        checkpoints: those of the training.
    """
    if checkpoints is not None:
        checkpoints.discard(step - 1)  # holds the weights that gave this loss; those before gave finite ones
    last = None if checkpoints is None else checkpoints.last(before=step - 1)
    values = ", ".join(f"{name}={value:.4g}" for name, value in terms.items()) or "its activations are not finite"
    where = "no checkpoint was saved yet" if last is None else f"the last good checkpoint is {last}"
    return DistillError(
        f"the loss is {loss} at step {step} ({values}); {where}; lower the learning rate (lr=…) and run again."
    )
