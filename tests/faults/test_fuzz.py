"""Wrong arguments of every public callable, and wrong invocations of the command line: each is refused in one line.

The tests try samples, the same ones each time: every argument and every value is in those of `pytest --full`, though
not each argument with each value. `python -m tests.faults.fuzz` and `python -m tests.faults.fuzz.command_line` try all,
and print the counts that `docs/reliability.md` has. What is tried runs in a process of its own, so that the checks of
types that stand while tests run do not speak first.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import distill
import distill.losses
import distill.metrics
import distill.networks
import distill.objectives
import distill.tasks
import interventions
from distill import DistillError
from tests.faults.fuzz.attack import Recipe, attacked, attacks
from tests.faults.fuzz.command_line import NAMES, NUMBERS, PATHS, invocations
from tests.faults.fuzz.homes import DAMAGES, FILES
from tests.faults.fuzz.recipes import RECIPES

REPOSITORY = Path(__file__).parents[2]
FEW = 5
"""Of so many attacks one is tried in the full tier; with so many values an argument, others at the next argument."""
LOST = ("silent", "raw", "left", "hangs")
PUBLIC = (
    interventions, distill, distill.losses, distill.metrics, distill.networks, distill.tasks, distill.objectives,
)  # fmt: skip
EXCUSED = {
    "made by the package alone, and read": (
        "Activations Architecture Audit Circuit ComparedFigure Comparison EntryHeadroom Estimate "
        "Evaluation FitResult Handle Headroom InterchangeAccuracy MappingSearch Outcome OverRuns "
        "Picture Record Saved Search Selection Stack TrainingPath"
    ),
    "errors, which are raised": "InterventionError UnknownAnswer DistillError Interrupted",
    "kinds of values, and bases of classes": "Answers Divergence Model Place SITES Subspace",
    "without arguments": "DAS Swap Zero trusting unchanged",
    "how the package itself is written": (
        "Result checking data_frame import_when_used in_one_line plain_data printed renamed renamed_in"
    ),
}
"""Public names that no recipe calls, by the reason."""


def run(module: str, *arguments: str) -> list[dict[str, str]]:
    """The outcomes of attacks, in a process of their own."""
    target = Path(os.environ["PYTEST_TMP"]) / f"{module.rpartition('.')[2]}.json"
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments, "--json", str(target)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert target.is_file(), ended.stdout[-3000:] + ended.stderr[-3000:]
    return json.loads(target.read_text())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder for what the processes write."""
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))


def lost_among(outcomes):
    """Print the counts, and return the wrong values that are lost, as text."""
    counts = Counter(each["kind"] for each in outcomes)
    print(f"{len(outcomes)} tried: " + ", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    lost = [each for each in outcomes if each["kind"] in LOST]
    assert counts["clear"] > len(outcomes) / 2
    return [f"{e['kind']} {e['recipe']} {e['argument']}={e['value']}: {e['text']}" for e in lost]


@pytest.mark.parametrize("every", [97, pytest.param(FEW, marks=pytest.mark.full)])
def test_wrong_arguments_are_refused_in_one_line(every):
    assert lost_among(run("tests.faults.fuzz", "--every", str(every))) == []


@pytest.mark.parametrize("every", [61, pytest.param(3, marks=pytest.mark.full)])
def test_wrong_invocations_are_refused_in_one_line(every):
    assert lost_among(run("tests.faults.fuzz.command_line", "--every", str(every))) == []


def test_the_sample_of_the_full_tier_holds_every_argument_and_every_value():
    every_one = [(recipe.name, *attack) for recipe in RECIPES for attack in attacks(recipe)]
    chosen = every_one[::FEW]
    assert {attack[:2] for attack in chosen} == {attack[:2] for attack in every_one}
    assert min(Counter(value for *_, value in chosen).values()) > 100
    called = list(invocations())
    assert {each.name for each in called[::3]} == {each.name for each in called}
    assert {each.value for each in called[::3]} >= {*NUMBERS, *NAMES, *PATHS, *FILES, *DAMAGES}


def test_there_are_more_than_a_thousand_wrong_inputs():
    assert len(list(invocations())) > 300
    assert sum(len(recipe.takes) for recipe in RECIPES) * 80 > 1000


def test_everything_public_is_tried():
    called = {part for recipe in RECIPES for part in recipe.name.split(" ")[0].split(".")}
    excused = {name for names in EXCUSED.values() for name in names.split()}
    public = {name for module in PUBLIC for name in module.__all__ if is_called(module, name)}
    assert sorted(public - called - excused) == []
    assert sorted(excused - {name for module in PUBLIC for name in module.__all__}) == []
    assert sorted(excused & called) == []


def is_called(module, name):
    """Whether a public name is called, and no module or constant."""
    found = getattr(module, name)
    return callable(found) and not isinstance(found, ModuleType)


# --- the harness -----------------------------------------------------------------------------------------------------


def silent(value):
    """Take anything."""


def raw(value):
    """Fail with an error of Python."""
    return value + 1


def clear(value):
    """Refuse."""
    raise DistillError(f"clear({value!r}) is refused; leave it out.")


def mute(value):
    """Refuse without a word."""
    raise DistillError("")


def left(value, network):
    """Leave a hook."""
    network.register_forward_hook(lambda *args: None)
    raise DistillError("refused; leave it out.")


def forever(value):
    """Go on for ever."""
    while True:
        pass


@pytest.mark.parametrize(
    ("call", "value", "kind"),
    [
        (silent, "None", "silent"),
        (silent, "7", "right"),
        (raw, "None", "raw"),
        (clear, "None", "clear"),
        (mute, "None", "raw"),
        (left, "None", "left"),
        (forever, "None", "hangs"),
    ],
)
def test_what_is_planted_is_seen(call, value, kind, monkeypatch):
    monkeypatch.setattr("tests.faults.fuzz.attack.LONGEST", 1)
    more = {"network": nn.Linear(2, 2)} if call is left else {}
    recipe = Recipe("planted", call, lambda: {"value": torch.ones(2), **more}, {"value": "7"})
    assert attacked(recipe, "value", value).kind == kind
