"""What a host that was broken into answers is refused in one line, and none of it runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.asking_planted import KINDS

REPOSITORY = Path(__file__).parents[2]
OURS = [*KINDS, "own trace, backend="]
NNSIGHTS = ["own trace, result", "own trace, message"]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.faults.asking_planted"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", OURS)
def test_no_answer_runs(kind, found):
    said, ran = found[kind]
    assert not ran
    assert "\n" not in said
    assert said.startswith("the host ") if kind == "other:" else said.startswith("the host's answer holds "), said


@pytest.mark.parametrize("kind", NNSIGHTS)
def test_what_is_planted_would_run(kind, found):
    assert found[kind][1]


def test_all_are_looked_at(found):
    assert set(found) == {*OURS, *NNSIGHTS}
