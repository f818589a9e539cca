"""What a host that was broken into answers is refused in one line, and none of it runs."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from interventions import InterventionError
from interventions.tracing.hosts import status_in
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


STATUS = b"cnnsight.schema.response\nStatus\n"
GETATTR = b"cbuiltins\ngetattr\n"


def message_with(status: bytes) -> bytes:
    """A status message, of which `status` is pickled as it was written by some version of Python."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("archive/data.pkl", b"(dVid\nV1\nsVstatus\n" + status + b"s.")
    return target.getvalue()


@pytest.mark.parametrize(
    "status",
    [STATUS + b"(VCOMPLETED\ntR", GETATTR + b"(" + STATUS + b"VCOMPLETED\ntR"],
    ids=["by its value", "by its name, as Python 3.11.0 to 3.11.3 write it"],
)
def test_a_status_is_read_however_python_wrote_it(status):
    assert status_in(message_with(status)) == {"id": "1", "status": "COMPLETED"}


@pytest.mark.parametrize(
    "status",
    [
        GETATTR + b"(Vtext\nVupper\ntR",
        GETATTR + b"(" + GETATTR + b"V__class__\ntR",
        GETATTR + b"(" + STATUS + b"I7\ntR",
        GETATTR + b"(" + GETATTR + b"(" + STATUS + b"V__class__\ntRV__init__\ntR",
        GETATTR + b"(dV__code__\nI1\nsb",
        STATUS + b"(dV__call__\nI1\nsb",
        b"cbuiltins\neval\n(V1\ntR",
    ],
    ids=["of a text", "of itself", "no name", "of a value", "a change of it", "a change of the class", "eval"],
)
def test_other_attributes_are_refused(status):
    with pytest.raises(InterventionError, match="the host's answer holds .*which is refused"):
        status_in(message_with(status))
    test_a_status_is_read_however_python_wrote_it(GETATTR + b"(" + STATUS + b"VCOMPLETED\ntR")
