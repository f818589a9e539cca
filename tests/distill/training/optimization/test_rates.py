"""Learning rates by name are those of transformers at each step; a function multiplies them."""

import pytest
import torch
from transformers import get_scheduler

from distill import DistillError, Schedule


@pytest.mark.parametrize("name", ["cosine_with_restarts", "polynomial", "inverse_sqrt", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_rates_by_name_are_those_of_transformers(name, warmup):
    schedule = Schedule(lr=0.5, decay=name, warmup=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=round(warmup * 20), num_training_steps=20)
    for step in range(20):
        assert schedule.rate(step, 20) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_a_function_of_the_share_that_is_done():
    schedule = Schedule(lr=2.0, decay=lambda share: 1 - share, warmup=0.5)
    assert [schedule.rate(step, 4) for step in range(4)] == [1.0, 1.5, 1.0, 0.5]
    with pytest.raises(DistillError, match=r"gave -1 at 0.5 of the training"):
        Schedule(decay=lambda share: -1).rate(2, 4)


@pytest.mark.parametrize(
    ("decay", "said"),
    [
        ("linaer", "decay='linaer' is none of linear, cosine, constant, cosine_with_restarts"),
        ("reduce_lr_on_plateau", "follows a figure and not the step"),
        ("cosine_with_min_lr", "needs settings of its own"),
    ],
)
def test_other_names_are_refused(decay, said):
    with pytest.raises(DistillError, match=said):
        Schedule(decay=decay)
