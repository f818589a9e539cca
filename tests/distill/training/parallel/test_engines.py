"""Engines that are refused, parameters without a gradient, and teachers whose weights accelerate keeps elsewhere."""

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn

from distill import DIITO, KD, DistillError, Schedule, from_layers, steps
from distill.models.inputs import device_of, is_placed
from distill.training.parallel.engines import leaves_some, unused_found
from tests.distill.tiny_models import bert, gpt2_lm, same, spread, text, weights


def losses(teacher: nn.Module, student: nn.Module) -> list[float]:
    rows = text(8, labels=False)
    schedule = Schedule(steps=2, batch_size=4)
    return [each.loss for each in steps(teacher, student, data=rows, objective=[KD(), DIITO()], schedule=schedule)]


@pytest.mark.parametrize("engine", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_engines_with_steps_of_their_own_are_refused_before_the_first(engine, monkeypatch):
    accelerator, teacher, student = Accelerator(cpu=True), spread(bert(2)), spread(bert(1), 1)
    monkeypatch.setattr(type(accelerator), "distributed_type", engine)
    before = weights(student)
    with pytest.raises(DistillError, match=r"is not used here: .*FSDP2 instead: Accelerator\(fsdp_plugin=") as refused:
        next(steps(teacher, student, data=text(8), objective=KD(), accelerator=accelerator))
    assert "\n" not in str(refused.value)
    assert same(before, weights(student))


def test_an_accelerator_that_does_not_know_of_all_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets them
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DistillError, match=r"knows of 1 of 2 processes, .*accelerator=Accelerator\(cpu=True\)"):
        next(steps(bert(2), bert(1), data=text(8), objective=KD(), accelerator=Accelerator(cpu=True)))


def test_parameters_that_a_loss_leaves_out():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    net[0].weight.grad = torch.ones(3, 2)
    assert not leaves_some(net, net(torch.ones(4, 2)).sum())
    assert leaves_some(net, net[0](torch.ones(4, 2)).sum())
    assert leaves_some(net, torch.zeros(()))
    assert all(each.grad is None for each in net.parameters())
    net[1].requires_grad_(False)
    assert not leaves_some(net, net[0](torch.ones(4, 2)).sum())


@pytest.mark.parametrize("given", [None, DistributedDataParallelKwargs(bucket_cap_mb=7)])
def test_settings_of_the_caller_are_as_before(given):
    accelerator = Accelerator(cpu=True, kwargs_handlers=[] if given is None else [given])
    for some in (True, False):
        with unused_found(accelerator, some=some):
            inside = (accelerator.ddp_handler or DistributedDataParallelKwargs()).to_kwargs()
            assert inside.get("find_unused_parameters", False) == some
            assert inside.get("bucket_cap_mb") == (None if given is None else 7)
        assert accelerator.ddp_handler is given
    still = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(static_graph=True)])
    with unused_found(still, some=True):
        assert not still.ddp_handler.find_unused_parameters


PLACED = {
    "cpu_offload": lambda model, folder: cpu_offload(model),
    "disk_offload": lambda model, folder: disk_offload(model, folder),
    "dispatch_model": lambda model, folder: dispatch_model(
        model, {name: "disk" for name, _ in model.named_children()}, "cpu", offload_dir=folder
    ),
}


@pytest.mark.parametrize("place", PLACED)
@pytest.mark.parametrize("make", [bert, pytest.param(gpt2_lm, marks=pytest.mark.full)])
def test_a_teacher_whose_weights_are_elsewhere_teaches_as_it_does_here(make, place, tmp_path):
    teacher, students = spread(make(3)), [spread(make(2), 1) for _ in range(2)]
    expected = losses(teacher, students[0])
    PLACED[place](teacher, tmp_path)
    assert is_placed(teacher)
    assert next(teacher.parameters()).is_meta
    assert device_of(teacher) == torch.device("cpu")
    assert losses(teacher, students[1]) == expected
    assert all(each.is_meta for each in teacher.parameters())
    with pytest.raises(DistillError, match=r"from_layers needs the weights of this .* device 'meta'"):
        from_layers(teacher, 1)
