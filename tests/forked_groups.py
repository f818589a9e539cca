"""Groups of processes that train together, forked from one program, which imported torch once for all of them.

Imports are nearly all that a process of a test costs. A group of its own for each case may end in any way: by an error,
a signal, or killed.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.process_group import REPOSITORY, environments

SECONDS = 120.0
"""After so long a group hangs: it is killed, and its statuses are those of killed processes."""


@dataclass(frozen=True)
class Ended:
    """The end of a process of a group.

    Attributes:
        status: its exit status; negative if a signal killed it.
        value: what its case returned.
        error: the type and message of the exception of its case, or an empty text.
        output: all that it printed.
    """

    status: int
    value: Any
    error: str
    output: str


class Groups:
    """The groups of the program `python -m module`, which calls `serve`; it starts with the first case."""

    def __init__(self, module: str) -> None:
        self.command = [sys.executable, "-m", module]
        self.process: subprocess.Popen[str] | None = None

    def run(self, case: str, processes: int = 2, **settings: Any) -> list[Ended]:
        """Run a case in each process of a new group, and return how they ended, in the order of their ranks."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command, cwd=REPOSITORY, env=environments(1)[0], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([case, settings, environments(processes)]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"{self.command} ended"
        return [Ended(**each) for each in json.loads(line)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process is not None:
            self.process.communicate()


def serve(cases: Mapping[str, Callable[..., Any]]) -> None:
    """Fork the groups whose cases are read, a line each, and print how they ended, until no more lines come."""
    for line in sys.stdin:
        case, settings, ranks = json.loads(line)
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            started = [_fork(cases[case], settings, each, folder / str(rank)) for rank, each in enumerate(ranks)]
            statuses = _wait(started)
            ended = [_read(folder / str(rank), status) for rank, status in enumerate(statuses)]
        print(json.dumps(ended), flush=True)


def _fork(function: Callable[..., Any], settings: dict[str, Any], environment: dict[str, str], kept: Path) -> int:
    """Return the number of a new process that calls a function and keeps what it returns in files."""
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        os.environ.update(environment)
        output = os.open(kept.with_suffix(".output"), os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(output, stream)
        kept.with_suffix(".json").write_text(json.dumps({"value": function(**settings)}))
        status = 0
    except BaseException as error:
        traceback.print_exc()
        kept.with_suffix(".json").write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
    finally:
        for written in (sys.stdout, sys.stderr):
            written.flush()
        os._exit(status)


def _wait(numbers: list[int]) -> list[int]:
    """Return the exit statuses of processes; those that run too long are killed."""
    statuses: dict[int, int] = {}
    end = time.monotonic() + SECONDS
    while len(statuses) < len(numbers):
        for number in numbers:
            if number in statuses:
                continue
            found, status = os.waitpid(number, os.WNOHANG)
            if found:
                statuses[number] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(number, signal.SIGKILL)
        time.sleep(0.02)
    return [statuses[number] for number in numbers]


def _read(kept: Path, status: int) -> dict[str, Any]:
    """Return how a process ended, by its files."""
    result, output = kept.with_suffix(".json"), kept.with_suffix(".output")
    found = json.loads(result.read_text() or "{}") if result.is_file() else {}
    text = output.read_text(errors="replace") if output.is_file() else ""
    return {"status": status, "value": found.get("value"), "error": found.get("error", ""), "output": text}
