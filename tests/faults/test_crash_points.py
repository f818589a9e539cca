"""A run that is killed at any of its file operations goes on to the same bits, or starts anew by itself."""

import contextlib
import os
import signal
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file

import distill
from distill import KD, Interrupted, fit
from distill.cli.fit_command import FitCommand
from distill.cli.options.groups import DataOptions, ScheduleOptions, StudentOptions
from distill.evaluation import measurement
from distill.storage.files import read_json
from distill.training.checkpoints import Checkpoints
from distill.training.run_folder import read_log
from tests.distill.conftest import save_bert, sentences, write_csv
from tests.distill.tiny_models import QUIET, mlp, same, spread, vectors, weights
from tests.faults.crashing import killed, operations

SETTINGS = dict(steps=5, batch_size=4, lr=1e-2, console=QUIET, objective=KD())
SAMPLE = 9
"""Of so many points one is tried in the default tier."""


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """A checkpoint every second step, and quick measurements."""
    monkeypatch.setattr(
        distill.training.run_folder, "Checkpoints", lambda folder, _, resume, keep: Checkpoints(folder, 2, resume, keep)
    )
    monkeypatch.setattr(measurement, "MOST_PAIRS", 20)


def work(folder: Path, resume: bool = False):
    """A whole run, as a job script makes it."""
    student = spread(mlp(), 1)
    result = fit(spread(mlp()), student, None, vectors(), eval_data=vectors(8, seed=3), output_dir=folder,
                 resume=resume, **SETTINGS)  # fmt: skip
    return student, result


def listed(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def check(folder: Path, expected, whole: Path) -> None:
    """Go on in a folder, and compare with the run that nothing happened to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        student, result = work(folder, resume=folder.exists())
    assert same(weights(student), weights(expected[0]))
    assert result.records == expected[1].records
    assert result.evaluation == expected[1].evaluation
    assert read_log(folder) == list(expected[1].records) == read_log(whole)
    assert listed(folder) == listed(whole)
    assert read_json(folder / "result.json", "")["steps"] == 5


def points(root: Path):
    count = operations(root, lambda: work(root / "counted"))
    return [(at, during) for at in range(1, count + 1) for during in (False, True)]


def attack(tmp_path: Path, every: int) -> tuple[int, int]:
    whole = tmp_path / "whole"
    expected = work(whole)
    tried = 0
    chosen = points(tmp_path)[::every]
    for number, (at, during) in enumerate(chosen):
        root = tmp_path / str(number)
        root.mkdir()
        assert killed(root, lambda root=root: work(root / "run"), at, during=during)
        check(root / "run", expected, whole)
        tried += 1
    return tried, len(chosen)


@pytest.mark.parametrize(("every", "least"), [(SAMPLE, 5), pytest.param(1, 60, marks=pytest.mark.full)])
def test_killed_at_its_operations(every, least, tmp_path):
    tried, _ = attack(tmp_path, every)
    print(f"crash points of fit: {tried} tried, {tried} went on or began anew to the same bits, 0 lost")
    assert tried > least


def test_killed_again_while_it_goes_on(tmp_path):
    """The second attempt is killed too, at every fifth operation of its own."""
    whole = tmp_path / "whole"
    expected = work(whole)
    root = tmp_path / "again"
    root.mkdir()
    assert killed(root, lambda: work(root / "run"), 30, during=False)
    for at in range(3, 40, 9):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            killed(root, lambda: work(root / "run", resume=True), at, during=bool(at % 2))
    check(root / "run", expected, whole)


def test_a_second_signal_during_the_checkpoint_of_the_first_loses_nothing(tmp_path, monkeypatch):
    """Ctrl-C comes while the checkpoint of step 2 is saved, and again while that of the stop is."""
    saving, presses = Checkpoints.save, []

    def pressed(self, step):
        with monkeypatch.context() as patched:
            once = distill.training.checkpoints.save_state

            def save_state(*args, **kwargs):
                presses.append(step)
                os.kill(os.getpid(), signal.SIGINT)
                return once(*args, **kwargs)

            patched.setattr(distill.training.checkpoints, "save_state", save_state)
            return saving(self, step)

    whole, student = spread(mlp(), 1), spread(mlp(), 1)
    expected = fit(spread(mlp()), whole, None, vectors(), **SETTINGS)
    before, asked = signal.getsignal(signal.SIGINT), {**SETTINGS, "output_dir": tmp_path / "run"}
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", pressed)
        with pytest.raises(Interrupted, match="stopped after step 2 of 5"):
            fit(spread(mlp()), student, None, vectors(), **asked)
    assert presses == [2, 2]
    assert signal.getsignal(signal.SIGINT) is before
    again = spread(mlp(), 1)
    result = fit(spread(mlp()), again, None, vectors(), resume=True, **asked)
    assert same(weights(again), weights(whole))
    assert result.records == expected.records


@pytest.fixture
def asked(tmp_path):
    """What the command line is asked for: a saved classifier, a file of rows, and quick measurements."""
    teacher = save_bert(tmp_path / "teacher", classifier=True, layers=2)
    return FitCommand(
        source=DataOptions(data=str(write_csv(tmp_path / "films.csv", sentences(30)))),
        timing=ScheduleOptions(steps=3, batch_size=4),
        teacher=str(teacher),
        smaller=StudentOptions(student_layers=1),
        objective="kd",
        any_teacher=True,
        eval_pairs=10,
    )


def commanded(folder: Path, asked) -> dict:
    """What a user does, who sees a folder with or without a run; returns the figures."""
    from distill.cli.fit import resume_fit, run_fit

    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore", UserWarning)
        if (folder / "command.json").exists():
            resume_fit(folder)
        else:
            run_fit(asked, folder)
    told = read_json(folder / "result.json", "")
    return {name: [told["models"][i][name] for i in range(2)] for name in ("accuracy", "interchange", "parameters")}


def attack_commands(tmp_path: Path, asked, every: int) -> int:
    whole = tmp_path / "whole"
    expected, tried = commanded(whole, asked), 0
    count = operations(tmp_path, lambda: commanded(tmp_path / "counted", asked))
    chosen = [(at, during) for at in range(1, count + 1) for during in (False, True)][::every]
    for number, (at, during) in enumerate(chosen):
        root = tmp_path / str(number)
        root.mkdir()
        assert killed(root, lambda root=root: commanded(root / "run", asked), at, during=during)
        assert commanded(root / "run", asked) == expected
        assert listed(root / "run") == listed(whole)
        assert same(
            load_file(root / "run/kd/student/model.safetensors"), load_file(whole / "kd/student/model.safetensors")
        )
        tried += 1
    return tried


@pytest.mark.parametrize(("every", "least"), [(25, 3), pytest.param(5, 20, marks=pytest.mark.full)])
def test_the_command_line_killed_at_its_operations(every, least, tmp_path, asked):
    tried = attack_commands(tmp_path, asked, every)
    print(f"crash points of distill fit: {tried} tried, {tried} went on or began anew to the same bits, 0 lost")
    assert tried > least


def test_what_was_being_written_when_the_command_was_killed_is_removed(tmp_path, asked):
    """Also where it was killed before any file of its folder was whole, and is started anew."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".command.json.0123.partial").write_text("{")
    commanded(folder, asked)
    assert [each.name for each in folder.rglob("*.partial")] == []
