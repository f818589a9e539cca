"""What the networks for tokens share: which tokens are real, and where they are."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.errors import DistillError


def real(
    input_ids: Int[Tensor, "batch token"], attention_mask: Tensor | None, vocabulary: int
) -> Bool[Tensor, "batch token"]:
    """Which tokens are no padding; all of them where there is no mask.

    Raises:
        DistillError: an id that the vocabulary lacks, a mask of another shape, or a row of padding alone.
    """
    if not input_ids.numel():
        raise DistillError(f"input_ids has shape {list(input_ids.shape)} and no token; give rows of one at least.")
    if input_ids.is_meta or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    outside = input_ids[(input_ids < 0) | (input_ids >= vocabulary)]
    if len(outside):
        raise DistillError(
            f"input_ids has token {int(outside[0])} and the vocabulary {vocabulary} (0 to {vocabulary - 1}); make the "
            f"network larger: vocabulary={int(input_ids.max()) + 1}, or use its own tokenizer."
        )
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise DistillError(
            f"attention_mask has shape {list(attention_mask.shape)} and input_ids {list(input_ids.shape)}; give the "
            "mask of the same rows."
        )
    mask = attention_mask.bool()
    if not mask.any(1).all():
        row = int((~mask.any(1)).nonzero()[0])
        raise DistillError(f"row {row} is padding alone; leave it out: every row needs a token that is real.")
    return mask


def places(mask: Bool[Tensor, "batch token"]) -> Int[Tensor, "batch token"]:
    """The number of each real token among the real ones, from 0; of padding, that of the last one before it, or 0.

    >>> places(torch.tensor([[False, True, True, False]]))
    tensor([[0, 0, 1, 1]])
    """
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def state_at(states: Float[Tensor, "batch token dims"], index: Int[Tensor, " batch"]) -> Float[Tensor, "batch dims"]:
    """The state of one token of each row."""
    return states[torch.arange(len(states), device=states.device), index]


def first(mask: Bool[Tensor, "batch token"]) -> Int[Tensor, " batch"]:
    """Where the first real token of each row is."""
    return mask.int().argmax(1)


def last(mask: Bool[Tensor, "batch token"]) -> Int[Tensor, " batch"]:
    """Where the last real token of each row is.

    >>> last(torch.tensor([[False, True, True, False]]))
    tensor([2])
    """
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1)


def real_first(mask: Bool[Tensor, "batch token"]) -> Int[Tensor, "batch token"]:
    """The order of the tokens of each row in which the real ones come first, each kind in its own order.

    >>> real_first(torch.tensor([[False, True, False, True]]))
    tensor([[1, 3, 0, 2]])
    """
    return mask.int().argsort(dim=1, descending=True, stable=True)


def reordered(
    states: Float[Tensor, "batch token dims"], order: Int[Tensor, "batch token"]
) -> Float[Tensor, "batch token dims"]:
    """The tokens of each row in another order."""
    rows = rearrange(torch.arange(len(states), device=states.device), "batch -> batch 1")
    return states[rows, order]
