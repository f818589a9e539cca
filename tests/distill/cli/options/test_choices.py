"""What a shell completes: the values that the commands accept, without torch, and none beside them."""

import os
import subprocess
import sys

import pytest

from distill.alignment.after_kd import SEARCH
from distill.cli import fit_command
from distill.cli.options import choices, groups
from distill.interchange.mapping import KINDS
from distill.tasks.loading import names
from distill.training.optimization import optimizers
from distill.training.optimization.rates import check_decay
from distill.training.schedule import PRECISIONS

IN_PYTHON = {"digits", "mnist"}
"""Tasks whose teachers the command does not make."""
COMPLETED = """
import sys
from distill.cli.main import main
try:
    main()
finally:
    assert not {"torch", "numpy", "transformers"} & sys.modules.keys(), "imported in vain"
"""


@pytest.mark.parametrize(
    ("listed", "accepted"),
    [
        (choices.OBJECTIVES, fit_command.OBJECTIVES),
        (choices.TASKS, {*names(), *groups.LANGUAGE} - IN_PYTHON),
        (choices.MAPPINGS, (*KINDS, SEARCH)),
        (choices.SOURCES, groups.SOURCES),
        (choices.CHOSEN_BY, groups.CHOSEN_BY),
        (choices.OPTIMIZERS, optimizers.OPTIMIZERS),
        (choices.DECAYING, optimizers.DECAYING),
        (choices.PRECISIONS, PRECISIONS),
    ],
)
def test_values_are_those_that_are_accepted(listed, accepted):
    assert sorted(listed) == sorted(accepted)


def test_decays_are_accepted():
    for name in choices.DECAYS:
        check_decay(name)


def complete(line: str) -> list[str]:
    """Return what bash is offered at the end of a line, in a process of its own."""
    words = line.split(" ")
    environment = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_DISTILL_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-c", COMPLETED],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "imported in vain" not in done.stderr
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("distill fit --objective kd,d", ["kd,diito", "kd,dkd"]),
        ("distill te", ["teach"]),
        pytest.param("distill fit --decay cos", ["cosine", "cosine_with_restarts"], marks=pytest.mark.full),
        pytest.param("distill teach --prec", ["--precision"], marks=pytest.mark.full),
        ("distill fit --seeds 0 1 --task p", ["pvr"]),
    ],
)
def test_a_shell_is_offered(line, offered):
    assert complete(line) == offered


def test_the_script_of_a_shell_is_printed(tmp_path):
    program = COMPLETED.replace("try:", "sys.argv = ['distill', '--show-completion', 'bash']\ntry:")
    environment = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "complete -o default -F _distill_completion distill" in done.stdout
    assert not any(tmp_path.iterdir())
