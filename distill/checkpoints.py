"""Saving a training run so that it can go on as if nothing had happened, and leaving it on Ctrl-C between two steps."""

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from accelerate import Accelerator

from distill.errors import DistillError
from distill.finite import check_weights


@dataclass(eq=False)
class Checkpoints:
    """The last checkpoints of one run, in a folder: weights, optimizer, and in its name the number of the step.

    Nothing random is kept, because all that a step draws is decided by the seed and its number.

    Args:
        folder: where `step-…` folders are kept, the newest two.
        every: steps between two checkpoints.
        resume: go on from the newest one.
    """

    folder: Path
    every: int = 200
    resume: bool = False

    def begin(self, accelerator: Accelerator) -> int:
        """Save with this accelerator from now on, and load the newest checkpoint if that was asked for.

        Returns:
            How many steps are done.

        Raises:
            DistillError: there is nothing to go on from.
        """
        self.accelerator = accelerator
        if not self.resume:
            return 0
        last = self.last()
        if last is None:
            raise DistillError(
                f"there is no checkpoint in {self.folder} to go on from: the run ended before its first; leave resume "
                "out to start anew, in a new folder."
            )
        try:
            accelerator.load_state(str(last))
        except (RuntimeError, ValueError, KeyError) as error:
            raise DistillError(
                f"the checkpoint {last} does not fit this model or version ({str(error).splitlines()[0]}); delete "
                f"{self.folder} and start anew."
            ) from error
        return _number(last)

    def save(self, step: int) -> Path:
        """Save the state as it is after a step."""
        for model in self.accelerator._models:
            check_weights(model, step, self.last())
        target = self.folder / f"step-{step:07d}"
        partial = self.folder / "unfinished"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        if self.accelerator.is_main_process:
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            for old in sorted(self.folder.glob("step-*"), key=_number)[:-2]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        return target

    def last(self) -> Path | None:
        """The newest checkpoint, if there is one."""
        return max(self.folder.glob("step-*"), default=None, key=_number)

    def discard(self, step: int) -> None:
        """Remove the checkpoint of a step, if there is one."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder / f"step-{step:07d}", ignore_errors=True)
        self.accelerator.wait_for_everyone()


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that a step is never left half done; a second one interrupts at once.

    Only in the main thread, where Python delivers signals; elsewhere the event is never set.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
