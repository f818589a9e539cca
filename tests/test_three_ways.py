"""The page "from laptop to remote" holds: its script gives the same everywhere, its examples print what they say.

Run as a program it answers what the tests check, because nnsight changes torch for the whole process:
`python -m tests.test_three_ways FOLDER`.
"""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
REMOTE = REPOSITORY / "tests" / "interventions" / "remote"
PAGE = (REPOSITORY / "docs" / "from-laptop-to-remote.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
SCRIPT, *EXAMPLES = [text for kind, text in BLOCKS if kind == "python"]
PRINTED, *SHOWN = [text for kind, text in BLOCKS if not kind]
WAYS = ("plain", "traced", "local", "host")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.py").write_text(SCRIPT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.test_three_ways", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(folder / "answers.pt", weights_only=False)


@pytest.mark.parametrize("way", WAYS)
def test_the_script_prints_what_the_page_shows(way, answers):
    assert answers[way]["printed"] == PRINTED


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("name", ["sweep", "its base", "its source", "keep", "activation", "run", "without a head"])
def test_the_script_computes_the_same_bits(way, name, answers):
    expected, answered = answers["plain"]["values"][name], answers[way]["values"][name]
    assert expected.numel() > 1
    assert torch.equal(expected, answered)


def test_the_script_says_something(answers):
    values = answers["plain"]["values"]
    assert (values["sweep"] - values["its base"]).abs().max() > 0.01
    assert not torch.equal(values["run"], values["without a head"])


def test_a_plain_model_needs_no_nnsight(answers):
    assert not answers["plain"]["knows nnsight"]
    assert answers["traced"]["knows nnsight"]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_examples_print_what_the_page_shows(number, answers):
    assert answers["examples"][number] == SHOWN[number]


def computed(names: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a run of the script holds at its end."""
    after, grid = names["after"], names["grid"]
    return {
        "sweep": grid.per_example,
        "its base": grid.baseline,
        "its source": grid.source,
        "keep": after.output,
        "activation": after.activations[names["state"]].detach(),
        "run": names["whole"].detach(),
        "without a head": names["without"].output.detach(),
    }


def ran(script: Path, way: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run of the script gives, and its names."""
    sys.argv = [str(script), way]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        names = runpy.run_path(str(script), run_name="__main__")
    values = computed(names)
    return {"printed": printed.getvalue(), "values": values, "knows nnsight": "nnsight" in sys.modules}, names


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(REMOTE))
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(REMOTE / "host.py"), "0"]
    host = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=settings)
    try:
        answers: dict[str, Any] = {}
        for way in WAYS[:-1]:
            answers[way], _ = ran(folder / "study.py", way)
        from nnsight.schema.config import CONFIG

        CONFIG.APP.REMOTE_LOGGING = False
        assert host.stdout is not None
        url = f"http://127.0.0.1:{host.stdout.readline().strip()}"
        answers["host"], names = ran(folder / "study.py", url)
        answers["examples"] = [shown(example, number, names, folder) for number, example in enumerate(EXAMPLES)]
    finally:
        host.kill()
    torch.save(answers, folder / "answers.pt")


def shown(example: str, number: int, names: dict[str, Any], folder: Path) -> str:
    """What an example prints that goes on where the script ended, on the host."""
    file = folder / f"example_{number}.py"
    file.write_text(example, encoding="utf-8")  # nnsight reads the lines of a trace
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(example, str(file), "exec"), names)
    return printed.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
