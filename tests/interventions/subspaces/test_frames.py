"""Frames are orthonormal whatever the reflections are."""

import pytest
import torch

from interventions.subspaces.frames import frame, random_reflections, reflections_of, shared_frames
from tests.interventions.subspaces.test_subspaces import draw

VALUES = {
    "random": lambda r: r,
    "zeros": lambda r: 0 * r,
    "huge": lambda r: 1e37 * r,
    "tiny": lambda r: 1e-37 * r,
    "of all sizes": lambda r: r * 10.0 ** torch.arange(-30, 31).repeat(r.numel())[: r.numel()].view_as(r),
    "nearly one direction": lambda r: r[:, :1] + 1e-4 * r,
    "some zero": lambda r: r * (torch.arange(r.shape[1]) % 2),
    "axes": lambda r: torch.eye(*r.shape),
}


def is_orthonormal(directions: torch.Tensor) -> bool:
    return bool((directions.T @ directions - torch.eye(directions.shape[1])).abs().max() < 1e-5)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (8, 8), (300, 64)])
def test_frames_are_orthonormal_for_any_reflections(value, shape):
    reflections = VALUES[value](draw(0, *shape)).requires_grad_()
    directions = frame(reflections, torch.ones(shape[1]), torch.float32)
    assert is_orthonormal(directions.detach())
    directions.square().mul(draw(1, *shape)).sum().backward()
    assert not reflections.grad.isnan().any()


def test_half_precision_and_autocast_cost_nothing():
    reflections, signs = random_reflections(16, 4, seed=0)
    exact = frame(reflections, signs, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(frame(reflections, signs, torch.float32), exact)
    assert is_orthonormal(frame(reflections.bfloat16(), signs, torch.float32))


@pytest.mark.parametrize("shape", [(16, 2), (6, 5), (6, 6)])
def test_a_frame_is_the_product_of_its_reflections(shape):
    reflections, signs = (value.double() for value in random_reflections(*shape, seed=0))
    product = torch.eye(shape[0], dtype=torch.float64)
    for v in reflections.T:
        product = product @ (torch.eye(shape[0]) - 2 * torch.outer(v, v) / (v @ v))
    assert torch.allclose(frame(reflections, signs, torch.float64), product[:, : shape[1]] * signs, atol=1e-12)


def test_the_frame_of_a_matrix_is_its_q():
    given = draw(0, 16, 5)
    q, r = torch.linalg.qr(given)
    assert torch.allclose(frame(*reflections_of(given), torch.float32), q * r.diagonal().sign(), atol=1e-5)
    assert torch.equal(frame(*reflections_of(torch.eye(6)), torch.float32), torch.eye(6))


def test_a_shared_frame_is_the_same_and_is_made_anew_when_it_changes():
    reflections, signs = random_reflections(6, 3, seed=0)
    reflections.requires_grad_()
    alone = frame(reflections, signs, torch.float32)
    with shared_frames():
        first = frame(reflections, signs, torch.float32)
        assert frame(reflections, signs, torch.float32) is first
        assert torch.equal(first, alone)
        assert frame(reflections, signs, torch.float64).dtype == torch.float64
        with torch.no_grad():
            assert not frame(reflections, signs, torch.float32).requires_grad
            reflections.mul_(torch.arange(1.0, 7.0)[:, None])
        other = frame(reflections, signs, torch.float32)
        assert other is not first
        assert not torch.allclose(other, first)
    assert frame(reflections, signs, torch.float32) is not other
