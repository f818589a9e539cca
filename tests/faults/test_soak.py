"""Everything again and again in one process leaves nothing behind; what does leave something is told."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak import verdicts

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(("minutes", "works"), [("0", "blocks,files"), pytest.param("0.5", "", marks=pytest.mark.full)])
def test_nothing_grows(minutes, works):
    command = [sys.executable, "-m", "tests.soak", "--minutes", minutes, "--only", works]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


@pytest.mark.parametrize(
    ("counted", "grows"),
    [
        ([5] * 9, False),
        ([5, 6, 5, 6, 5, 6, 5, 6, 5], False),
        ([5, 7, 7, 7, 7, 7, 7, 7, 7], False),  # a cache that fills
        (list(range(9)), True),
        ([5, 5, 5, 5, 6, 6, 6, 6, 6], True),
    ],
    ids=["flat", "up and down", "once", "each round", "later"],
)
def test_what_grows(counted, grows):
    ((name, *_, found),) = verdicts([{"open files": count} for count in counted])
    assert (name, found) == ("open files", grows)
