"""One process at a time in a folder: the others wait, or are told who is there."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from distill.errors import DistillError

LOCK = ".lock"


@contextmanager
def locked(folder: Path, *, name: str = LOCK, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a folder, which must be there, for one process; the lock of one that was killed is free.

    Args:
        folder: holds the lock, a file that is gone afterwards.
        name: of the lock.
        waiting: is told who holds it, and the lock is waited for; None raises instead.

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
            told = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            path.write_text(json.dumps(told))
        yield
    finally:
        # Under the lock: who waits for it sees that the file is another, and opens that.
        path.unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str:
    try:
        told = json.loads(path.read_text())
        return f"process {told['pid']} on {told['host']} since {told['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def claim(make: Callable[[int], Path]) -> Path:
    """The first folder of a numbered row that was not there, made now: no two processes get the same."""
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
