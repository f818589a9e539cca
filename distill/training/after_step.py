"""The end of a step: its numbers are looked at, the monitor of the training is shown it, and the state is saved."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from distill.models.finite import check_weights
from distill.training.checkpoints import Checkpoints
from distill.training.parallel.agreement import Agreement
from distill.training.pending import Pending
from distill.training.progress import Record
from distill.training.watches import Watches


@dataclass(frozen=True, eq=False)
class AfterStep:
    """Do what follows the update of the weights in each step.

    Attributes:
        wrapped: the computation, wrapped.
        agreement: what the processes agree on.
        pending: the records whose numbers are on the device.
        looks: after how many steps they are read.
        checkpoints: those of the run, if it has any.
        watch: the monitor of the training, if it has one.
    """

    wrapped: Any
    agreement: Agreement
    pending: Pending
    looks: int
    checkpoints: Checkpoints | None
    watch: Watches | None

    def __call__(self, record: Record) -> None:
        """Look at a step, show it and save the state, as far as each is due.

        Raises:
            DistillError: a loss or a weight that is not finite.
        """
        last = record.step == record.total
        saves = self.checkpoints is not None and self._saves(self.checkpoints, record)
        due = self.watch is not None and self.watch.is_due(record)
        if saves or due or last or record.step % self.looks == 0:
            self.pending.look()
            if self.agreement.accelerator.num_processes > 1:
                self.agreement.look()
        if last:
            check_weights(self.wrapped, record.total, last_of(self.checkpoints))
        if self.watch is not None:
            self.watch.show(record, due=due)
            saves = saves or self.watch.saves or record.stop is not None
        if self.checkpoints is not None:
            self.checkpoints.note(record)
            if saves:
                self.checkpoints.save(record.step)
                self.agreement.saves = False
        if self.watch is not None:
            self.watch.raise_errors()

    def _saves(self, checkpoints: Checkpoints, record: Record) -> bool:
        """Return whether a checkpoint follows a step: the last one, and as often as they are due."""
        return record.step == record.total or self.agreement.saves or checkpoints.is_due(record.step)


def last_of(checkpoints: Checkpoints | None) -> Path | None:
    """Return the last checkpoint, if there is one."""
    return None if checkpoints is None else checkpoints.last()


def tell(accelerator: Accelerator, watch: Watches | None, record: Record) -> None:
    """Report a record whose numbers are known to the trackers of the accelerator, and to the monitor."""
    if accelerator.trackers:
        accelerator.log({"loss": record.loss, "lr": record.lr, **record.terms}, step=record.step)
    if watch is not None:
        watch.tell(record)
