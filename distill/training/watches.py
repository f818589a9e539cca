"""The interface of a monitor of a training."""

from typing import Any, Protocol, runtime_checkable

from distill.training.checkpoints import Checkpoints
from distill.training.progress import Record


@runtime_checkable
class Watches(Protocol):
    """Watches a training: it is shown each step after the update, and may have the state saved, or end the training.

    Attributes:
        saves: whether the state is to be saved after the step that was shown last.
        ended: whether the run that is resumed had ended.
    """

    saves: bool
    ended: bool

    def is_overdue(self) -> bool:
        """Return whether a time has passed after which something is due; that of the first process counts."""

    def begin(self, agreement: Any, checkpoints: Checkpoints | None) -> None:
        """Take what the training works with, once a checkpoint was loaded."""

    def is_due(self, record: Record) -> bool:
        """Return whether the numbers of a step have to be looked at before it is shown; alike in all processes."""

    def show(self, record: Record, *, due: bool) -> None:
        """Take a step: whether it was due, and its record, to which it may add."""

    def raise_errors(self) -> None:
        """Raise what went wrong while the step was shown, now that the state is saved."""

    def tell(self, record: Record) -> None:
        """Take the record of a step whose numbers are known."""

    def end(self) -> None:
        """Take the end of the training, while its modules are wrapped still."""
