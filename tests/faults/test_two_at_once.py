"""Two at once in one folder: one is at work, the other waits or is told who is there; locks of the dead are free."""

import importlib
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

import distill
from distill import KD, DistillError, fit
from distill.storage.locks import claim, locked
from distill.training.checkpoints import Checkpoints
from distill.training.run_folder import read_log
from tests.distill.tiny_models import QUIET, mlp, same, spread, vectors, weights
from tests.process_group import environments

SETTINGS = dict(steps=4, batch_size=4, lr=1e-2, console=QUIET)


class Meanwhile(KD):
    """Does something in the second step."""

    def __init__(self, work) -> None:
        super().__init__()
        self._work, self._calls = work, 0

    def forward(self, step):
        self._calls += torch.is_grad_enabled()
        if torch.is_grad_enabled() and self._calls == 2:
            self._work()
        return super().forward(step)


def run(folder, objective, resume=False):
    student = spread(mlp(), 1)
    return fit(spread(mlp()), student, None, vectors(), objective=objective, output_dir=folder, resume=resume,
               **SETTINGS)  # fmt: skip


def in_a_fork(work) -> int:
    """The exit status of work in another process: 0 if it raised what says who is there."""
    number = os.fork()
    if not number:
        try:
            work()
        except DistillError as error:
            os._exit(0 if f"process {os.getppid()} on" in str(error) and "\n" not in str(error) else 3)
        except BaseException:
            os._exit(4)
        os._exit(5)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


@pytest.mark.parametrize("resume", [False, True])
def test_another_run_in_the_folder_is_told_who_is_there(resume, tmp_path, monkeypatch):
    monkeypatch.setattr(
        distill.training.run_folder, "Checkpoints", lambda folder, _, resume, keep: Checkpoints(folder, 1, resume, keep)
    )
    folder, statuses = tmp_path / "run", []

    def another():
        statuses.append(in_a_fork(lambda: run(folder, Meanwhile(lambda: None), resume=resume)))
        with pytest.raises(DistillError, match=r"is in use by process|is not empty|was started with"):
            run(folder, KD(), resume=resume)

    result = run(folder, Meanwhile(another))
    assert statuses == ([0] if resume else [3])  # without resume the folder is refused as one that is used
    assert [record.step for record in read_log(folder)] == [1, 2, 3, 4]
    assert len(result.records) == 4
    assert not (folder / ".lock").exists()


def test_of_two_that_begin_at_once_one_goes_on(tmp_path):
    """Both have seen an empty folder."""
    folder, statuses = tmp_path / "run", []
    first = distill.training.run_folder.RunFolder(folder, {})
    second = distill.training.run_folder.RunFolder(folder, {})
    with first.hold():
        (folder / "settings.json").touch()
        with pytest.raises(DistillError, match=rf"is in use by process {os.getpid()} on .* since 20.*; wait for it"):
            second.hold().__enter__()
        statuses.append(in_a_fork(lambda: second.hold().__enter__()))
    assert statuses == [0]
    with pytest.raises(DistillError, match="is not empty"):
        second.hold().__enter__()


def test_a_lock_of_a_process_that_was_killed_is_free(tmp_path):
    number = os.fork()
    if not number:
        with locked(tmp_path):
            os._exit(9)
    os.waitpid(number, 0)
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


def test_who_waits_is_told_for_whom_and_comes_after(tmp_path):
    order, said, began = [], [], threading.Event()

    def hold():
        with locked(tmp_path):
            began.set()
            time.sleep(0.3)
            order.append("first")

    thread = threading.Thread(target=hold)
    thread.start()
    began.wait()
    with locked(tmp_path, waiting=said.append):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    assert len(said) == 1
    assert said[0].startswith(f"process {os.getpid()} on ")


def test_a_folder_that_is_claimed_is_nobody_elses(tmp_path):
    make = lambda number: tmp_path / "runs" / f"task-{number}"  # noqa: E731
    taken, together = [], threading.Barrier(8)

    def take():
        together.wait()
        taken.append(claim(make))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in taken) == [f"task-{number}" for number in range(1, 9)]


def test_a_run_that_fails_leaves_no_folder_and_no_lock(tmp_path):
    with pytest.raises(DistillError, match="weights names"):
        fit(spread(mlp()), spread(mlp(), 1), None, vectors(), objective=KD(), weights={"x": 1.0},
            output_dir=tmp_path / "a" / "b", **SETTINGS)  # fmt: skip
    assert not list(tmp_path.iterdir())


TWICE = """
import sys
from rich.console import Console
from distill.teach import teacher_of
from tests.distill.test_teach import task
from tests.distill.tiny_models import weights
teacher = teacher_of(task(), console=Console(width=200))
print(sum(value.double().sum().item() for value in weights(teacher).values()))
"""


@pytest.mark.parametrize(
    "together",
    [pytest.param(False, id="two runs"), pytest.param(True, id="two processes of one run", marks=pytest.mark.full)],
)
def test_two_first_uses_of_an_embedded_teacher_train_it_once(together, tmp_path):
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TWICE],
            env={**environment, "DISTILL_CACHE": str(tmp_path / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in (environments(2) if together else environments(1) * 2)
    ]
    told, errors = zip(*(each.communicate() for each in both), strict=True)
    assert [each.returncode for each in both] == [0, 0], errors
    assert told[0].splitlines()[-1] == told[1].splitlines()[-1]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_teacher_that_another_made_meanwhile_is_taken(tmp_path, monkeypatch):
    from tests.distill.test_teach import task

    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    made, teachers = [], importlib.import_module("distill.teach")
    teach = teachers.teach
    monkeypatch.setattr(teachers, "teach", lambda *args, **kwargs: made.append(1) or teach(*args, **kwargs))
    found, threads = [], []
    task().network(0)  # transformers cannot be imported by two threads at once
    for _ in range(2):
        threads.append(threading.Thread(target=lambda: found.append(teachers.teacher_of(task(), console=QUIET))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert same(weights(found[0]), weights(found[1]))
