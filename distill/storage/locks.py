"""Locks: one process at a time works in a folder; others wait or get an error that names the process."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from distill.errors import DistillError
from distill.processes import from_first

LOCK = ".lock"


@contextmanager
def locked(folder: Path, *, name: str = LOCK, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock of an existing folder for one process; the lock of a killed process is free.

    Args:
        folder: holds the lock, a file that is removed afterwards.
        name: the name of that file.
        waiting: called with the holder of the lock before waiting for it; None raises an error instead.

    Raises:
        DistillError: another process, or another run in this one, holds the folder.
    """
    path = folder / name
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if waiting is None:
            raise DistillError(
                f"{folder} is in use by {_holder(path)}; wait for it, or choose another folder: output_dir='…' "
                "(--output …)."
            ) from None
        waiting(_holder(path))
        lock.acquire()
    try:
        with suppress(OSError):
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            path.write_text(json.dumps(holder))
        yield
    finally:
        # Removed under the lock: a process that waits for it sees that the file was replaced, and opens the new one.
        path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def held(folder: Path, **settings: Any) -> Iterator[None]:
    """Hold the lock of a folder for all processes of a run, of which the first one takes it.

    Args:
        folder, settings: as for `locked`.

    Raises:
        DistillError: another run holds it.
    """
    with ExitStack() as held_by_first:

        def take() -> None:
            held_by_first.enter_context(locked(folder, **settings))

        from_first(take)
        yield


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def claim(make: Callable[[int], Path]) -> Path:
    """Create the first folder of a numbered series that does not exist; no two processes get the same."""
    number = 1
    while True:
        folder = make(number)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder
