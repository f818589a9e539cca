"""Half precision keeps the weights in float32; activations that are computed again change no result."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from distill import DIITO, KD, DistillError, Schedule, steps
from tests.distill.tiny_models import bert, gpt2_lm, llama, mlp, same, spread, text, vectors, weights


def hooks_of(model):
    """The number of hooks on a model."""
    registries = (each for module in model.modules() for each in vars(module).items())
    return sum(len(hooks) for name, hooks in registries if name.endswith("_hooks"))


def losses(student, teacher, objective, mapping=None, rows=None, accelerator=None, **settings):
    schedule = Schedule(steps=3, batch_size=4, lr=0.01, **settings)
    rows = text(8, labels=False) if rows is None else rows
    found = steps(teacher, student, mapping, rows, objective=objective, schedule=schedule, accelerator=accelerator)
    return [each.loss for each in found]


@pytest.mark.parametrize(
    ("make", "objectives", "mapping", "bound"),
    [
        (gpt2_lm, [KD()], None, 0),
        pytest.param(llama, [KD()], None, 0, marks=pytest.mark.full),
        pytest.param(bert, [KD(), DIITO()], "full", 3.3e-7, marks=pytest.mark.full),
        (gpt2_lm, [KD(), DIITO()], "full", 3.3e-7),
    ],
)
def test_activations_that_are_computed_again_change_nothing(make, objectives, mapping, bound):
    teacher, plain, again = spread(make(4)), spread(make(2), 1), spread(make(2), 1)
    before, hooks = [set(vars(each)) for each in again.modules()], hooks_of(again)
    expected = losses(plain, teacher, objectives, mapping)
    found = losses(again, teacher, objectives, mapping, gradient_checkpointing=True)
    assert found == pytest.approx(expected, abs=bound or 1e-12)
    for name, weight in weights(plain).items():
        assert float((weight - weights(again)[name]).abs().max()) <= max(bound, 1e-12) * 10
    assert not any(vars(each).get("gradient_checkpointing") for each in again.modules())
    assert ([set(vars(each)) for each in again.modules()], hooks_of(again)) == (before, hooks)


def test_blocks_run_twice_where_activations_are_computed_again():
    counts = []
    for again in (False, True):
        student, runs = spread(gpt2_lm(2), 1), []
        student.transformer.h[0].mlp.register_forward_pre_hook(lambda *args, runs=runs: runs.append(1))
        losses(student, spread(gpt2_lm(4)), [KD()], gradient_checkpointing=again)
        counts.append(len(runs))
    assert counts[1] == counts[0] + 3


def test_bf16_computes_in_bf16_with_weights_in_float32_and_is_forgotten_afterwards():
    Accelerator(cpu=True)
    before = dict(AcceleratorState._shared_state)
    teacher, plain, half = spread(gpt2_lm(4)), spread(gpt2_lm(2), 1), spread(gpt2_lm(2), 1)
    expected = losses(plain, teacher, [KD()])
    seen = set()
    half.transformer.h[0].mlp.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    found = losses(half, teacher, [KD()], precision="bf16")
    assert torch.bfloat16 in seen
    assert {each.dtype for each in half.parameters()} == {torch.float32}
    assert found == pytest.approx(expected, rel=0.1)
    assert found != expected
    assert dict(AcceleratorState._shared_state) == before
    same_again = spread(gpt2_lm(2), 1)
    assert losses(same_again, teacher, [KD()]) == expected
    assert same(weights(same_again), weights(plain))
    in_full = spread(gpt2_lm(2), 1)
    assert losses(in_full, teacher, [KD()], precision="fp32") == expected


def test_what_cannot_be_is_refused_before_the_first_step():
    student, teacher = spread(mlp(), 1), spread(mlp())
    with pytest.raises(DistillError, match="gradient_checkpointing=True is for models of transformers"):
        losses(student, teacher, [KD()], rows=vectors(8), gradient_checkpointing=True)
    with pytest.raises(DistillError, match=r"precision='bf16'\) and Accelerator\(mixed_precision='no'\) differ"):
        losses(student, teacher, [KD()], rows=vectors(8), precision="bf16", accelerator=Accelerator(cpu=True))
    if not torch.cuda.is_available():
        with pytest.raises(DistillError, match="precision='fp16' scales its gradients"):
            losses(student, teacher, [KD()], rows=vectors(8), precision="fp16")
