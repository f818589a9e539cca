"""The folder of a run: its settings, log and checkpoints, and the lock that keeps other runs out."""

import errno
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distill.errors import DistillError
from distill.processes import is_first
from distill.storage.files import (
    Damaged,
    clear_leftovers,
    is_leftover,
    read_json,
    remove_empty,
    sha256_of,
    write,
    write_json,
)
from distill.storage.locks import LOCK, locked
from distill.training.checkpoints import KEPT, LOG, STEPS, Checkpoints, Every, lines_of, records_of
from distill.training.fingerprints import by_new_names, comparable
from distill.training.interruption import Interrupt
from distill.training.progress import Record

SETTINGS, RESULT, STUDENT, CHECKPOINTS = "settings.json", "result.json", "student", "checkpoints"
TRACKERS = "trackers"
"""The folder of what trackers write, which is no part of the run."""
FINGERPRINTS = "fingerprints"
AT_START = "as it was at the start"
"""The end of names of fingerprints of trained networks, which are compared only where a run starts anew."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ANYWAY, AUTO = "anyway", "auto"
Resume = bool | Literal["anyway", "auto"]


class Interrupted(KeyboardInterrupt):
    """The error of Ctrl-C after the state was saved; the message says how to continue."""


@dataclass(eq=False)
class RunFolder:
    """The folder of a run, a new one or that of the run that is resumed.

    Attributes:
        path: the folder.
        settings: the settings of the run, and under "fingerprints" those of its data, networks and objectives.
        resume: whether to continue the run; "auto" if there is one, "anyway" also if something differs from its start.
        every: the interval between two checkpoints.
        keep: how many of the newest checkpoints stay.
    """

    path: Path
    settings: Mapping[str, Any]
    resume: Any = False
    every: Any = STEPS
    keep: int = KEPT
    checkpoints: Checkpoints = field(init=False)

    def __post_init__(self) -> None:
        if self.resume not in (True, False, ANYWAY, AUTO):
            raise DistillError(
                f"resume={self.resume!r} is none of True, False, 'auto' and 'anyway'; True continues where nothing has "
                "changed, 'auto' starts where there is no run yet, 'anyway' continues in any case."
            )
        if self.resume == AUTO:
            self.resume = self.path.is_dir() and _is_used(self.path)
        self.checkpoints = Checkpoints(self.path / CHECKPOINTS, self.every, bool(self.resume), self.keep)
        if not self.resume:
            refuse_used(self.path)
        else:
            self._compare()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Lock the folder for this run in the block, and make it if need be; a new one that stays empty is removed.

        Raises:
            DistillError: another run is using the folder, or its disk is full.
        """
        if not is_first():
            with self._explaining():
                yield
            return
        missing = [each for each in (self.path, *self.path.parents) if not each.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self.path), self._explaining():
                clear_leftovers(self.path)
                if not self.resume:
                    refuse_used(self.path)  # another run may have used it in the meantime
                yield
        finally:
            for each in missing:
                remove_empty(each)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Raise, of a full disk, an error that names what is whole and the way out; other errors as they are."""
        try:
            yield
        except OSError as error:
            elsewhere = error.filename is not None and self.path not in Path(str(error.filename)).parents
            if error.errno not in FULL or elsewhere:
                raise
            last = self.checkpoints.last()
            whole = "it holds no checkpoint yet" if last is None else f"{last} is whole"
            raise DistillError(
                f"{self.path} cannot be written ({error.strerror}); {whole}: make room, and go on with resume=True "
                "(--resume)."
            ) from error

    def begin(self) -> list[Record]:
        """Write the settings, and the log up to the checkpoint that the run continues from; return its records."""
        kept = self.checkpoints.records[:-1]  # without the step that has just been made
        if is_first():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / SETTINGS, self.settings)
            write(self.path / LOG, lines_of(kept))
        return kept

    def log(self, records: Sequence[Record]) -> None:
        """Add records to the log."""
        if records and is_first():
            with (self.path / LOG).open("a") as log:
                log.write(lines_of(records))

    def _compare(self) -> None:
        """Raise DistillError, or warn if it is to be resumed anyway, if the run was started with something else."""
        file = self.path / SETTINGS
        if not file.exists():
            if self.path.is_dir() and not _is_used(self.path):
                warnings.warn(f"{self.path} holds no step of a run, which starts anew.", stacklevel=4)
                return
            raise DistillError(f"{self.path} holds no run to go on with; leave resume out to start one.")
        try:
            before = read_json(file, "start anew in a new folder, or go on with what is given now: resume='anyway'")
        except Damaged as error:
            if self.resume != ANYWAY:
                raise
            warnings.warn(str(error), stacklevel=4)
            return
        known, now = before.pop(FINGERPRINTS, None), dict(self.settings)
        prints = now.pop(FINGERPRINTS, {})
        if known is not None and self.checkpoints.last() is not None:  # trained networks have changed since
            prints = {name: known.get(name) if name.endswith(AT_START) else each for name, each in prints.items()}
            self.settings = {**self.settings, FINGERPRINTS: prints}
        old, new = by_new_names(before), json.loads(json.dumps(now, default=str))
        changed = [each for name in new for each in _differences(name, old.get(name), new[name])]
        if known is None:
            warnings.warn(
                f"{self.path} was started by an earlier version, which remembered neither data nor models, so whether "
                "they are the same is not known.",
                stacklevel=4,
            )
        else:
            known, prints = comparable(known, prints)
            changed += [
                _describe_change(name, known.get(name), prints.get(name))
                for name in dict.fromkeys([*known, *prints])
                if known.get(name) != prints.get(name)
            ]
        if not changed:
            return
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        if self.resume != ANYWAY:
            raise DistillError(
                f"{self.path} was started with {changed[0]}{more}; use the same, start anew in a new folder, or go on "
                "all the same: resume='anyway' (--anyway)."
            )
        warnings.warn(
            f"{self.path} was started with {'; '.join(changed)}; it continues all the same, as resume='anyway' says.",
            stacklevel=4,
        )


def _differences(name: str, before: Any, now: Any) -> list[str]:
    """Return what differs between two values of a setting; of two tables each entry that does."""
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [each for key in keys for each in _differences(f"{name}.{key}", before.get(key), now.get(key))]
    return [f"{name}={before} and is resumed with {now}"]


def _describe_change(name: str, before: str | None, now: str | None) -> str:
    """Return how a fingerprint at the start of a run differs from that of now."""
    if before is None:
        return f"no {name} and is resumed with one"
    if now is None:
        return f"{name} and is resumed without"
    if name.startswith(("version", "number")):
        return f"{name} {before} and is resumed with {now}"
    return f"another {name} (fingerprint {before}, now {now})"


def run_folder(
    output_dir: str | Path | None, settings: Mapping[str, Any], resume: Resume, every: Any = STEPS, keep: int = KEPT
) -> RunFolder | None:
    """Return the folder of a run that saves, or None.

    Raises:
        DistillError: the folder holds something else, or a run that was started with other settings.
    """
    Every.of(every)
    if output_dir is not None:
        return RunFolder(Path(output_dir), settings, resume, every, keep)
    if resume:
        raise DistillError(f"resume={resume!r} needs the folder to go on from; pass output_dir='runs/…'.")
    return None


@contextmanager
def hold_folder(folder: RunFolder | None) -> Iterator[None]:
    """Lock the folder of a run, if it has one, in the block."""
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(folder.hold())
        yield


@dataclass(eq=False)
class _Log:
    """The log of a folder, into which records are written as soon as they are known, and at the end of the block."""

    folder: RunFolder | None
    waiting: list[Record] = field(default_factory=list)

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *error: object) -> None:
        self._write()

    def add(self, record: Record) -> None:
        """Add a record."""
        self.waiting.append(record)
        if record.is_known:
            self._write()

    def _write(self) -> None:
        if self.folder is not None:
            self.folder.log(self.waiting)
        self.waiting = []


def until_done(records: Iterator[Record], folder: RunFolder | None, interrupt: Interrupt) -> list[Record]:
    """Run the loop, log its records and return them; at a signal save, and stop between two steps."""
    kept: list[Record] = []
    with _Log(folder) as log:
        for record in records:
            if not kept and folder is not None:
                kept = folder.begin()
            kept.append(record)
            log.add(record)
            if interrupt.stops and record.step < record.total and record.stop is None:
                interrupt.final = True
                raise Interrupted(_describe_stop(record, folder))
    if not kept and folder is not None:  # resumed after its last step
        kept = list(folder.checkpoints.records)
        write(folder.path / LOG, lines_of(kept))
    return kept


def refuse_used(folder: Path) -> None:
    """Raise DistillError if a folder holds anything."""
    if folder.exists() and not folder.is_dir():
        raise DistillError(f"{folder} is a file, and a run needs a folder; name another one, e.g. {folder}-run.")
    if folder.exists() and _is_used(folder):
        raise DistillError(
            f"{folder} is not empty: it may hold another run; choose a new folder, or go on from it with "
            f"resume=True (--resume {folder})."
        )


def refuse_used_unless_resumed(output_dir: str | Path | None, resume: Resume) -> None:
    """Raise DistillError if the folder of a new run holds anything; None is no folder."""
    if output_dir is not None and not resume:
        refuse_used(Path(output_dir))


def read_log(folder: Path) -> list[Record]:
    """Return the records of a run from its folder; if the run is done, check them against `result.json`.

    Raises:
        DistillError: a file is damaged.
    """
    log, result = folder / LOG, folder / RESULT
    checksum = read_json(result, "resume the run, which makes it again").get("log") if result.is_file() else None
    if checksum is not None and (not log.is_file() or sha256_of(log) != checksum):
        raise Damaged(
            f"{log} is damaged (it is not what {RESULT} says: checksum); take the one of the last checkpoint: "
            f"{folder / CHECKPOINTS}/step-…/{LOG}."
        )
    return records_of(log)


def _is_used(folder: Path) -> bool:
    """Return whether a folder holds more than a lock, what trackers wrote, and files that a killed process left."""
    return any(each.name not in (LOCK, TRACKERS) and not is_leftover(each) for each in folder.iterdir())


def _describe_stop(record: Record, folder: RunFolder | None) -> str:
    """Save the state, if there is a folder, and return the message that the run was stopped."""
    if folder is None:
        return (
            f"stopped after step {record.step} of {record.total}; nothing was saved, because no output_dir was given."
        )
    saved = folder.checkpoints.save(record.step)
    where = f"stopped after step {record.step} of {record.total}; the state is in {saved}"
    return f"{where}; go on with the same call and resume=True."
