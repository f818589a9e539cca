"""Several processes train as one does, to the last digit: means are those of the whole step, not of each process."""

import pytest

from tests.process_group import run_together

# batch size, accumulate, and which teacher, data and objectives
FEATURES = ("FitNets", "PKD", "Cosine")
ALONE = ("8 1 tokens", "8 1 examples", "14 1 examples", *(f"8 1 {name}" for name in FEATURES))
TWO = ("8 2 tokens", "8 2 examples", "14 1 examples", "8 1 memories", *(f"8 2 {name}" for name in FEATURES))
REFUSED = "refused"


def trained(processes: int, runs: tuple[str, ...]) -> dict[str, list[list[str]]]:
    """Return what all processes print of each run: lines, each as words."""
    found: dict[str, list[list[str]]] = {run: [] for run in (*runs, REFUSED)}
    for printed in run_together(["-m", "tests.distill.training.two_processes", *runs], processes):
        for line in printed.splitlines():
            if line in found:
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


@pytest.mark.parametrize("name", ["tokens", "examples", *FEATURES])
def test_two_processes_train_as_one(name, alone, two):
    """15 rows in steps of 8: each epoch ends with a step of 7 rows, 4 and 3; and with parts of uneven sizes.

    Objectives of features alone leave out the layers after these, of which DDP waits for no gradient.
    """
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


def test_models_that_are_split_over_the_processes_are_refused_in_both(two):
    lines = [" ".join(words) for words in two[REFUSED]]
    assert len(lines) == 6
    for teacher, student, layers in (lines[:3], lines[3:]):
        assert teacher.startswith("the teacher (BertForSequenceClassification) is tensor-parallel over 2 processes")
        assert student.startswith("the model that is trained (BertForSequenceClassification) is tensor-parallel over 2")
        assert layers.startswith("from_layers copies the weights of a model, and those of this")
