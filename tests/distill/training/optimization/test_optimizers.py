"""Any optimizer of torch, the parameters that decay, and what a run that is resumed keeps of them."""

from functools import partial

import pytest
import torch

from distill import KD, DistillError, Schedule, fit, steps
from tests.distill.tiny_models import QUIET, gpt2_lm, mlp, same, spread, vectors, weights


class Counting(torch.optim.Optimizer):
    """Steps by its own count of steps, kept as a number of each parameter and of each group."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr, "k": 0})

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for each in group["params"]:
                kept = self.state[each]
                kept["step"] = kept.get("step", 0) + 1
                if each.grad is not None:
                    each.data.sub_(each.grad, alpha=group["lr"] / (kept["step"] + group["k"]))


CHOSEN = [
    torch.optim.NAdam,
    pytest.param(torch.optim.Adafactor, marks=pytest.mark.full),
    pytest.param(torch.optim.RMSprop, marks=pytest.mark.full),
    partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    Counting,
]


@pytest.mark.parametrize("chosen", CHOSEN)
def test_a_resumed_run_with_any_optimizer_is_the_uninterrupted_one(chosen, tmp_path):
    schedule = Schedule(steps=6, batch_size=4, lr=0.01, optimizer=chosen, weight_decay_on="matrices")
    settings = dict(objective=KD(), schedule=schedule, console=QUIET, every=2)
    whole, parts = spread(mlp(), 1), spread(mlp(), 1)
    fit(spread(mlp()), whole, {}, vectors(12), **settings)
    assert not same(weights(whole), weights(spread(mlp(), 1)))

    def fail(record):
        if record.step == 3:
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fit(spread(mlp()), parts, {}, vectors(12), output_dir=tmp_path / "run", callbacks=fail, **settings)
    parts = spread(mlp(), 1)
    result = fit(spread(mlp()), parts, {}, vectors(12), output_dir=tmp_path / "run", resume=True, **settings)
    assert same(weights(parts), weights(whole))
    assert getattr(chosen, "__name__", "partial(SGD") in result.settings["schedule"]["optimizer"]
    other = {**settings, "schedule": Schedule(steps=6, batch_size=4, lr=0.01, weight_decay_on="matrices")}
    with pytest.raises(DistillError, match=r"was started with schedule\.\w+=[^{]* and is resumed with [^{]*$"):
        fit(spread(mlp()), spread(mlp(), 1), {}, vectors(12), output_dir=tmp_path / "run", resume=True, **other)


def test_a_callable_makes_the_steps_of_the_optimizer_itself():
    named, made = spread(mlp(), 1), spread(mlp(), 1)
    for student, chosen in ((named, "adamw"), (made, torch.optim.AdamW)):
        schedule = Schedule(steps=4, batch_size=4, lr=0.01, weight_decay=0.3, optimizer=chosen)
        list(steps(spread(mlp()), student, data=vectors(12), objective=KD(), schedule=schedule))
    for name, weight in weights(named).items():
        assert torch.allclose(weight, weights(made)[name], atol=1e-6)


def test_weight_decay_leaves_biases_and_norms_alone():
    """With a rate of decay and gradients of 0 only matrices shrink: they are the values by hand."""
    student = spread(gpt2_lm(1), 1)
    before = {name: each.clone() for name, each in student.named_parameters()}
    schedule = Schedule(weight_decay=0.5, lr=0.1, optimizer="sgd", weight_decay_on="matrices")
    optimizer = schedule.optimizes([{"params": list(student.parameters()), "scale": 1.0}], student)
    for each in student.parameters():
        each.grad = torch.zeros_like(each)
    optimizer.step()
    for name, each in student.named_parameters():
        stays = "ln_" in name or name.endswith("bias")
        assert torch.allclose(each, before[name] * (1 if stays else 0.95)), name
    assert {group["scale"] for group in optimizer.param_groups} == {1.0}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": 3}, "optimizer must be"),
        ({"weight_decay_on": "weights"}, "weight_decay_on='weights' is none of 'all', 'matrices'"),
        ({"precision": "int8"}, "precision='int8' is none of 'fp32', 'bf16', 'fp16'"),
        ({"precision": "bf16", "param_dtype": "as loaded"}, "keeps the weights in float32"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(DistillError, match=said):
        Schedule(**settings)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (torch.optim.LBFGS, "optimizer=LBFGS (cannot be made|steps only with a closure)"),
        (lambda groups, lr: None, "made NoneType"),
        (lambda groups: None, "cannot be made .TypeError"),
    ],
)
def test_optimizers_that_cannot_be_are_refused_before_the_first_step(chosen, said):
    student = spread(mlp(), 1)
    with pytest.raises(DistillError, match=said):
        next(steps(spread(mlp()), student, data=vectors(8), objective=KD(), schedule=Schedule(optimizer=chosen)))
    assert same(weights(student), weights(spread(mlp(), 1)))
