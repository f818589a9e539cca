"""Answers that a program computes in a process of its own, each when a test first needs it.

nnsight and pyvene change torch for the whole process that imports them. So what they compute is computed by programs
beside the tests, one for each test process; a program computes no answer that no test compares.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

REPOSITORY = Path(__file__).parents[1]


class Answers:
    """What the program `python -m module` answers; it starts with the first question."""

    def __init__(self, module: str) -> None:
        self.command = [sys.executable, "-m", module]
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (all that the program prints, until it is closed)
        self.process: subprocess.Popen[bytes] | None = None

    def __getitem__(self, question: str) -> Any:
        """Return the answer to a question, or raise with what went wrong in the program."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended, and its length is missing
        length = self.process.stdout.readline()
        if not length:
            self.errors.seek(0)
            raise AssertionError(f"{self.command} ended:\n{self.errors.read().decode(errors='replace')}")
        answer, error = torch.load(io.BytesIO(self.process.stdout.read(int(length))), weights_only=False)
        assert not error, error
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Let the program end, which it does when no more questions can come."""
        if self.process is not None:
            self.process.communicate()
        self.errors.close()


def serve(answer: Callable[[str], Any]) -> None:
    """Answer the questions that come in, until no more can come: the main function of such a program."""
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    for question in sys.stdin:
        sent = io.BytesIO()
        try:
            torch.save((answer(json.loads(question)), ""), sent)
        except Exception:
            sent = io.BytesIO()
            torch.save((None, traceback.format_exc()), sent)
        channel.write(f"{sent.tell()}\n".encode() + sent.getvalue())
        channel.flush()
