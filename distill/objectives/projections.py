"""Linear maps between the widths of two models, trained with the student."""

import torch
from jaxtyping import Shaped
from torch import Tensor, nn


def linear(width_in: int, width_out: int, like: Shaped[Tensor, "..."]) -> nn.Linear:
    """A new linear layer, in single precision at least, where `like` is, drawn by the default generator of the CPU.

    So are its weights the same on every device. Call it in `Objective.prepare`, where that generator is seeded.
    """
    return nn.Linear(width_in, width_out).to(like.device, torch.promote_types(like.dtype, torch.float32))
