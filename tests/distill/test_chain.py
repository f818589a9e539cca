import json
from typing import ClassVar

import pytest
import torch

from distill import (
    DIITO,
    KD,
    DistillError,
    FitNets,
    Interrupted,
    Labels,
    Objective,
    Schedule,
    Task,
    accuracy,
    chain,
    fit,
    from_layers,
)
from distill.evaluation import measurement
from distill.tasks import Rows
from interventions import Location
from tests.distill.tiny_models import CLASSES, QUIET, bert, mlp, same, spread, text, vectors, weights

SHORT = Schedule(steps=5, batch_size=5, lr=1e-2)


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch):
    """Measured on 60 pairs instead of 2000, to be quick."""
    monkeypatch.setattr(measurement, "MOST_PAIRS", 60)


def models(dropout=0.2):
    teacher = spread(bert(4, dropout=dropout))
    return teacher, from_layers(teacher, 3), from_layers(teacher, 2)


@pytest.mark.parametrize("objective", [None, [KD(3.0), Labels()], [KD(), DIITO()]])
def test_a_chain_of_two_is_one_fit_bit_for_bit(objective, tmp_path):
    teacher, _, student = models()
    settings = dict(objective=objective, schedule=SHORT, eval_data=text(seed=1), console=QUIET)
    one = fit(teacher, student, data=text(), output_dir=tmp_path / "fit", **settings)
    _, _, again = models()
    (only,) = chain([teacher, again], data=text(), output_dir=tmp_path / "chain", **settings)
    assert only.records == one.records
    assert same(weights(student), weights(again))
    assert only.evaluation.to_dict() == one.evaluation.to_dict()
    assert only.output_dir == tmp_path / "chain" / "1"


def test_each_student_teaches_the_next_and_is_left_as_it_was():
    teacher, assistant, student = models()
    before = weights(teacher)
    results = chain([teacher, assistant, student], data=text(), objective=KD(), schedule=SHORT, console=QUIET)
    assert same(before, weights(teacher))
    assert [result.student for result in results] == [assistant, student]
    _, first, second = models()
    one = fit(teacher, first, data=text(), objective=KD(), schedule=SHORT, console=QUIET)
    assert same(weights(first), weights(assistant))  # as after its own step
    two = fit(first, second, data=text(), objective=KD(), schedule=SHORT, console=QUIET)
    assert (one.records, two.records) == (results[0].records, results[1].records)
    assert same(weights(second), weights(student))
    _, _, direct = models()
    assert fit(teacher, direct, data=text(), objective=KD(), schedule=SHORT, console=QUIET).records != two.records


def test_schedules_and_mappings_of_each_step():
    schedules = [SHORT, Schedule(steps=2, batch_size=8, lr=1e-3)]
    mappings = ["late", {Location(1): Location(0)}]
    results = chain(models(), data=text(), mapping=mappings, schedule=schedules, console=QUIET)
    assert [len(result.records) for result in results] == [5, 2]
    assert [len(result.settings["mapping"]) for result in results] == [2, 1]
    assert results[1].settings["schedule"]["lr"] == 1e-3


def test_projections_are_made_for_each_step():
    objective = FitNets({Location(module="2"): Location(module="2")})
    networks = [spread(mlp(width), seed) for seed, width in enumerate((10, 8, 6))]
    results = chain(networks, data=vectors(), objective=objective, schedule=SHORT, console=QUIET)
    assert all(result.records[-1].terms["hint"] > 0 for result in results)
    assert not list(objective.parameters())  # the caller's is not used


class Stopping(Objective):
    """KD during which somebody presses Ctrl-C, once."""

    pressed: ClassVar[list[int]] = []

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, step):
        self.calls += torch.is_grad_enabled()
        if self.calls == self.at and not self.pressed:
            import os
            import signal

            self.pressed.append(1)
            os.kill(os.getpid(), signal.SIGINT)
        return KD()(step)

    def extra_repr(self):
        return "like KD"


def test_resumed_in_the_second_step_as_if_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(Stopping, "pressed", [1])
    _, *whole = networks = models()
    schedules = [Schedule(steps=3, batch_size=5), Schedule(steps=6, batch_size=5)]
    expected = chain(networks, data=text(), objective=Stopping(5), schedule=schedules, console=QUIET)
    monkeypatch.setattr(Stopping, "pressed", [])
    settings = dict(objective=Stopping(5), schedule=schedules, console=QUIET, output_dir=tmp_path / "run")
    with pytest.raises(Interrupted, match=r"stopped after step 5 of 6; .*run/2/.*resume=True"):
        chain(models(), data=text(), **settings)
    torch.rand(5)
    _, *again = networks = models()
    results = chain(networks, data=text(), resume=True, **settings)
    assert [result.records for result in results] == [result.records for result in expected]
    assert all(same(weights(a), weights(b)) for a, b in zip(whole, again, strict=True))
    assert json.loads((tmp_path / "run" / "2" / "result.json").read_text())["steps"] == 6


def test_a_task_is_measured_after_each_step():
    task = Task("t", text(), text(12, seed=1), tuple("abc"[:CLASSES]))
    results = chain(models(0.0), data=task, objective=KD(), schedule=SHORT, console=QUIET)
    assert [result.accuracy for result in results] == [accuracy(r.student, task.test).value for r in results]


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ([mlp()], {}, r"chain has 1 network; give a teacher and a student"),
        ([], {}, r"chain has 0 networks"),
        ([mlp(), "student"], {}, r"chain was given str, which is no network"),
        ([mlp(), mlp()], {"schedule": [SHORT, SHORT]}, r"schedule is a list of 2 and the chain has 1 step; give one"),
        ([mlp(), mlp(), mlp()], {"mapping": ["full"]}, r"mapping is a list of 1 and the chain has 2 steps"),
        ([mlp(), mlp()], {"resume": True}, r"resume=True needs the folder"),
    ],
)
def test_what_is_no_chain(given, settings, message):
    with pytest.raises(DistillError, match=message):
        chain(given, data=vectors(), **settings)


def test_a_network_does_not_teach_itself():
    network = mlp()
    with pytest.raises(DistillError, match="one network twice, which would teach itself"):
        chain([network, mlp(), network], data=Rows.of(vectors()))


def test_the_answers_of_each_teacher_are_kept_in_a_folder_of_their_own(tmp_path):
    settings = dict(mapping={}, data=text(), objective=KD(), schedule=SHORT, console=QUIET)
    live = chain(models(), **settings)
    kept = chain(models(), cache=tmp_path / "answers", **settings)
    assert sorted(each.name for each in (tmp_path / "answers").iterdir()) == ["1", "2"]
    for one, other in zip(live, kept, strict=True):
        assert [each.loss for each in one.records] == pytest.approx([each.loss for each in other.records], rel=1e-5)
