"""Which axes are examples, positions and dims, for the modules people have."""

import pytest
import torch
from torch import nn

from interventions import InterventionError
from interventions.models.axes import axes_of, axis, from_vectors, to_vectors

CASES = [
    (nn.Linear(4, 4), (2, 4), "b d", (2, 4)),
    (nn.Linear(4, 4), (2, 3, 4), "b t d", (2, 3, 4)),
    (nn.LayerNorm(4), (2, 3, 4), "b t d", (2, 3, 4)),
    (nn.LSTM(4, 4, batch_first=True), (2, 3, 4), "b t d", (2, 3, 4)),
    (nn.LSTM(4, 4), (3, 2, 4), "t b d", (2, 3, 4)),
    (nn.GRU(4, 4), (3, 2, 4), "t b d", (2, 3, 4)),
    (nn.MultiheadAttention(4, 1), (3, 2, 4), "t b d", (2, 3, 4)),
    (nn.MultiheadAttention(4, 1, batch_first=True), (2, 3, 4), "b t d", (2, 3, 4)),
    (nn.TransformerEncoderLayer(4, 1), (3, 2, 4), "t b d", (2, 3, 4)),
    (nn.TransformerEncoderLayer(4, 1, batch_first=True), (2, 3, 4), "b t d", (2, 3, 4)),
    (nn.Conv1d(4, 4, 1), (2, 4, 3), "b d x", (2, 3, 4)),
    (nn.Sequential(nn.MultiheadAttention(4, 1)), (3, 2, 4), "t b d", (2, 3, 4)),
    (nn.Sequential(nn.Conv1d(4, 4, 1), nn.GELU()), (2, 4, 3), "b d x", (2, 3, 4)),
    (nn.Sequential(nn.Conv1d(4, 4, 1), nn.GELU()), (2, 4, 4), "b d x", (2, 4, 4)),
    (nn.Sequential(nn.LayerNorm(4), nn.Conv1d(4, 8, 1)), (2, 4, 4), "b t d", (2, 4, 4)),
    (nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4)), (2, 4, 4), "b t d", (2, 4, 4)),
    (nn.Sequential(nn.Conv1d(4, 4, 1), nn.GELU()), (2, 3, 4), "b t d", (2, 3, 4)),
    (nn.BatchNorm1d(4), (2, 4), "b d", (2, 4)),
    (nn.Conv2d(4, 4, 1), (2, 4, 3, 5), "b d x y", (2, 15, 4)),
    (nn.ReLU(), (2, 4, 3, 5), "b d x y", (2, 15, 4)),
    (nn.Conv3d(4, 4, 1), (2, 4, 3, 5, 6), "b d x y z", (2, 90, 4)),
]


@pytest.mark.parametrize(("module", "shape", "axes", "vectors"), CASES, ids=str)
def test_vectors_are_batch_position_dims_and_go_back(module, shape, axes, vectors):
    state = torch.arange(torch.Size(shape).numel()).reshape(shape).float()
    assert axes_of(module, state) == axes
    flat = to_vectors(state, axes)
    assert flat.shape == vectors
    back = from_vectors(flat, axes, state)
    assert torch.equal(back, state)
    assert back.stride() == state.stride()
    assert state.shape[axis(axes, "d")] == 4
    assert torch.equal(flat[..., 1], to_vectors(state.narrow(axis(axes, "d"), 1, 1), axes)[..., 0])


def test_the_memory_layout_is_that_of_what_was_there():
    state = torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last)
    new = from_vectors(torch.zeros(2, 15, 4), "b d x y", state)
    assert new.stride() == state.stride()
    assert not new.any()


def test_gradients_go_through_the_layout():
    vectors = torch.randn(2, 15, 4, requires_grad=True)
    from_vectors(vectors, "b d x y", torch.zeros(2, 4, 3, 5)).sum().backward()
    assert torch.equal(vectors.grad, torch.ones_like(vectors))


@pytest.mark.parametrize("shape", [(4,), (), (1, 2, 3, 4, 5, 6)])
def test_a_tensor_without_examples_raises(shape):
    with pytest.raises(InterventionError, match=r"Linear gives a tensor of shape .* name a place with \[batch, dims\]"):
        axes_of(nn.Linear(4, 4), torch.zeros(shape))
