"""The benchmark of speed: its hand-written sides compute what ours do, and its page shows what it measured."""

import json
import runpy
import sys
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.append(str(BENCHMARKS))  # as for a script that is run there
SPEED = runpy.run_path(str(BENCHMARKS / "speed.py"))
PAGE = (REPOSITORY / "docs" / "speed.md").read_text(encoding="utf-8")
measuring, shapes = sys.modules["speed_cases.measuring"], sys.modules["speed_cases.shapes"]
GIVEN = measuring.Given(torch.device("cpu"), rounds=2, seconds=0.0)
SLOW = ("768", "96 ×", "open and close", "sweep", "fit step", "KD +", "interchange_accuracy", "search", "align")


def cases() -> list[Any]:
    return [
        pytest.param(name, marks=[pytest.mark.full] if any(part in name for part in SLOW) else [])
        for name in SPEED["CASES"]
        if "compiled" not in name
    ]


@pytest.mark.parametrize("name", cases())
def test_the_sides_of_a_case_compute_the_same(name, monkeypatch):
    """What is written by hand is an oracle; a case that has no check runs each side once."""
    monkeypatch.setattr(sys.modules["speed_cases.calls"], "bytes_left", lambda call, times: 0)
    with torch.no_grad():
        case = SPEED["CASES"][name](GIVEN)
        if case.check is not None:
            case.check()
        else:
            for side in case.sides.values():
                side()
    assert {measuring.LIMIT, measuring.NOW} <= case.sides.keys()


def test_ratios_are_of_the_same_round():
    """By hand: of the rounds (2 / 1, 6 / 2, 4 / 4) the median is 2; of the means it is 12 / 7."""
    assert measuring.quartiles([2.0, 6.0, 4.0], [1.0, 2.0, 4.0])[1] == 2.0
    assert measuring.of_means([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == [round(12 / 7, 4)] * 3
    assert measuring.quartiles([3.0], [2.0]) == [1.5] * 3


def test_sides_are_called_equally_often_and_by_turns():
    """Each second round goes the other way round, so that neither side always follows the other."""
    called: list[str] = []
    sides = {name: (lambda name=name: called.append(name)) for name in (measuring.LIMIT, measuring.NOW)}
    found = measuring.measured(measuring.Case(sides), GIVEN)
    assert found["rounds"] == 2
    assert called.count(measuring.LIMIT) == called.count(measuring.NOW)
    assert (called[4], called[-1]) == (measuring.NOW, measuring.NOW)


def test_a_case_that_fails_says_why_and_the_others_are_measured():
    def broken(given: Any) -> Any:
        raise ValueError("no such model")

    one = measuring.Case(dict.fromkeys((measuring.LIMIT, measuring.NOW), lambda: None))
    rows = SPEED["measure"]({"a": broken, "b": lambda given: one, "c": broken}, ["a", "b"], GIVEN)
    assert rows["a"] == {"error": "ValueError: no such model"}
    assert set(rows) == {"a", "b"}
    assert "ValueError: no such model" in SPEED["table"]({"rows": rows})


def test_the_shapes_of_an_accelerator_run_on_a_cpu():
    """What the command measures there, with a model of four blocks; the waits need a device that can be waited for."""
    found = shapes.measure(["tiny"], GIVEN)["tiny"]
    assert set(found) == {"KD", "KD + DIITO", "KD + DIITO / KD"}
    assert all(found[side]["tokens / s"] > 0 for side in ("KD", "KD + DIITO"))
    assert shapes.table({"tiny": found}).count("\n") == 4


def test_a_step_with_an_interchange_multiplies_more_than_one_without(monkeypatch):
    """DIITO resumes after the middle: half of the blocks of both models more, beside the heads."""
    counted = []
    monkeypatch.setattr(shapes, "seconds_of", lambda step, given: counted.append(shapes.multiplications_of(step)) or 1)
    shapes.measure(["tiny"], GIVEN)
    assert 1.3 < counted[1] / counted[0] < 2.1


def test_peers_are_measured_in_cases_of_ours():
    """Beside the same unit and the same limit, so that their ratios stand in one row."""
    assert set(sys.modules["speed_cases.peers"].PLACED) <= set(SPEED["CASES"])


def test_the_page_shows_the_last_figures():
    latest = SPEED["latest"](SPEED["lines"]())
    assert SPEED["table"](latest) in PAGE
    assert SPEED["conditions"](latest) in PAGE
    assert latest["rows"].keys() == SPEED["CASES"].keys()
    assert SPEED["with_figures"](PAGE, latest) == PAGE


def test_each_line_says_of_what_it_is():
    for line in (BENCHMARKS / "speed.json").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        assert {"date", "commit", "machine", "device", "threads", "torch", "transformers", "rows"} <= record.keys()
        for row in record["rows"].values():
            assert "error" in row or row["rounds"] >= 1
