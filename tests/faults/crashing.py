"""A process that is killed at one of its file operations, and how many there are."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

KILLED = 9
WRITING = os.O_WRONLY | os.O_RDWR
EVENTS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "shutil.rmtree"}


class Killer:
    """Counts the operations on files in a folder, and ends the process at one of them.

    Attributes:
        root: the folder.
        number: of the operation, from 1.
        during: end it when the file of that operation is half written; else before the operation.
    """

    def __init__(self, root: Path, number: float, during: bool) -> None:
        self.root, self.number, self.during = str(root), number, during
        self.count, self.half = 0, None
        sys.addaudithook(self.audit)
        for module, name in ((torch, "save"), (safetensors.torch, "save_file"), (safetensors.torch, "save_model")):
            setattr(module, name, self.around(getattr(module, name)))

    def audit(self, event: str, args: tuple) -> None:
        if event == "open":
            path, mode, flags = args
            writes = (mode and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & WRITING)
            if isinstance(path, str | bytes | os.PathLike) and writes:
                self.operation(os.fsdecode(path), written=True)
        elif event in EVENTS:
            for path in args[:2]:
                if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(self.root):
                    self.operation(os.fsdecode(path), written=False)
                    break

    def around(self, function: Callable) -> Callable:
        """Those that write files in native code, unheard."""

        def called(value, file, *args, **kwargs):
            if isinstance(file, str | os.PathLike):
                self.operation(os.fsdecode(file), written=True)
            return function(value, file, *args, **kwargs)

        return called

    def operation(self, path: str, *, written: bool) -> None:
        if not path.startswith(self.root):
            return
        self.count += 1
        if self.half is not None:
            half = self.half
            self.number = float("inf")  # what follows is no operation of the run
            if os.path.isfile(half):
                os.truncate(half, os.path.getsize(half) // 2)
            os._exit(KILLED)
        if self.count == self.number:
            if not self.during or not written:
                os._exit(KILLED)
            self.half = path


def operations(root: Path, work: Callable[[], None]) -> int:
    """How many operations on files in a folder work makes, in a process of its own."""
    reading, writing = os.pipe()
    number = os.fork()
    if not number:
        killer = Killer(root, float("inf"), during=False)
        _finish(work)
        os.write(writing, str(killer.count).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(number, 0)
    count = os.read(reading, 100)
    os.close(reading)
    assert os.waitstatus_to_exitcode(status) == 0
    return int(count)


def killed(root: Path, work: Callable[[], None], at: int, *, during: bool) -> bool:
    """Whether work was ended at an operation; False where it ended before by itself."""
    number = os.fork()
    if not number:
        Killer(root, at, during)
        _finish(work)
        os._exit(0)
    _, status = os.waitpid(number, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED), code
    return code == KILLED


def _finish(work: Callable[[], None]) -> None:
    try:
        work()
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
