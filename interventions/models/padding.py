"""Which tokens of an activation are real: its mask belongs to the place, and is neither cut nor filled up."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Lengths = Callable[[Int[Tensor, " batch"], int, int], Int[Tensor, " batch"] | None]


def real_of(
    mask: Tensor | None, batch: int, width: int, *, beside: bool = False, lengths: Lengths | None = None
) -> Bool[Tensor, "batch width"] | None:
    """Which of `width` tokens of each example are no padding; None where that cannot be told. It is on the CPU.

    A mask of as many tokens says so. Of another width it is the mask of something else that was made into these
    tokens. Without padding in it, all of them are real. Of frames, the convolutions tell how many tokens they
    make of those that are real. Else it cannot be told for what was made of a text; beside it, all tokens are real.

    Args:
        mask: what the model was called with; None is no padding.
        beside: whether it stands beside the text that the model reads: as `interventions.models.sides.Side` has it.
        lengths: from numbers of frames, that of all of them and `width` to numbers of tokens, or None.

    >>> real_of(torch.tensor([[1, 1, 0]]), 1, 3)
    tensor([[ True,  True, False]])
    >>> real_of(torch.tensor([[1, 1, 0]]), 1, 5) is None
    True
    """
    everything = torch.ones(batch, width, dtype=torch.bool)
    if mask is None:
        return everything
    mask = mask.cpu()
    if mask.shape == (batch, width):
        return mask.bool()
    if mask.ndim == 2 and bool(mask.bool().all()):
        return everything
    counted = _of_frames(mask.bool(), batch, width, lengths) if lengths is not None and mask.ndim == 2 else None
    return everything if counted is None and beside else counted


def _of_frames(mask: Tensor, batch: int, width: int, lengths: Lengths) -> Tensor | None:
    frames = mask.sum(1)
    ends_padded = torch.equal(mask, torch.arange(mask.shape[1]) < frames[:, None])
    tokens = lengths(frames, mask.shape[1], width) if len(mask) == batch and ends_padded else None
    return None if tokens is None else torch.arange(width) < tokens[:, None]
