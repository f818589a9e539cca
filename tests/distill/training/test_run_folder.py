"""The folder of a run: checkpoints as often as is asked, the caller's generators, what else lies there."""

import random

import numpy as np
import pytest
import torch

from distill import KD, DistillError, fit, mutual
from distill.teach import cache_folder
from distill.training.checkpoints import keep_generators
from distill.training.run_folder import read_log
from tests.distill.tiny_models import QUIET, mlp, spread, vectors

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
