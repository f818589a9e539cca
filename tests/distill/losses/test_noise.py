"""Noise on logits against its moments (methods.md, section 1.3)."""

import math

import pytest
import torch

from distill.errors import DistillError
from distill.losses import LogitNoise, kd, squared_error
from tests.distill.losses.pairs import gradient, pair


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("noise", [LogitNoise(0), LogitNoise(3.0, share=0), LogitNoise(0.0, kind="multiplicative")])
def test_none_is_bit_identical_and_draws_nothing(noise):
    student, teacher = pair(4, 6)
    generator = seeded()
    before = generator.get_state()
    assert noise(teacher, generator) is teacher
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(kd(student, noise(teacher, generator), 2.0), kd(student, teacher, 2.0))
    assert not torch.equal(LogitNoise(3.0)(teacher, generator), teacher)


@pytest.mark.parametrize("share", [1, 0.3])
def test_additive_adds_its_variance(share):
    """E‖z_s − z'‖² = ‖z_s − z‖² + p C σ²."""
    student, teacher = (logits.expand(200_000, 5) for logits in pair(1, 5))
    noisy = LogitNoise(sigma=2.0, share=share)(teacher, seeded())
    expected = squared_error(student[:1], teacher[:1]).item() + share * 5 * 4
    assert squared_error(student, noisy).item() == pytest.approx(expected, rel=0.01)


def test_multiplicative_has_a_variance_that_grows_with_the_square():
    teacher = torch.tensor([0.0, 1.0, -2.0, 10.0]).expand(100_000, 4)
    noisy = LogitNoise(sigma=0.5, kind="multiplicative")(teacher, seeded())
    torch.testing.assert_close(noisy.mean(0), teacher[0], rtol=0.01, atol=0)
    torch.testing.assert_close(noisy.var(0), 0.25 * teacher[0] ** 2, rtol=0.02, atol=0)


@pytest.mark.parametrize("shape", [(4000, 3), (4000, 5, 3)])
def test_a_share_is_of_whole_examples(shape):
    clean = torch.ones(shape)
    changed = (LogitNoise(1.0, share=0.25)(clean, seeded()) != clean).flatten(1)
    assert torch.equal(changed.any(1), changed.all(1))
    assert changed.any(1).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_is_drawn_from_the_generator():
    _, teacher = pair(4, 6)
    noise = LogitNoise(1.0)
    assert torch.equal(noise(teacher, seeded()), noise(teacher, seeded()))
    assert not torch.equal(noise(teacher, seeded()), noise(teacher, torch.Generator().manual_seed(1)))
    default = torch.get_rng_state()
    noise(teacher, seeded())
    assert torch.equal(torch.get_rng_state(), default)


@pytest.mark.parametrize("kind", ["additive", "multiplicative"])
def test_a_noisy_student_has_gradients_and_is_not_written(kind):
    student, _ = pair(4, 6)
    before = student.detach().clone()
    value = LogitNoise(0.5, kind=kind)(student, seeded()).sum()
    assert (gradient(value, student) == 1).all() == (kind == "additive")
    assert torch.equal(student, before)


@pytest.mark.parametrize("kind", ["additive", "multiplicative"])
def test_infinite_logits_stay(kind):
    """Times 1 + ξ < 0, a class that cannot be would become certain."""
    barred = torch.full((1000, 2), -math.inf)
    assert torch.equal(LogitNoise(5.0, kind=kind)(barred, seeded()), barred)


def test_half_precision_is_widened():
    noisy = LogitNoise(1e-4)(torch.ones(4, 6, dtype=torch.bfloat16), seeded())
    assert noisy.dtype == torch.float32
    assert ((noisy - 1).abs() < 1e-2).all()
    assert (noisy != 1).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(sigma=-1.0), r"sigma=-1.0; try LogitNoise\(sigma=0.5\)"),
        (dict(sigma=math.nan), r"sigma=nan"),
        (dict(sigma=math.inf), r"sigma=inf"),
        (dict(sigma=1.0, share=1.5), r"share=1.5; share=1.0 perturbs all"),
        (dict(sigma=1.0, kind="dropout"), r"kind='dropout'; use kind='additive' or 'multiplicative'"),
    ],
)
def test_refuses_other_settings(settings, message):
    with pytest.raises(DistillError, match=message):
        LogitNoise(**settings)
