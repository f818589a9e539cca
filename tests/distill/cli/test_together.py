"""Commands in two processes, as `torchrun -m distill` starts them: one speaks and writes, both measure, none waits."""

import json
import os
import subprocess
import sys

import pytest

from tests.process_group import run_together

PAIRS = 40


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("together")
    printed = run_together(["-m", "tests.distill.cli.together", str(folder)])
    return folder, [json.loads(each.splitlines()[-1]) for each in printed]


def test_one_makes_what_all_get(both):
    for rank, found in enumerate(both[1]):
        assert (found["from first"], found["undivided"], found["all"]) == (0, [rank], [0, 1])


def test_an_error_of_one_is_raised_on_all(both):
    first, second = (found["errors"] for found in both[1])
    for number, (one, other) in enumerate(
        [*zip(first[:2], second[:2], strict=True), *zip(second[2:], first[2:], strict=True)]
    ):
        text = ("ValueError: no", "FileNotFoundError: [Errno 2] gone")[number % 2]
        assert one == text
        assert other == f"DistillError: process {number // 2} of 2 failed: {text}"


def test_one_says_a_text_that_both_come_to(both):
    said = [found["said"] for found in both[1]]
    assert [sum(each) for each in zip(*said, strict=True)] == [1, 1, 2]


def close(one, other, path=""):
    """The places at which two figures differ by more than rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return [place for key in one for place in close(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list):
        assert len(one) == len(other)
        return [at for number, each in enumerate(one) for at in close(each, other[number], f"{path}/{number}")]
    if isinstance(one, float):
        return [] if other == pytest.approx(one, rel=1e-4, abs=1e-6) else [f"{path}: {one} {other}"]
    return [] if one == other else [f"{path}: {one} {other}"]


def test_processes_divide_what_is_measured_and_find_the_same(both):
    whole, divided = ([found["figures"][name] for found in both[1]] for name in ("whole", "divided"))
    assert [each.pop("own pairs") for each in whole] == [PAIRS, PAIRS]
    assert [each.pop("own pairs") for each in divided] == [PAIRS // 2, PAIRS // 2]
    assert whole[0] == whole[1]
    assert divided[0] == divided[1]
    assert close(whole[0], divided[0]) == []


def test_one_speaks_and_writes(both):
    folder, found = both
    first, second = (each["commands"] for each in found)
    assert {name: each["out"] for name, each in second.items()} == dict.fromkeys(second, "")
    assert [first["fit"][key] for key in ("status", "err")] == [0, ""]
    assert "KD: step 2/2" in first["fit"]["out"]
    assert f"report: {folder / 'run' / 'report.html'}" in first["fit"]["out"]
    assert "report: runs/films-1/report.html" in first["claimed"]["out"]
    assert sorted(each.name for each in folder.iterdir()) == ["answers", "films.csv", "run", "runs", "teacher"]
    assert len(list((folder / "runs").iterdir())) == 1
    assert not [each for each in folder.rglob("*") if each.name.startswith(".")]
    for name in ("evaluate", "finished"):
        assert (first[name]["status"], first[name]["err"], second[name]["err"]) == (0, "", "")
        assert "KD" in first[name]["out"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("used", "is not empty"), ("missing", "none.csv"), ("usage", "No such option")],
)
def test_an_error_is_said_once_and_ends_all(both, name, text):
    failed = [each["commands"][name] for each in both[1]]
    assert [each["status"] for each in failed] == [2, 2]
    lines = "".join(each["err"] for each in failed).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("distill: ")
    assert text in lines[0]


def test_the_command_line_is_a_module():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-m", "distill", "--version"], capture_output=True, text=True, check=True, env=environment
    )
    assert found.stdout.startswith("distill ")


def test_each_computes_a_part_of_the_answers_of_a_teacher(both):
    folder, found = both
    first, second = (each["commands"]["cache"] for each in found)
    assert (first["status"], second["status"], second["out"], first["err"] + second["err"]) == (0, 0, "", "")
    assert f"answers to 48 samples: {folder / 'answers'}" in first["out"]
    assert "cache: batch 3/3" in first["out"]  # of six
    assert len(list((folder / "answers").glob("samples-*.shard"))) == 2
