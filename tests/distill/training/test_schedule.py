import json
from dataclasses import asdict

import pytest
import torch

from distill import KD, DistillError, Labels, Ramp, Schedule, fit, steps
from distill.training.schedule import drawing, shared_generator, weigh
from tests.distill.tiny_models import QUIET, mlp, same, spread, vectors, weights


def test_decays_by_hand():
    rates = lambda **how: [Schedule(lr=1.0, warmup=0, **how).rate(step, 8) for step in range(8)]  # noqa: E731
    assert rates(decay="constant") == [1.0] * 8
    assert rates(decay=(0.5, 0.75)) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    cosine = rates(decay="cosine")
    assert cosine[0] == 1.0
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[4] == pytest.approx((1 - torch.cos(torch.tensor(torch.pi * 4 / 7)).item()) / 2)
    assert Schedule(lr=1.0, warmup=0.5, decay="constant").rate(0, 8) == 0.25


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"decay": "step"}, "decay='step' is none of linear, cosine, constant"),
        ({"decay": (150.0, 180.0)}, "must be shares of the training"),
        ({"optimizer": "lion"}, "optimizer='lion' is none of adamw, adam, sgd"),
    ],
)
def test_what_a_schedule_does_not_know(wrong, message):
    with pytest.raises(DistillError, match=message):
        Schedule(**wrong)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_optimizers_are_torchs(name):
    """Two steps on all rows at once, against a loop of one's own."""
    student, own, data = spread(mlp()), spread(mlp()), vectors(8)
    schedule = Schedule(
        steps=2, batch_size=8, lr=0.05, warmup=0, decay="constant", optimizer=name, weight_decay=0.1, clip=None
    )
    list(steps(None, student, data=data, objective=Labels(), schedule=schedule))
    made = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
        "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1, momentum=0.9),
    }
    optimizer = made[name](own.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(own(data.table["inputs"]), data.table["labels"]).backward()
        optimizer.step()
    for a, b in zip(student.parameters(), own.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_ramp_by_hand():
    ramp = Ramp(4.0, 1.0)
    assert [ramp(share) for share in (0.0, 0.5, 1.0)] == [4.0, 2.5, 1.0]
    assert [Ramp(2.0, 0.0, until=0.75)(share) for share in (0.0, 0.375, 0.75, 1.0)] == [2.0, 1.0, 0.0, 0.0]
    with pytest.raises(DistillError, match=r"Ramp\(until=0\) is no share"):
        Ramp(1.0, 0.0, until=0)


def test_weights_that_change_are_those_of_the_moment():
    teacher, student = spread(mlp()), spread(mlp(), 1)
    schedule = Schedule(steps=4, batch_size=12)
    records = list(
        steps(teacher, student, data=vectors(24), objective=[KD(), Labels()], schedule=schedule,
              weights={"kd": Ramp(4.0, 0.0), "labels": 0.5})
    )  # fmt: skip
    for number, record in enumerate(records):
        share = 4.0 * (1 - number / 4)
        expected = share * record.terms["kd"] + 0.5 * record.terms["labels"]
        assert record.loss == pytest.approx(expected, rel=1e-6)


def test_weights_are_ones_own_then_the_methods_then_1():
    terms = {"a": torch.tensor(1.0), "b": torch.tensor(10.0), "c": torch.tensor(100.0)}
    assert weigh(terms, {"a": 3.0}, default={"a": 7.0, "b": 2.0}).item() == 123.0
    with pytest.raises(DistillError, match="weights names 'd' and the terms are a, b, c"):
        weigh(terms, {"d": 1.0})
    assert weigh(terms, {"d": 1.0}, left_out=["d"]).item() == 111.0


def test_a_schedule_is_resumed_from_its_file(tmp_path):
    """What JSON makes of a tuple is no other schedule."""
    schedule = Schedule(steps=2, batch_size=12, decay=(0.5,))
    settings = {"objective": KD(), "weights": {"kd": Ramp(2.0, 1.0)}, "schedule": schedule, "console": QUIET}
    teacher, student = spread(mlp()), spread(mlp(), 1)
    fit(teacher, student, data=vectors(), output_dir=tmp_path / "run", **settings)
    told = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert told["schedule"] == json.loads(json.dumps(asdict(schedule)))
    assert told["weights"] == {"kd": "Ramp(start=2.0, end=1.0, until=1.0)"}
    trained = weights(student)
    settings["schedule"] = Schedule(steps=2, batch_size=12, decay=(0.6,))
    with pytest.raises(DistillError, match=r"was started with schedule\."):
        fit(teacher, student, data=vectors(), output_dir=tmp_path / "run", resume=True, **settings)
    assert same(trained, weights(student))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_an_optimizer_without_loops_in_python_has_the_bits_of_one_with_them(name):
    ways = []
    for small in (True, False):
        student = spread(mlp(), 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("distill.training.optimization.optimizers.SMALL", 2**19 if small else 0)
            schedule = Schedule(steps=5, batch_size=4, lr=1e-2, optimizer=name)
            optimizer = schedule.optimizes([{"params": student.parameters()}])
            assert bool(optimizer.defaults["foreach"]) is small
            list(steps(spread(mlp()), student, data=vectors(8), objective=KD(), schedule=schedule))
        ways.append(weights(student))
    assert same(*ways)


def test_what_processes_share_is_drawn_as_one_process_draws_it_first():
    """Without a rank: each process makes the same generator, and draws of its own from another one."""
    cpu, drawn = torch.device("cpu"), []
    for process in range(2):
        with drawing(3, 5, cpu, process) as own:
            drawn.append(torch.randint(2**62, (4,), generator=own).tolist())
    shared = torch.randint(2**62, (4,), generator=shared_generator(3, 5, cpu)).tolist()
    assert shared == drawn[0] != drawn[1]
    assert shared != torch.randint(2**62, (4,), generator=shared_generator(3, 6, cpu)).tolist()
