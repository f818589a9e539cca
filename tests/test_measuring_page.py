"""The page on measuring holds: its figures are those that its commands gave, and its code runs."""

import re
import runpy
from dataclasses import replace
from typing import Any

import pytest
import torch

import distill
from distill.evaluation import measurement
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "measuring.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
FIGURES = {
    "effect rate": "effect_rate",
    "do nothing": "do_nothing",
    "replace all": "replace_all",
    "IIA": "iia",
    "effective": "effective",
    "normalized": "normalized",
    "KL": "kl",
    "shifts": "correlation",
    "agreement": "agreement",
    "KL on base": "base_kl",
}


def benchmark(name: str) -> dict[str, Any]:
    """The names that a benchmark defines."""
    return runpy.run_path(str(REPOSITORY / "benchmarks" / f"{name}.py"))


@pytest.fixture(scope="module")
def latest() -> dict[str, Any]:
    return benchmark("measuring")["lines"]()[-1]


@pytest.mark.parametrize("name", ["intervals", "images", "differences", "seeds"])
def test_a_table_of_power_is_that_of_the_file(name):
    power = benchmark("power")
    assert power["tables"](power["lines"]()[-1])[name] in PAGE


@pytest.mark.parametrize("name", ["table_of_kinds", "table_of_intervals"])
def test_a_table_of_students_is_that_of_the_file(name, latest):
    assert benchmark("measuring")[name](latest) in PAGE


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_of_the_one_student_is_that_of_the_file(figure, latest):
    found = latest["runs"][0]["students"]["KD"]["kinds"]["as mapped"][FIGURES[figure]]
    value = found[0] if isinstance(found, list) else found
    assert f"| **{figure}** | {value:.3f} |" in PAGE


def test_the_code_runs(monkeypatch, capsys):
    """Of the page as it stands, but for fewer steps, rows and pairs, and a teacher that has learned nothing."""
    task = distill.tasks.load("pvr")
    few = replace(task, train=task.train.take(torch.arange(64)), test=task.test.take(torch.arange(64)))
    monkeypatch.setattr(distill.tasks, "load", lambda name: few)
    monkeypatch.setattr(measurement, "MOST_PAIRS", 20)
    monkeypatch.setattr(distill, "teacher_of", lambda task: task.network(0))
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(re.sub(r"pairs=\d+", "pairs=20", block.replace("steps=400", "steps=2")), names)
    assert len(BLOCKS) >= 4
    assert "do nothing" in capsys.readouterr().out
