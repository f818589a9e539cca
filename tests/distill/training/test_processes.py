"""Several processes train as one does, to the last digit: means are those of the whole step, not of each process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def trained(processes: int, batch_size: int, accumulate: int, name: str) -> list[list[str]]:
    """The lines that the processes print, each as words."""
    command = [sys.executable, "-m", "tests.distill.training.two_processes", str(batch_size), str(accumulate), name]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    running = []
    for rank in range(processes):
        several = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        environment = {**os.environ, **several, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes))
    lines = []
    for each in running:
        output, errors = each.communicate(timeout=300)
        assert each.returncode == 0, errors[-3000:]
        lines += [line.split() for line in output.splitlines()]
    return lines


@pytest.mark.parametrize("name", ["tokens", "examples"])
def test_two_processes_train_as_one(name):
    """15 rows in steps of 8: each epoch ends with a step of 7 rows, 4 and 3; and with parts of uneven sizes."""
    alone, two = trained(1, 8, 1, name), trained(2, 4, 2, name)
    assert [line[:2] for line in alone if line[0] == "record"] == [["record", str(step)] for step in range(1, 5)]
    for one, other in zip(*([line for line in lines if line[0] == "record"] for lines in (alone, two)), strict=True):
        assert [float(value) for value in one[2:]] == pytest.approx([float(value) for value in other[2:]], rel=1e-9)
    ends = {line[2] for lines in (alone, two) for line in lines if line[0] == "weights"}
    assert max(map(float, ends)) - min(map(float, ends)) < 1e-8


def test_a_process_that_has_no_rows_left_waits_for_the_other():
    """15 rows, 7 in each of two processes: the second step of an epoch has one row, and one process has none."""
    alone, two = trained(1, 14, 1, "examples"), trained(2, 7, 1, "examples")
    ends = [float(line[2]) for lines in (alone, two) for line in lines if line[0] == "weights"]
    assert len(ends) == 3
    assert max(ends) - min(ends) < 1e-8


def test_memories_are_the_same_in_all_processes():
    ends = [line for line in trained(2, 4, 1, "memories") if line[0] == "weights"]
    assert len(ends[0]) > 4
    assert ends[0][2:] == ends[1][2:]
