"""The state of a training goes on with another number of processes; what is not whole is no checkpoint."""

import pytest
import torch

from distill.errors import DistillError
from distill.training.parallel.states import load_state, save_state
from tests.distill.tiny_models import gpt2_lm, mlp, same, weights
from tests.distill.training.test_checkpoints import prepared, train


def run(groups, processes, **settings):
    ended = groups.run("fitted", processes, **settings)
    assert all(each.value == ended[0].value for each in ended)
    return ended


@pytest.mark.parametrize(
    "engines", [("ddp", "ddp"), pytest.param(("fsdp", "ddp"), marks=pytest.mark.full), ("fsdp", "fsdp")]
)
def test_two_processes_then_one_then_two(groups, engines, tmp_path):
    """Stopped by a signal twice; each training goes on where the one before ended."""
    whole = run(groups, 2, engine="ddp", folder=str(tmp_path / "whole"))[0].value
    stopped = {"folder": str(tmp_path / "parts")}
    first = run(groups, 2, engine=engines[0], trouble=("SIGTERM", 1, 2), **stopped)
    assert "stopped after step 2 of 8" in first[0].error, first[0].output
    second = run(groups, 1, engine="ddp", trouble=("SIGUSR1", 0, 3), resume=True, **stopped)
    assert "stopped after step 5 of 8" in second[0].error, second[0].output
    third = run(groups, 2, engine=engines[1], resume=True, **stopped)
    assert [each.status for each in third] == [0, 0], third[0].output
    assert third[0].value["losses"] == pytest.approx(whole["losses"], rel=1e-9)
    assert third[0].value["weights"] == pytest.approx(whole["weights"], rel=1e-9)


def test_a_state_holds_numbers_alone_and_tied_weights_once(tmp_path, recwarn):
    model, optimizer, _, accelerator = prepared(tmp_path, gpt2_lm(2))
    model(torch.ones(2, 3, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    save_state(accelerator, tmp_path, 3)
    assert {each.suffix for each in tmp_path.iterdir()} == {".safetensors"}
    other, others, _, accelerator = prepared(tmp_path, gpt2_lm(2))
    load_state(accelerator, tmp_path)
    assert same(weights(model), weights(other))
    assert other.lm_head.weight is other.transformer.wte.weight
    moments, found = (each.optimizer.state_dict()["state"] for each in (optimizer, others))
    assert moments.keys() == found.keys()
    assert len(moments) == len(list(model.parameters()))
    assert all(torch.equal(value, found[number][name]) for number in moments for name, value in moments[number].items())
    assert not recwarn.list


def test_a_parameter_without_a_gradient_has_no_state(tmp_path):
    model, optimizer, _, accelerator = prepared(tmp_path)
    model[0](torch.ones(2, 6)).sum().backward()
    optimizer.step()
    save_state(accelerator, tmp_path, 1)
    _, others, _, accelerator = prepared(tmp_path)
    load_state(accelerator, tmp_path)
    assert others.optimizer.state_dict()["state"].keys() == optimizer.optimizer.state_dict()["state"].keys()


def test_the_state_of_another_model_is_refused(tmp_path):
    *_, accelerator = prepared(tmp_path, mlp())
    save_state(accelerator, tmp_path / "step-1" / "state", 1)
    *_, accelerator = prepared(tmp_path, mlp(9))
    with pytest.raises(DistillError, match=r"step-1 does not fit .*0.weight is \[9, 6\] here, and it holds \[8, 6\]"):
        load_state(accelerator, tmp_path / "step-1" / "state")


def test_a_checkpoint_that_accelerate_wrote_still_loads(tmp_path):
    model, optimizer, _, accelerator = prepared(tmp_path)
    train(model, optimizer)
    accelerator.save_state(str(tmp_path / "step-0000001"))
    other, _, checkpoints, accelerator = prepared(tmp_path, resume=True)
    with pytest.warns(UserWarning, match="written by an earlier version, without checksums"):
        assert checkpoints.begin(accelerator) == 1
    assert same(weights(model), weights(other))


def test_a_checkpoint_is_one_when_it_says_that_it_is_complete(tmp_path):
    model, optimizer, checkpoints, accelerator = prepared(tmp_path)
    checkpoints.begin(accelerator)
    for step in (1, 2):
        train(model, optimizer)
        saved = checkpoints.save(step)
    (saved / "complete").unlink()
    assert checkpoints.last() == tmp_path / "step-0000001"
    *_, checkpoints, accelerator = prepared(tmp_path, resume=True)
    assert checkpoints.begin(accelerator) == 1
    assert checkpoints.save(2) == saved
    assert checkpoints.last() == saved
