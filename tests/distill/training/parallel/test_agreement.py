"""Several processes agree on what they must share, whatever the engine."""

import re

import pytest


def values(groups, engine, objective, **settings):
    """The terms of all steps of a training in two processes, which both of them know alike."""
    ended = groups.run("train", engine=engine, objective=objective, **settings)
    assert [each.error for each in ended] == ["", ""], ended[0].output + ended[1].output
    assert [each.status for each in ended] == [0, 0], ended[0].output + ended[1].output
    assert ended[0].value == ended[1].value
    return ended[0].value


@pytest.mark.parametrize(
    ("objective", "model"),
    [
        ("diito", "bert"),
        pytest.param("crossway", "bert", marks=pytest.mark.full),
        pytest.param("kinds", "bert", marks=pytest.mark.full),
        pytest.param("mixup", "gpt2", marks=pytest.mark.full),
        pytest.param("fitnets", "bert", marks=pytest.mark.full),
        pytest.param("pkd", "bert", marks=pytest.mark.full),
        pytest.param("kd", "gpt2", marks=pytest.mark.full),
        pytest.param("inner", "bert", marks=pytest.mark.full),
        pytest.param("in context", "gpt2", marks=pytest.mark.full),
        ("inner context", "bert"),
    ],
)
def test_sharded_weights_train_as_whole_ones(groups, objective, model):
    """In float64; the blocks of an entry of the mapping wait for those of the other process."""
    whole = values(groups, "ddp", objective, model=model)
    sharded = values(groups, "fsdp", objective, model=model)
    assert len(whole) == len(sharded) == 4
    for one, other in zip(whole, sharded, strict=True):
        assert one == pytest.approx(other, rel=1e-12)


def test_processes_without_an_accelerator_train_together(groups):
    """Also where there is no GPU, and nothing told accelerate to use the CPU."""
    assert values(groups, "default", "diito") == values(groups, "ddp", "diito")


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_in_one_process_ends_both(groups, engine, tmp_path):
    ended = groups.run("fitted", engine=engine, folder=str(tmp_path), trouble=("nan", 1, 4), every=2)
    assert [each.status for each in ended] == [1, 1], ended[0].output
    assert ended[0].error == ended[1].error
    assert "the loss is nan at step 4" in ended[0].error
    assert f"the last good checkpoint is {tmp_path}/checkpoints/step-0000002" in ended[0].error


@pytest.mark.parametrize(("rank", "signals"), [(0, "SIGINT"), (1, "SIGINT SIGINT")])
def test_a_signal_to_one_process_stops_both_after_the_same_step(groups, rank, signals, tmp_path):
    """Ctrl-C comes twice: from the terminal, and from torchrun, which passes it on."""
    ended = groups.run("fitted", engine="ddp", folder=str(tmp_path), trouble=(signals, rank, 3))
    assert [each.status for each in ended] == [1, 1], ended[0].output
    assert ended[0].error == ended[1].error
    assert ended[0].error.startswith("Interrupted: stopped after step 3 of 8; the state is in")
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("engine", "what", "named"),
    [
        ("fsdp", "student", "another student"),
        pytest.param("ddp", "teacher", "another teacher", marks=pytest.mark.full),
        pytest.param(
            "ddp", "rows", r"another number of rows than process 0 \(14 instead of 15\)", marks=pytest.mark.full
        ),
        pytest.param("ddp", "steps", r"another Schedule\(steps=\) than .* \(3 instead of 2\)", marks=pytest.mark.full),
        ("ddp", "seed", r"another Schedule\(seed=\) than process 0 \(1 instead of 0\)"),
    ],
)
def test_what_differs_between_processes_is_refused_in_both(groups, engine, what, named):
    """Each would train on, or wait for ever: the student would be a mixture of two."""
    ended = groups.run("different", engine=engine, what=what)
    assert [each.status for each in ended] == [1, 1], ended[0].output
    assert ended[0].error == ended[1].error
    assert re.search(f"all processes of a training need the same, and process 1 has {named}", ended[0].error)
    assert "\n" not in ended[0].error


def test_under_ddp_the_student_of_the_first_process_is_that_of_all(groups):
    ended = groups.run("different", engine="ddp", what="student")
    assert [each.error for each in ended] == ["", ""], ended[0].output
    assert ended[0].value == ended[1].value
