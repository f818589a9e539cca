"""A training step waits for no accelerator, but where its losses are read."""

from collections import Counter

import pytest
import torch

from distill import CRD, DIITO, IIT, KD, Crossway, FitNets, InContext, Labels, Objective, Schedule, Span, steps
from interventions import Location, Mixup, Noise
from tests.device_waits import DeviceWaits, counting, waits_of_steps
from tests.distill.tiny_models import bert, gpt2_lm, llama, masked_lm, spread, text
from tests.distill.wired import SUM, Wired

SHORT = Schedule(steps=6, batch_size=6, lr=1e-3)
MODELS = {"bert": bert, "gpt2": gpt2_lm, "llama": llama, "masked": masked_lm}
OBJECTIVES = {
    "KD": lambda: [KD(2.0)],
    "Labels": lambda: [KD(), Labels()],
    "DIITO": lambda: [KD(), DIITO(positions=Span(0.3))],
    "DIITO, scattered": lambda: [DIITO(positions=Span(0.5, consecutive=False))],
    "DIITO, all positions": lambda: [DIITO(positions=None, vacuous="keep")],
    "DIITO, both directions": lambda: [DIITO(Crossway())],
    "DIITO, in context": lambda: [KD(), DIITO(InContext(0.3))],
    "DIITO, mixup": lambda: [KD(), DIITO(op=Mixup(0.5))],
    "DIITO, noise": lambda: [KD(), DIITO(op=Noise(0.1))],
    "DIITO, two pairs": lambda: [DIITO(pairs_per_step=2)],
    "FitNets": lambda: [KD(), FitNets()],
    "CRD": lambda: [CRD(8, 16)],
}


def waits(family: str, chosen: list[Objective], schedule: Schedule = SHORT) -> list[Counter[str]]:
    make = MODELS[family]
    teacher, student = spread(make(4)), spread(make(2), 1)
    rows = text(24, labels=True) if family == "bert" else text(24, labels=False)
    records = steps(teacher, student, data=rows, objective=chosen, schedule=schedule)
    found = waits_of_steps(records, lambda: [teacher, student, *chosen])
    records.close()
    return found


def labelled(name: str, family: str) -> bool:
    return name != "Labels" or family == "bert"


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, family) for name in OBJECTIVES for family in MODELS if labelled(name, family)],
)
def test_no_step_waits(name, family):
    assert waits(family, OBJECTIVES[name]()) == [Counter(), Counter()]


@pytest.mark.parametrize(
    "changed",
    [
        {"accumulate": 3},
        {"clip": None},
        {"optimizer": "sgd", "decay": "cosine"},
        {"optimizer": "adam", "decay": (0.5,), "warmup": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["KD", "DIITO"])
def test_no_step_waits_under_any_schedule(name, changed):
    from dataclasses import replace

    assert waits("gpt2", OBJECTIVES[name](), replace(SHORT, **changed)) == [Counter(), Counter()]


def test_no_step_of_interchange_intervention_training_waits():
    network, chosen = Wired(), [IIT()]
    mapping = {"inner": Location(module="hidden", dims=0)}
    records = steps(SUM, network, mapping, objective=chosen, schedule=SHORT)
    found = waits_of_steps(records, lambda: [network])
    assert all(sum(each.values()) <= 1 for each in found)  # inputs of a batch are searched for values out of domain
    records.close()


class Reads(Objective):
    """An objective that reads a number of the device in each step."""

    def forward(self, step):
        value = step.student.logits.square().mean()
        return {"reads": value * float(value.detach() > 0)}


def test_an_objective_that_waits_is_seen():
    found = waits("gpt2", [Reads()])
    assert [sum(each.values()) for each in found] == [1, 1]
    assert all("forward" in place for each in found for place in each)


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: bool(tensor.any()),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: (tensor > 0).nonzero(),
        lambda tensor: torch.equal(tensor, tensor.clone()),
        lambda tensor: tensor.unique(),
        lambda tensor: tensor.masked_select(tensor > 0),
        lambda tensor: torch.arange(3).repeat_interleave(tensor),
    ],
)
def test_the_counter_sees_what_waits(read):
    there, here, seen = torch.tensor([1, 2, 0]), torch.tensor([1, 2, 0]), DeviceWaits()
    seen.put(there)
    with counting(seen):
        read(here)
        assert not seen.places
        read(there)
        assert len(seen.places) == 1
        seen.places.clear()
        read(here + there)  # what is computed from it
        assert len(seen.places) == 1


@pytest.mark.parametrize(
    "compute",
    [
        lambda tensor: torch.where(tensor > 0, tensor, 0),
        lambda tensor: tensor.masked_fill(tensor > 0, 7),
        lambda tensor: tensor.cumsum(0).argsort(),
        lambda tensor: torch.arange(3).repeat_interleave(tensor, output_size=3),
        lambda tensor: tensor.shape[0],
    ],
)
def test_the_counter_leaves_what_does_not_wait(compute):
    there, seen = torch.tensor([1, 2, 0]), DeviceWaits()
    seen.put(there)
    with counting(seen):
        compute(there)
    assert not seen.places


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["KD", "DIITO"])
def test_no_step_waits_on_a_gpu(name):
    teacher, student = spread(gpt2_lm(4)), spread(gpt2_lm(2), 1)
    records = steps(teacher, student, data=text(24, labels=False), objective=OBJECTIVES[name](), schedule=SHORT)
    next(records)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(records)
    finally:
        torch.cuda.set_sync_debug_mode("default")
