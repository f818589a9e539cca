"""Saving a training run so that it can go on as if nothing had happened, and leaving it on Ctrl-C between two steps."""

import json
import random
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from accelerate import Accelerator

from distill.errors import DistillError
from distill.models.finite import check_weights
from distill.storage.files import MANIFEST, damage, seal, take_place, write
from distill.training.progress import Record

LOG = "log.jsonl"


@dataclass(eq=False)
class Checkpoints:
    """The last checkpoints of one run, in a folder: weights, optimizer, the log so far, and checksums of all.

    Nothing random is kept, because all that a step draws is decided by the seed and its number, which is in the name.

    Args:
        folder: where `step-…` folders are kept, the newest two.
        every: steps between two checkpoints; the last step has one too.
        resume: go on from the newest one that is whole; where there is none, the run starts anew, which is said.

    Attributes:
        records: those of the steps that are done.
    """

    folder: Path
    every: int = 200
    resume: bool = False
    records: list[Record] = field(default_factory=list, init=False)

    def begin(self, accelerator: Accelerator) -> int:
        """Save with this accelerator from now on, and load the newest whole checkpoint if that was asked for.

        Returns:
            How many steps are done.

        Raises:
            DistillError: it does not fit the model.
        """
        self.accelerator, self.records = accelerator, []
        whole = self._newest_whole() if self.resume else None
        if accelerator.is_main_process:
            self._remove_old()
        if whole is None:
            return 0
        try:
            with generators_kept():  # the draws of a step are decided by its seed, and the caller's are the caller's
                accelerator.load_state(str(whole))
        except (RuntimeError, ValueError, KeyError) as error:
            raise DistillError(
                f"the checkpoint {whole} does not fit this model or version ({str(error).splitlines()[0]}); delete "
                f"{self.folder} and start anew."
            ) from error
        log = whole / LOG
        self.records = records_of(log if log.is_file() else self.folder.parent / LOG, _number(whole))
        return _number(whole)

    def note(self, record: Record) -> None:
        """Remember the record of a step, which the checkpoints after it keep."""
        self.records.append(record)

    def save(self, step: int) -> Path:
        """Save the state as it is after a step; a signal is heard when that is done."""
        for model in self.accelerator._models:
            check_weights(model, step, self.last())
        target, partial = self.folder / f"step-{step:07d}", self.folder / "unfinished"
        with _uninterrupted():
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(partial))
            self.accelerator.wait_for_everyone()  # each process writes its own part
            if self.accelerator.is_main_process:
                write(partial / LOG, lines_of(self.records))
                seal(partial)
                take_place(partial, target)
                self._remove_old()
            self.accelerator.wait_for_everyone()
        return target

    def last(self) -> Path | None:
        """The newest checkpoint, if there is one."""
        return next(reversed(self._all()), None)

    def discard(self, step: int) -> None:
        """Remove the checkpoint of a step, if there is one."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder / f"step-{step:07d}", ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _remove_old(self) -> None:
        """Leave the newest two; more are there where a run was killed while it removed one."""
        for old in self._all()[:-2]:
            shutil.rmtree(old)

    def _all(self) -> list[Path]:
        found = [each for each in self.folder.glob("step-*") if each.name.removeprefix("step-").isdecimal()]
        return sorted(found, key=_number)

    def _newest_whole(self) -> Path | None:
        """The newest checkpoint that is as it was written; those that are not are removed, which is said."""
        there = self._all()
        while there:
            newest, found = there[-1], damage(there[-1])
            if found is None:
                if not (newest / MANIFEST).is_file():
                    warnings.warn(
                        f"{newest} was written by an earlier version, without checksums; it is taken unchecked.",
                        stacklevel=2,
                    )
                return newest
            there.pop()
            instead = f"the run goes on from the one before, {there[-1].name}" if there else "the run starts anew"
            warnings.warn(f"{found}; {instead}.", stacklevel=2)
            self.accelerator.wait_for_everyone()  # who has not looked yet would find half of it
            if self.accelerator.is_main_process:
                shutil.rmtree(newest)
            self.accelerator.wait_for_everyone()
            if not there:
                return None
        warnings.warn(
            f"{self.folder} holds no checkpoint: the run ended before its first, and starts anew.", stacklevel=2
        )
        return None


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the global generators of Python, NumPy and torch as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def records_of(log: Path, until: int | None = None) -> list[Record]:
    """The records in a log, up to a step; a last line that was being written when the process ended is left out."""
    if not log.is_file():
        return []
    found: list[Record] = []
    lines = log.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError):
            if number == len(lines):
                break
            raise DistillError(
                f"{log} is damaged (line {number} is no record); delete the file, or take that of a checkpoint beside "
                f"it: checkpoints/step-…/{LOG}."
            ) from None
        if until is None or record.step <= until:
            found.append(record)
    return found


def lines_of(records: list[Record]) -> str:
    """Records as a log."""
    return "".join(json.dumps(asdict(record)) + "\n" for record in records)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


class Interrupt(threading.Event):
    """Whether Ctrl-C was pressed; `final` is whether what it asked for is being done, so that no second one counts."""

    final = False


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Ctrl-C sets the event, so that a step is never left half done; a second one interrupts at once.

    Only in the main thread, where Python delivers signals; elsewhere the event is never set.
    """
    asked = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.is_set() and not asked.final:
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C in the block is heard after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[FrameType | None] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard and callable(before):
        before(signal.SIGINT, heard[0])
