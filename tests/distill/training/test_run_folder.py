"""The folder of a run: checkpoints as often as is asked, the caller's generators, what else lies there."""

import errno
import os
import random
from importlib import import_module

import numpy as np
import pytest
import torch

from distill import KD, DistillError, Schedule, fit, mutual
from distill.teach import cache_folder
from distill.training import checkpoints
from distill.training.checkpoints import keep_generators
from distill.training.run_folder import read_log
from tests.distill.tiny_models import QUIET, mlp, same, spread, vectors, weights

SETTINGS = dict(batch_size=4, lr=1e-2, console=QUIET, objective=KD())


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize(("every", "expected"), [(1, [4, 5]), (2, [4, 5]), (3, [3, 5]), (5, [5]), (100, [5])])
def test_checkpoints_as_often_as_is_asked(every, expected, tmp_path):
    fit(spread(mlp()), spread(mlp(), 1), None, vectors(), steps=5, output_dir=tmp_path, every=every, **SETTINGS)
    assert names(tmp_path) == [f"step-{step:07d}" for step in expected]
    assert [record.step for record in read_log(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "many", None])
def test_what_is_no_interval(every, tmp_path):
    with pytest.raises(DistillError, match=r"every="):
        fit(spread(mlp()), spread(mlp(), 1), None, vectors(), steps=5, output_dir=tmp_path / "r", every=every,
            **SETTINGS)  # fmt: skip
    assert not (tmp_path / "r").exists()


def test_how_often_may_change_when_a_run_goes_on(tmp_path):
    networks = [spread(mlp(), seed) for seed in range(2)]
    mutual(networks, vectors(), output_dir=tmp_path, every=1, console=QUIET)
    again = [spread(mlp(), seed) for seed in range(2)]
    mutual(again, vectors(), output_dir=tmp_path, every=7, resume=True, console=QUIET)
    assert all(torch.equal(a[0].weight, b[0].weight) for a, b in zip(networks, again, strict=True))


@pytest.mark.filterwarnings("ignore:.*holds no checkpoint")
@pytest.mark.parametrize("writer", ["checkpoints.save_state", "run_folder.RunFolder.log"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_full_disk_is_one_line_and_a_run_goes_on_to_the_same_bits(writer, call, tmp_path, monkeypatch):
    settings = dict(steps=4, every=2, output_dir=tmp_path / "run", **SETTINGS)
    whole, student = spread(mlp(), 1), spread(mlp(), 1)
    fit(spread(mlp()), whole, None, vectors(), **{**settings, "output_dir": None})
    module = import_module(f"distill.training.{writer.split('.')[0]}")
    target, name = (module, "save_state") if module is checkpoints else (module.RunFolder, "log")
    real, calls = getattr(target, name), []

    def write(*given):
        calls.append(given)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*given)

    monkeypatch.setattr(target, name, write)
    with pytest.raises(
        DistillError, match=r"run cannot be written \(No space left on device\); .*: make room"
    ) as error:
        fit(spread(mlp()), student, None, vectors(), **settings)
    saved = [each.parent.name for each in (tmp_path / "run").glob("checkpoints/step-*/complete")]
    assert ("is whole" in str(error.value)) == bool(saved)
    monkeypatch.undo()
    student = spread(mlp(), 1)
    fit(spread(mlp()), student, None, vectors(), resume=True, **settings)
    assert same(weights(student), weights(whole))


def test_other_errors_of_the_system_are_raised_as_they_are(tmp_path):
    def fail(record):
        raise OSError(errno.ENOSPC, "full", "/elsewhere/file")

    with pytest.raises(OSError, match="/elsewhere/file"):
        fit(spread(mlp()), spread(mlp(), 1), None, vectors(), steps=2, output_dir=tmp_path / "r", callbacks=fail,
            **SETTINGS)  # fmt: skip


def test_a_file_is_no_folder_of_a_run(tmp_path):
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(DistillError, match=r"a\.csv is a file, and a run needs a folder; name another one"):
        fit(spread(mlp()), spread(mlp(), 1), None, vectors(), steps=1, output_dir=tmp_path / "a.csv", **SETTINGS)


@pytest.mark.parametrize("changed", [{"lr": 0.5}, {"clip": 0.25}, {"lr": 0.5, "clip": 0.25}])
def test_what_differs_from_the_run_is_named_and_nothing_else(changed, tmp_path):
    schedule = dict(steps=2, batch_size=4, lr=0.1)
    settings = dict(objective=KD(), output_dir=tmp_path / "r", console=QUIET)
    fit(spread(mlp()), spread(mlp(), 1), None, vectors(), schedule=Schedule(**schedule), **settings)
    with pytest.raises(DistillError) as error:
        fit(spread(mlp()), spread(mlp(), 1), None, vectors(), schedule=Schedule(**{**schedule, **changed}),
            resume=True, **settings)  # fmt: skip
    name, value = next(iter(changed.items()))
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    before = getattr(Schedule(**schedule), name)
    assert f"was started with schedule.{name}={before} and is resumed with {value}{more}; use the" in str(error.value)


def test_going_on_leaves_the_callers_generators_alone(tmp_path):
    asked = dict(steps=4, output_dir=tmp_path, every=2, **SETTINGS)
    fit(spread(mlp()), spread(mlp(), 1), None, vectors(), **asked)
    models = spread(mlp()), spread(mlp(), 1)  # which draw their weights
    for make in (np.random.seed, torch.manual_seed):
        make(5)
    expected = np.random.rand(), torch.rand(()).item()
    for make in (np.random.seed, torch.manual_seed):
        make(5)
    fit(*models, None, vectors(), resume=True, **asked)
    assert (np.random.rand(), torch.rand(()).item()) == expected
    with keep_generators():  # that of Python is drawn from by the checks of types in tests
        before = random.getstate()
        random.seed(9)
    assert random.getstate() == before


def test_what_else_lies_beside_the_checkpoints_is_left(tmp_path):
    asked = dict(steps=4, output_dir=tmp_path, every=1, **SETTINGS)
    first = fit(spread(mlp()), spread(mlp(), 1), None, vectors(), **asked)
    (tmp_path / "checkpoints" / "step-notes").mkdir()
    (tmp_path / "checkpoints" / "step-").touch()
    again = fit(spread(mlp()), spread(mlp(), 1), None, vectors(), resume=True, **asked)
    assert again.records == first.records
    assert names(tmp_path)[:2] == ["step-", "step-0000003"]


def test_where_teachers_are_kept_without_a_home(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DISTILL_CACHE", raising=False)
    monkeypatch.setattr("pathlib.Path.home", nowhere)
    with pytest.raises(DistillError, match=r"there is none; say where: DISTILL_CACHE="):
        cache_folder()
    monkeypatch.setenv("DISTILL_CACHE", "/somewhere")
    assert str(cache_folder()) == "/somewhere"
