"""Several processes train as one does, to the last digit: means are those of the whole step, not of each process."""

import pytest

from tests.process_group import run_together

# batch size, accumulate, and which teacher, data and objectives
ALONE = ("8 1 tokens", "8 1 examples", "14 1 examples")
TWO = ("8 2 tokens", "8 2 examples", "14 1 examples", "8 1 memories")


def trained(processes: int, runs: tuple[str, ...]) -> dict[str, list[list[str]]]:
    """Return what all processes print of each run: lines, each as words."""
    found: dict[str, list[list[str]]] = {run: [] for run in runs}
    for printed in run_together(["-m", "tests.distill.training.two_processes", *runs], processes):
        for line in printed.splitlines():
            if line in runs:
                lines = found[line]
            else:
                lines.append(line.split())
    return found


@pytest.fixture(scope="module")
def alone():
    return trained(1, ALONE)


@pytest.fixture(scope="module")
def two():
    return trained(2, TWO)


@pytest.mark.parametrize("name", ["tokens", "examples"])
def test_two_processes_train_as_one(name, alone, two):
    """15 rows in steps of 8: each epoch ends with a step of 7 rows, 4 and 3; and with parts of uneven sizes."""
    both = alone[f"8 1 {name}"], two[f"8 2 {name}"]
    one, other = ([line for line in lines if line[0] == "record"] for lines in both)
    assert [line[1] for line in one] == ["1", "2", "3", "4"]
    for expected, found in zip(one, other, strict=True):
        assert [float(value) for value in expected[2:]] == pytest.approx([float(v) for v in found[2:]], rel=1e-9)
    ends = [float(line[2]) for lines in both for line in lines if line[0] == "weights"]
    assert len(ends) == 3
    assert max(ends) - min(ends) < 1e-8


def test_a_process_that_has_no_rows_left_waits_for_the_other(alone, two):
    """15 rows in steps of 14, 7 in each of two processes: the second step has one row, and one process none."""
    both = alone["14 1 examples"], two["14 1 examples"]
    ends = [float(line[2]) for lines in both for line in lines if line[0] == "weights"]
    assert len(ends) == 3
    assert max(ends) - min(ends) < 1e-8


def test_memories_are_the_same_in_all_processes(two):
    ends = [line for line in two["8 1 memories"] if line[0] == "weights"]
    assert len(ends[0]) > 4
    assert ends[0][2:] == ends[1][2:]
