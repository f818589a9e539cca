import json
import math
import pickle
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from distill import KD, DistillError, Labels, Objective, Record, Schedule, fit, steps
from distill.training import gradients, loop
from distill.training.checkpoints import Checkpoints
from distill.training.pending import Pending, steps_between_looks
from tests.distill.tiny_models import QUIET, mlp, spread, vectors

SHORT = Schedule(steps=7, batch_size=4, lr=1e-2)


class Bad(Objective):
    """Not a number at one training step."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, step):
        self.calls += self.training
        value = step.student.logits.square().mean()
        return {"bad": value * (math.nan if self.calls == self.at else 1)}


@pytest.fixture
def looks(monkeypatch):
    """Let losses be read after every third step only, as on an accelerator."""
    read_every_third(monkeypatch)


def read_every_third(monkeypatch):
    for part in (loop, gradients):
        monkeypatch.setattr(part, "steps_between_looks", lambda device: 3)


def records_of(objective=None, schedule=SHORT, **more):
    made = [KD(), Labels()] if objective is None else objective
    return steps(spread(mlp()), spread(mlp(), 1), data=vectors(8), objective=made, schedule=schedule, **more)


def test_records_that_are_read_late_are_those_that_are_read_at_once(monkeypatch):
    at_once = list(records_of())
    read_every_third(monkeypatch)
    assert list(records_of()) == at_once
    in_parts = replace(SHORT, accumulate=2)
    late = list(records_of(schedule=in_parts))
    monkeypatch.undo()
    assert late == list(records_of(schedule=in_parts))


def test_losses_are_read_every_few_steps_and_at_the_end(looks):
    known = [record.is_known for record in records_of()]
    assert known == [False, False, True, False, False, True, True]


def test_to_read_one_fetches_all_that_wait(looks):
    records = records_of()
    first, second = next(records), next(records)
    assert not first.is_known
    assert not second.is_known
    assert second.loss == pytest.approx(sum(second.terms.values()))
    assert first.is_known


@pytest.mark.parametrize(("at", "told"), [(1, 3), (2, 3), (3, 3), (4, 6), (7, 7)])
def test_a_loss_that_is_no_number_is_told_at_the_next_look(looks, at, told):
    seen = []
    with pytest.raises(DistillError, match=rf"the loss is nan at step {at} \(bad=nan\); no checkpoint was saved yet"):
        seen.extend(records_of(Bad(at)))
    assert len(seen) == told - 1


def test_it_is_told_before_a_checkpoint_is_written(looks, tmp_path):
    checkpoints = Checkpoints(tmp_path, every=2)
    with pytest.raises(DistillError, match=r"nan at step 4 \(bad=nan\); the last good checkpoint is .*step-0000002"):
        list(records_of(Bad(4), checkpoints=checkpoints))
    assert [each.name for each in tmp_path.iterdir()] == ["step-0000002"]


def test_the_log_of_a_folder_has_every_step(looks, tmp_path):
    data, schedule = vectors(8), SHORT
    result = fit(
        spread(mlp()), spread(mlp(), 1), {}, data, schedule=schedule, output_dir=tmp_path / "run", console=QUIET
    )
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record.to_dict() for record in result.records]
    assert len(lines) == 7


def test_a_pending_record_is_a_record():
    def made() -> tuple[Pending, Record]:
        pending = Pending()
        return pending, pending.add(1, 2, torch.tensor(1.5), {"kd": torch.tensor(0.5, dtype=torch.float64)}, lr=0.1)

    whole = Record(1, 2, 1.5, {"kd": 0.5}, 0.1)
    assert made()[1] == whole
    assert repr(made()[1]) == repr(whole)
    assert asdict(made()[1]) == asdict(whole)
    assert pickle.loads(pickle.dumps(made()[1])) == whole
    assert replace(made()[1], step=2) == replace(whole, step=2)
    pending, record = made()
    with pytest.raises(AttributeError, match="'Record' object has no attribute 'losses'"):
        record.losses  # noqa: B018
    pending.look()
    assert vars(record) == vars(whole)


def test_what_is_pending_is_fetched_by_one_transfer(monkeypatch):
    asked = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: asked.append(self.shape) or tolist(self))
    told = []
    pending = Pending(report=told.append)
    made = [pending.add(n, 3, torch.tensor(float(n)), {"a": torch.tensor(1.0)}, lr=1.0) for n in (1, 2, 3)]
    pending.look()
    assert asked == [(6,)]
    assert told == made
    assert [record.loss for record in made] == [1.0, 2.0, 3.0]


def test_a_cpu_is_asked_in_every_step():
    assert steps_between_looks(torch.device("cpu")) == 1
    assert steps_between_looks(torch.device("cuda")) > 1
