"""Tell which tokens of an activation are real and which are padding, from the mask that the model was called with."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interventions.host_copies import on_host

Lengths = Callable[[Int[Tensor, " batch"], int, int], Int[Tensor, " batch"] | None]


def real_of(
    mask: Tensor | None, batch: int, width: int, *, beside: bool = False, lengths: Lengths | None = None
) -> Bool[Tensor, "batch width"] | None:
    """Return which of `width` tokens of each example are real, on the CPU; None where that is unknown.

    A mask with `width` columns is the answer itself. A mask of another width belongs to the input from which these
    tokens were computed. If it masks nothing, all tokens are real. If it masks frames, the convolutions give the number
    of tokens for each number of frames. Else the real tokens are unknown for a text, and all tokens of an input
    beside a text are real.

    Args:
        mask: the mask that the model was called with; None is no padding.
        beside: whether the tokens are not those of the text: `beside` of `interventions.models.sides.Side`.
        lengths: a function from the numbers of real frames `[batch]`, the number of all frames and `width` to the
            numbers of real tokens `[batch]`, or to None.

    >>> real_of(torch.tensor([[1, 1, 0]]), 1, 3)
    tensor([[ True,  True, False]])
    >>> real_of(torch.tensor([[1, 1, 0]]), 1, 5) is None
    True
    """
    mask = None if mask is None else on_host(mask)
    if mask is not None and mask.shape == (batch, width):
        return mask.bool()
    if mask is None or (mask.ndim == 2 and bool(mask.bool().all())):
        return torch.ones(batch, width, dtype=torch.bool, device="cpu")
    counted = _count_tokens(mask.bool(), batch, width, lengths) if lengths is not None and mask.ndim == 2 else None
    return torch.ones(batch, width, dtype=torch.bool, device="cpu") if counted is None and beside else counted


def _count_tokens(mask: Tensor, batch: int, width: int, lengths: Lengths) -> Tensor | None:
    """Return which tokens convolutions make of the real frames; None for a mask that does not end in its padding."""
    frames = mask.sum(1)
    ends_padded = torch.equal(mask, torch.arange(mask.shape[1]) < frames[:, None])
    tokens = lengths(frames, mask.shape[1], width) if len(mask) == batch and ends_padded else None
    return None if tokens is None else torch.arange(width) < tokens[:, None]
