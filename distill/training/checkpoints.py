"""Checkpoints, from which a run continues as if it had not stopped."""

import json
import random
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from distill.data.sources.stream import Stream
from distill.errors import DistillError
from distill.models.finite import check_weights
from distill.processes import from_first
from distill.storage.files import MANIFEST, damage, seal, take_place, write
from distill.training.interruption import delay_signals
from distill.training.parallel.states import load_state, save_state
from distill.training.progress import Record
from distill.writing.writing import Writing

LOG, STATE, COMPLETE = "log.jsonl", "state", "complete"
LAST_OF_EARLIER = "random_states_0.pkl"
"""The file that accelerate wrote last, in the checkpoints of earlier versions."""
STEPS = 200
KEPT = 2
"""The number of checkpoints that stay by default: were the newest one damaged, the run would go on from the other."""
DIGITS = 20  # of a number of steps that is read from a text
UNITS = {"s": 1.0, "second": 1.0, "min": 60.0, "minute": 60.0, "h": 3600.0, "hour": 3600.0}
SECONDS = UNITS | {f"{name}s": seconds for name, seconds in UNITS.items() if len(name) > 1}
TIME = re.compile(rf"\s*(\d+(?:\.\d+)?)\s*({'|'.join(SECONDS)})\s*")


@dataclass(frozen=True)
class Every:
    """The interval between two checkpoints: steps, or seconds; the other is None."""

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, given: Any, name: str = "every", between: str = "two checkpoints") -> "Every":
        """Return the interval of a number of steps, or of a text as "10 minutes".

        Args:
            given: the number or the text.
            name: the name of the argument, for the error.
            between: that which it is between, for the error.

        Raises:
            DistillError: it is neither.

        >>> Every.of("10 minutes")
        Every(steps=None, seconds=600.0)
        """
        time = TIME.fullmatch(given) if isinstance(given, str) else None
        if time is not None and float(time[1]) > 0:
            return cls(seconds=float(time[1]) * SECONDS[time[2]])
        is_number = isinstance(given, str) and given.isdecimal() and len(given) < DIGITS
        steps = int(given) if is_number else given
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise DistillError(
                f"{name}={given!r:.60} is no interval between {between}; give a number of steps, {name}={STEPS}, "
                f'or a time, {name}="10 minutes".'
            )
        return cls(steps=steps)


