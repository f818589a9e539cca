"""Each operator against its formula."""

import pytest
import torch

from interventions import Add, Interpolate, InterventionError, Mean, Mixup, Noise, Swap, Zero


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BASE, SOURCE, VALUE, NORMAL = draw(0, 2, 3, 4), draw(1, 2, 3, 4), draw(2, 4), draw(3, 2, 3, 4)
RMS = BASE.square().mean(-1, keepdim=True).sqrt()
FORMULAS = [
    (Swap(), SOURCE),
    (Zero(), BASE * 0),
    (Interpolate(0.25), 0.75 * BASE + 0.25 * SOURCE),
    (Interpolate(2.0), 2 * SOURCE - BASE),
    (Mean(), SOURCE.flatten(0, 1).mean(0).expand(2, 3, 4)),
    (Mean(VALUE), VALUE.expand(2, 3, 4)),
    (Add(VALUE), BASE + VALUE),
    (Add(VALUE, scale=-2.0), BASE - 2 * VALUE),
    (Noise(0.5, normal=NORMAL), BASE + 0.5 * RMS * NORMAL),
    (Noise(0.5, relative=False, normal=NORMAL), BASE + 0.5 * NORMAL),
    (Mixup(0.5, normal=NORMAL), 0.5 * BASE + 0.5 * 0.5 * RMS * NORMAL),
    (Mixup(2.0, keep=0.8, relative=False, normal=NORMAL), 0.8 * BASE + 0.2 * 2 * NORMAL),
]


@pytest.mark.parametrize(("op", "expected"), FORMULAS, ids=lambda value: repr(value)[:30] if callable(value) else "")
def test_formula(op, expected):
    source = SOURCE.flatten(0, 1) if getattr(op, "pools_source", False) else SOURCE
    assert torch.allclose(op(BASE, source if op.needs_source else None, None), expected, atol=1e-6)


@pytest.mark.parametrize("op", [Interpolate(0.0), Interpolate(1.0), Interpolate(1), Interpolate(0)], ids=repr)
def test_the_ends_of_interpolation_are_exact(op):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        base, source = (1000 * BASE).to(dtype), (SOURCE / 1000).to(dtype)
        assert torch.equal(op(base, source, None), source if op.weight else base)


@pytest.mark.parametrize("op", [Noise(0.3), Mixup(0.3, keep=0.0)], ids=repr)
def test_draws_are_normal_in_units_of_each_vector(op):
    base = torch.tensor([1.0, 100.0])[:, None] * torch.ones(2, 20000)
    change = op(base, None, torch.Generator().manual_seed(0)) - (base if isinstance(op, Noise) else 0)
    assert change.std(-1).tolist() == pytest.approx([0.3, 30.0], rel=0.03)
    assert change.mean(-1).tolist() == pytest.approx([0.0, 0.0], abs=0.7)
    assert not torch.allclose(change[0], change[1] / 100)


@pytest.mark.parametrize("op", [Noise(0.3), Mixup(0.3)], ids=repr)
def test_draws_come_from_the_generator_or_else_from_the_default_one(op):
    before = torch.get_rng_state()
    one, same, other = (op(BASE, None, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(op(BASE, None, None), one)
    assert not torch.equal(op(BASE, None, None), one)


@pytest.mark.parametrize("op", [Noise(0.5), Mixup(0.5)], ids=repr)
def test_the_scale_of_the_noise_has_no_gradient_and_does_not_overflow(op):
    base = BASE.clone().requires_grad_()
    op(base, None, torch.Generator()).sum().backward()
    assert torch.allclose(base.grad, torch.full_like(base, 1.0 if isinstance(op, Noise) else 0.5))
    assert op(torch.full((1, 4), 1000.0).half(), None, None).isfinite().all()


@pytest.mark.parametrize("op", [op for op, _ in FORMULAS], ids=lambda op: repr(op)[:30])
def test_no_operator_writes_in_place(op):
    base, source = BASE.clone(), SOURCE.clone()
    op(base, source, None)
    assert torch.equal(base, BASE)
    assert torch.equal(source, SOURCE)


def test_what_does_not_expand_raises():
    with pytest.raises(InterventionError, match=r"Mean holds a tensor of shape \[5\].* give one vector of shape \[4\]"):
        Mean(torch.zeros(5))(BASE, None, None)
