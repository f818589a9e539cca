"""The folder of a run: settings, log, checkpoints, and who is at work in it."""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from distill.errors import DistillError
from distill.objectives.processes import process_state
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
from distill.training.checkpoints import LOG, Checkpoints, deferred_interrupt, lines_of, records_of
from distill.training.fingerprints import by_new_names, comparable
from distill.training.progress import Record

SETTINGS, RESULT, STUDENT, CHECKPOINTS = "settings.json", "result.json", "student", "checkpoints"
FINGERPRINTS = "fingerprints"
AT_START = "as it was at the start"
"""Ends the names of fingerprints of what is trained: it counts where a run starts anew."""
ANYWAY = "anyway"
SAVE_STEPS = 200
Resume = bool | Literal["anyway"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the state was saved; the message says how to go on."""


@dataclass(eq=False)
class RunFolder:
    """Where a run keeps what it does, a new folder or the one that it goes on in.

    Attributes:
        path: the folder.
        settings: what the run was asked for, and in "fingerprints" what it is made of.
        resume: go on; "anyway" also where something differs from what the run was started with.
        save_steps: steps between two checkpoints.
    """

    path: Path
    settings: Mapping[str, Any]
    resume: Any = False
    save_steps: Any = SAVE_STEPS
    checkpoints: Checkpoints = field(init=False)

    def __post_init__(self) -> None:
        if self.resume not in (True, False, ANYWAY):
            raise DistillError(
                f"resume={self.resume!r} is none of True, False and 'anyway'; resume=True goes on where nothing has "
                "changed, resume='anyway' all the same."
            )
        if isinstance(self.save_steps, bool) or not isinstance(self.save_steps, int) or self.save_steps < 1:
            raise DistillError(
                f"save_steps={self.save_steps!r} is no number of steps between two checkpoints; give one of 1 or more: "
                f"save_steps={SAVE_STEPS}."
            )
        self.checkpoints = Checkpoints(self.path / CHECKPOINTS, self.save_steps, resume=bool(self.resume))
        if not self.resume:
            refuse_used(self.path)
        else:
            self._compare()

    @contextmanager
    def held(self) -> Iterator[None]:
        """The folder, made if need be, for this run alone; one that was made and holds nothing afterwards is removed.

        Raises:
            DistillError: another run is at work there.
        """
        if not process_state().is_main_process:
            yield
            return
        missing = [each for each in (self.path, *self.path.parents) if not each.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self.path):
                clear_leftovers(self.path)
                if not self.resume:
                    refuse_used(self.path)  # by another run, since this one looked
                yield
        finally:
            for each in missing:
                remove_empty(each)

    def begin(self) -> list[Record]:
        """Write the settings, and the log up to the checkpoint that is gone on from; returns its records."""
        kept = self.checkpoints.records[:-1]  # the last is that of the step that has just been made
        if process_state().is_main_process:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / SETTINGS, self.settings)
            write(self.path / LOG, lines_of(kept))
        return kept

    def log(self, record: Record) -> None:
        """Add a record to the log."""
        if process_state().is_main_process:
            with (self.path / LOG).open("a") as log:
                log.write(json.dumps(asdict(record)) + "\n")

    def _compare(self) -> None:
        """See that the folder holds a run that was started with the same."""
        told = self.path / SETTINGS
        if not told.exists():
            if self.path.is_dir() and not _used(self.path):
                warnings.warn(f"{self.path} holds no step of a run, which starts anew.", stacklevel=4)
                return
            raise DistillError(f"{self.path} holds no run to go on with; leave resume out to start one.")
        try:
            before = read_json(told, "start anew in a new folder, or go on with what is given now: resume='anyway'")
        except Damaged as error:
            if self.resume != ANYWAY:
                raise
            warnings.warn(str(error), stacklevel=4)
            return
        known, now = before.pop(FINGERPRINTS, None), dict(self.settings)
        prints = now.pop(FINGERPRINTS, {})
        if known is not None and self.checkpoints.last() is not None:  # what trained networks were does not count
            prints = {name: known.get(name) if name.endswith(AT_START) else each for name, each in prints.items()}
            self.settings = {**self.settings, FINGERPRINTS: prints}
        changed = [
            f"{name}={before.get(name)} and is asked to go on with {value}"
            for name, value in now.items()
            if by_new_names(before).get(name) != json.loads(json.dumps(value, default=str))
        ]
        if known is None:
            warnings.warn(
                f"{self.path} was started by an earlier version, which remembered neither data nor models, so whether "
                "they are the same is not known.",
                stacklevel=4,
            )
        else:
            known, prints = comparable(known, prints)
            changed += [_said(name, known.get(name), prints.get(name)) for name in dict.fromkeys([*known, *prints])
                        if known.get(name) != prints.get(name)]  # fmt: skip
        if not changed:
            return
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        if self.resume != ANYWAY:
            raise DistillError(
                f"{self.path} was started with {changed[0]}{more}; use the same, start anew in a new folder, or go on "
                "all the same: resume='anyway' (--anyway)."
            )
        warnings.warn(
            f"{self.path} was started with {'; '.join(changed)}; it goes on all the same, as resume='anyway' says.",
            stacklevel=4,
        )


def _said(name: str, before: str | None, now: str | None) -> str:
    """How a fingerprint differs."""
    if before is None:
        return f"no {name} and is asked to go on with one"
    if now is None:
        return f"{name} and is asked to go on without"
    if name.startswith(("version", "number")):
        return f"{name} {before} and is asked to go on with {now}"
    return f"another {name} (fingerprint {before}, now {now})"


def run_folder(
    output_dir: str | Path | None, settings: Mapping[str, Any], resume: Resume, save_steps: Any = SAVE_STEPS
) -> RunFolder | None:
    """The folder of a run that saves, None of one that does not.

    Raises:
        DistillError: a folder that holds something else, or a run that was started otherwise.
    """
    if save_steps < 1:
        raise DistillError(f"save_steps={save_steps} is no number of steps; give 1 or more: save_steps={SAVE_STEPS}.")
    if output_dir is not None:
        return RunFolder(Path(output_dir), settings, resume, save_steps)
    if resume:
        raise DistillError("resume=True needs the folder to go on from; pass output_dir='runs/…'.")
    return None


@contextmanager
def held(folder: RunFolder | None) -> Iterator[None]:
    """The folder of a run, if it has one, for this run alone."""
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(folder.held())
        yield


def until_done(records: Iterator[Record], folder: RunFolder | None) -> list[Record]:
    """Run the loop, keep its records and log them; on Ctrl-C save and stop between two steps."""
    kept: list[Record] = []
    with deferred_interrupt() as asked:
        for record in records:
            if not kept and folder is not None:
                kept = folder.begin()
            kept.append(record)
            if folder is not None:
                folder.log(record)
            if asked.is_set() and record.step < record.total:
                asked.final = True
                raise Interrupted(_stopped(record, folder))
    if not kept and folder is not None:  # resumed after its last step
        kept = list(folder.checkpoints.records)
        write(folder.path / LOG, lines_of(kept))
    return kept


def refuse_used(folder: Path) -> None:
    """Raise if `folder` holds anything."""
    if folder.exists() and (not folder.is_dir() or _used(folder)):
        raise DistillError(
            f"{folder} is not empty: it may hold another run; choose a new folder, or go on from it with "
            f"resume=True (--resume {folder})."
        )


def read_log(folder: Path) -> list[Record]:
    """The records of a run, from its folder; of one that is done compared with what `result.json` says of them.

    Raises:
        DistillError: a file is damaged.
    """
    log, result = folder / LOG, folder / RESULT
    told = read_json(result, "resume the run, which makes it again").get("log") if result.is_file() else None
    if told is not None and (not log.is_file() or sha256_of(log) != told):
        raise Damaged(
            f"{log} is damaged (it is not what {RESULT} says: checksum); take the one of the last checkpoint: "
            f"{folder / CHECKPOINTS}/step-…/{LOG}."
        )
    return records_of(log)


def _used(folder: Path) -> bool:
    """Whether there is more in a folder than a lock, or what was being written when a process was killed."""
    return any(each.name != LOCK and not is_leftover(each) for each in folder.iterdir())


def _stopped(record: Record, folder: RunFolder | None) -> str:
    if folder is None:
        return (
            f"stopped after step {record.step} of {record.total}; nothing was saved, because no output_dir was given."
        )
    saved = folder.checkpoints.save(record.step)
    where = f"stopped after step {record.step} of {record.total}; the state is in {saved}"
    return f"{where}; go on with the same call and resume=True."