@dataclass(eq=False)
class Checkpoints:
    """The last checkpoints of one run, in a folder: weights, optimizer, the log so far, and checksums of all files.

    The state of random generators is not saved, because the draws of a step are decided by the seed and the number of
    the step. Several processes write their parts of it, and another number of processes may read them.

    Args:
        folder: holds the newest checkpoints, folders named `step-…`.
        every: the interval between two checkpoints, a number of steps or a time as "10 minutes"; the last step has one
            too.
        resume: continue from the newest undamaged checkpoint; without one the run starts anew, with a warning.
        keep: how many of the newest checkpoints stay.

    Attributes:
        records: the records of the steps that are done.
        best_of: finds, in the records, the step whose checkpoint stays however old it is; by default none.

    Raises:
        DistillError: `every` is no interval, or `keep` is below 1.
    """

    folder: Path
    every: int | str = STEPS
    resume: bool = False
    keep: int = KEPT
    records: list[Record] = field(default_factory=list, init=False)
    best_of: Callable[[Sequence[Record]], int | None] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, int) or self.keep < 1:
            raise DistillError(
                f"keep={self.keep!r:.60} is no number of checkpoints to keep; give one above 0, keep={KEPT}: a run "
                "is resumed from the newest."
            )
        self._interval, self._since = Every.of(self.every), time.monotonic()
        self._beside: list[Writing | Stream] = []

    def is_due(self, step: int) -> bool:
        """Return whether a step is followed by a checkpoint; among several processes one of them keeps the time."""
        if self._interval.steps is not None:
            return step % self._interval.steps == 0
        return self.accelerator.num_processes == 1 and self.is_overdue()

    def is_overdue(self) -> bool:
        """Return whether the time between two checkpoints has passed."""
        return self._interval.seconds is not None and time.monotonic() - self._since >= self._interval.seconds

    def begin(self, accelerator: Accelerator, writing: Writing | None = None, stream: Stream | None = None) -> int:
        """Save with this accelerator from now on, and load the newest undamaged checkpoint if `resume` is set.

        Args:
            accelerator: has wrapped the model and the optimizer.
            writing: what the teacher has written, which is saved and loaded too.
            stream: the place in the data, which is saved and loaded too.

        Returns:
            The number of steps that are done.

        Raises:
            DistillError: the checkpoint does not fit the model.
        """
        self.accelerator, self.records, self._since = accelerator, [], time.monotonic()
        self._beside = [each for each in (writing, stream) if each is not None]
        whole = self._newest_whole() if self.resume else None
        if whole is None:
            if accelerator.is_main_process:
                self._remove_old()
            return 0
        for each in self._beside:
            each.load(whole)
        if (whole / STATE).is_dir():
            load_state(accelerator, whole / STATE)
        else:
            self._load_older(whole)
        log = whole / LOG
        self.records = records_of(log if log.is_file() else self.folder.parent / LOG, _number(whole))
        if accelerator.is_main_process:
            self._remove_old()
        return _number(whole)

    def load(self, step: int) -> bool:
        """Load the state after a step; return whether there is an undamaged checkpoint of it. All processes call it."""
        kept = self.folder / f"step-{step:07d}"
        if not from_first(lambda: kept in self._all() and damage(kept) is None):
            return False
        load_state(self.accelerator, kept / STATE)
        return True

    def note(self, record: Record) -> None:
        """Remember the record of a step, for the checkpoints after it."""
        self.records.append(record)

    def save(self, step: int) -> Path:
        """Save the state after a step and return the checkpoint; signals take effect when that is done."""
        check_weights(self.accelerator._models[-1], step, self.last())
        target, partial = self.folder / f"step-{step:07d}", self.folder / "unfinished"
        with delay_signals():
            from_first(lambda: _make_empty(partial))
            save_state(self.accelerator, partial / STATE, step)
            self.accelerator.wait_for_everyone()  # each process writes its own part
            from_first(lambda: self._complete(partial, target))
            self._since = time.monotonic()
        return target

    def _complete(self, partial: Path, target: Path) -> None:
        """Put a checkpoint that all processes have written in its place, and say last that it is complete."""
        write(partial / LOG, lines_of(self.records))
        for each in self._beside:
            each.save(partial)
        seal(partial)
        take_place(partial, target)
        write(target / COMPLETE, "")  # a file of its own, as not every file system moves a folder at once
        self._remove_old()

    def _load_older(self, found: Path) -> None:
        """Load a checkpoint of an earlier version, which accelerate wrote."""
        try:
            with keep_generators():  # the generators of the caller stay as they are
                self.accelerator.load_state(str(found))
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise DistillError(
                f"the checkpoint {found} does not fit this model or version ({str(error).splitlines()[0]}); delete "
                f"{self.folder} and start anew."
            ) from error

    def last(self, before: int | None = None) -> Path | None:
        """Return the newest checkpoint, before a step if one is given; None if there is none."""
        found = (each for each in reversed(self._all()) if before is None or _number(each) < before)
        return next(found, None)

    def discard(self, step: int) -> None:
        """Remove the checkpoint of a step, if there is one."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder / f"step-{step:07d}", ignore_errors=True)

    def _remove_old(self) -> None:
        """Remove all but the newest and the best, and what is left of one that a run was killed while it removed."""
        best, found = None if self.best_of is None else self.best_of(self.records), self._all()
        kept = [*found[-self.keep :], *(each for each in found if _number(each) == best)]
        for each in self._named():
            if each not in kept:
                shutil.rmtree(each)

    def _all(self) -> list[Path]:
        """Return all checkpoints that are complete, the oldest first."""
        lasts = (COMPLETE, LAST_OF_EARLIER)
        return sorted((each for each in self._named() if any((each / name).is_file() for name in lasts)), key=_number)

    def _named(self) -> list[Path]:
        """Return all folders that have the name of a checkpoint."""
        return [each for each in self.folder.glob("step-*") if each.name.removeprefix("step-").isdecimal()]

    def _newest_whole(self) -> Path | None:
        """Return the newest undamaged checkpoint; remove damaged ones, with a warning."""
        remaining = self._all()
        while remaining:
            newest, problem = remaining[-1], damage(remaining[-1])
            if problem is None:
                if not (newest / MANIFEST).is_file():
                    warnings.warn(
                        f"{newest} was written by an earlier version, without checksums; it is taken unchecked.",
                        stacklevel=2,
                    )
                return newest
            remaining.pop()
            before = remaining[-1].name if remaining else None
            instead = f"the run continues from the one before, {before}" if before else "the run starts anew"
            warnings.warn(f"{problem}; {instead}.", stacklevel=2)
            self.accelerator.wait_for_everyone()  # a process that has not looked yet would find half of it
            if self.accelerator.is_main_process:
                shutil.rmtree(newest)
            self.accelerator.wait_for_everyone()
            if not remaining:
                return None
        warnings.warn(
            f"{self.folder} holds no checkpoint: the run ended before its first, and starts anew.", stacklevel=2
        )
        return None


def _make_empty(folder: Path) -> None:
    """Make a folder new."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


@contextmanager
def keep_generators() -> Iterator[None]:
    """Leave the global generators of Python, NumPy and torch as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def records_of(log: Path, until: int | None = None) -> list[Record]:
    """Return the records of a log, up to a step, without a last line that was cut off when the process ended.

    Raises:
        DistillError: another line is no record.
    """
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


def lines_of(records: Iterable[Record]) -> str:
    """Return records as the text of a log, one JSON object a line."""
    return "".join(json.dumps(record.to_dict()) + "\n" for record in records)


def _number(checkpoint: Path) -> int:
    """Return the number of the step of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))
