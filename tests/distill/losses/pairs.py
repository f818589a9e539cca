"""What the tests of losses share: a pair of tensors, a gradient, a mask."""

import torch
from torch import Tensor


def pair(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return student.requires_grad_(), teacher


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of)[0]


def real_tokens() -> Tensor:
    return torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1]])
