import pytest
import torch
from accelerate import Accelerator

from distill import KD, Schedule, steps
from distill.training.optimization import updates
from tests.distill.tiny_models import bert, spread, text, weights


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_the_calls_of_torch_have_the_bits_of_those_of_accelerate(monkeypatch, clip):
    schedule = Schedule(steps=4, batch_size=4, lr=1e-2, clip=clip, accumulate=2)
    found = []
    for plain in (True, False):
        if not plain:
            monkeypatch.setattr(updates, "is_plain", lambda accelerator: False)
        student = spread(bert(2), 1)
        records = list(steps(spread(bert(2)), student, data=text(8), objective=KD(), schedule=schedule))
        found.append((records, weights(student)))
    (records, own), (other_records, other) = found
    assert records == other_records
    assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize("ends", ["whole", "early", "by an error"])
def test_an_accelerator_knows_afterwards_what_it_knew_before(ends):
    accelerator = Accelerator()
    before = accelerator.prepare(torch.nn.Linear(2, 2), torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))]))
    training = steps(
        spread(bert(2)), spread(bert(2), 1), data=text(8), objective=KD(), accelerator=accelerator,
        schedule=Schedule(steps=3, batch_size=4, lr=1e-2),
    )  # fmt: skip
    next(training)
    assert len(accelerator._models) == 2
    if ends == "whole":
        list(training)
    elif ends == "early":
        training.close()
    else:
        with pytest.raises(OSError, match="gone"):
            training.throw(OSError("gone"))
    assert [*accelerator._models, *accelerator._optimizers] == list(before)
