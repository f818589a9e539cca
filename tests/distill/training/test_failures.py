"""Whatever ends one process ends all of them, names the first error, and leaves a whole checkpoint to go on from."""

import random

import pytest


def again(groups, folder):
    """The same command, as it is started again after its processes ended: the losses and weights that it ends with."""
    ended = groups.run("fitted", engine="ddp", folder=str(folder), resume="auto", every=2)
    assert [each.status for each in ended] == [0, 0], ended[0].output + ended[1].output
    return ended[0].value["losses"] + ended[0].value["weights"]


@pytest.fixture(scope="module")
def whole(groups, tmp_path_factory):
    """What the command trains when nothing happens to it: in a new folder it starts."""
    return again(groups, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("engine", [pytest.param("fsdp", marks=pytest.mark.full), "ddp"])
def test_an_error_in_one_process_is_named_in_the_other(groups, engine, whole, tmp_path):
    ended = groups.run("fitted", engine=engine, folder=str(tmp_path), trouble=("raise", 1, 4), resume="auto", every=2)
    assert [each.status for each in ended] == [1, 1], ended[0].output + ended[1].output
    assert ended[1].error == "OSError: the disk of this process is gone"
    assert "process 1 failed: OSError: the disk of this process is gone" in ended[0].error
    assert f"the last checkpoint is {tmp_path}/checkpoints/step-0000002" in ended[0].error
    assert again(groups, tmp_path) == (whole if engine == "ddp" else pytest.approx(whole, rel=1e-8))


@pytest.mark.parametrize(("rank", "step"), [(1, 3), pytest.param(0, 5, marks=pytest.mark.full), (0, 1)])
def test_a_process_that_is_killed_ends_the_other(groups, rank, step, whole, tmp_path):
    ended = groups.run("fitted", engine="ddp", folder=str(tmp_path), trouble=("SIGKILL", rank, step), every=2)
    assert {number: each.status for number, each in enumerate(ended)} == {rank: -9, 1 - rank: 1}, ended[1 - rank].output
    assert f"since process {rank} is gone without a word" in ended[1 - rank].error
    assert again(groups, tmp_path) == whole


def test_an_error_of_both_processes_is_that_of_each(groups, tmp_path):
    (tmp_path / "other").touch()
    for ended in groups.run("fitted", engine="ddp", folder=str(tmp_path), resume="auto"):
        assert "holds no run to go on with" in ended.error


def test_one_process_keeps_the_time_of_checkpoints(groups, tmp_path):
    """It is always time; what is agreed on in a step is done after the next."""
    ended = groups.run("fitted", engine="ddp", folder=str(tmp_path), every="0.0001 seconds", trouble=("raise", 0, 5))
    assert [each.status for each in ended] == [1, 1], ended[0].output
    assert sorted(each.name for each in (tmp_path / "checkpoints").iterdir()) == ["step-0000002", "step-0000004"]


@pytest.mark.parametrize("seed", [0, *(pytest.param(each, marks=pytest.mark.full) for each in (1, 2))])
def test_restarts_end_as_the_run_that_nothing_happened_to(groups, whole, seed, tmp_path):
    """Five times something happens to one of two processes at a random step, and the same command is started again."""
    draw = random.Random(seed)
    kinds = ["SIGKILL", "SIGTERM", "raise", "nan", draw.choice(["SIGKILL", "SIGUSR1", "SIGINT"])]
    for kind in draw.sample(kinds, 5):
        trouble = (kind, draw.randrange(2), draw.randint(1, 2))
        ended = groups.run("fitted", engine="ddp", folder=str(tmp_path), resume="auto", every=1, trouble=trouble)
        assert all(each.status for each in ended), (trouble, ended[0].output)
    assert again(groups, tmp_path) == whole
