"""What the networks for text share: which tokens are not padding, and where they are in their rows."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.errors import DistillError


def find_real(
    input_ids: Int[Tensor, "batch token"], attention_mask: Tensor | None, vocabulary: int
) -> Bool[Tensor, "batch token"]:
    """Return which tokens are real, not padding; all of them without a mask.

    Raises:
        DistillError: an id outside the vocabulary, a mask of another shape, or a row that is all padding.
    """
    if not input_ids.numel():
        raise DistillError(f"input_ids has shape {list(input_ids.shape)} and no token; give rows of at least one.")
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


def number_tokens(mask: Bool[Tensor, "batch token"]) -> Int[Tensor, "batch token"]:
    """Return the number of each real token among the real ones, from 0; for padding that of the one before it, or 0.

    >>> number_tokens(torch.tensor([[False, True, True, False]]))
    tensor([[0, 0, 1, 1]])
    """
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def select_states(
    states: Float[Tensor, "batch token dims"], index: Int[Tensor, " batch"]
) -> Float[Tensor, "batch dims"]:
    """Return the state of one token of each row."""
    return states[torch.arange(len(states), device=states.device), index]


def find_first(mask: Bool[Tensor, "batch token"]) -> Int[Tensor, " batch"]:
    """Return the position of the first real token of each row."""
    return mask.int().argmax(1)


def find_last(mask: Bool[Tensor, "batch token"]) -> Int[Tensor, " batch"]:
    """Return the position of the last real token of each row.

    >>> find_last(torch.tensor([[False, True, True, False]]))
    tensor([2])
    """
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1)


def order_real_first(mask: Bool[Tensor, "batch token"]) -> Int[Tensor, "batch token"]:
    """Return an order of the tokens of each row: real ones before padding, each kind in its own order.

    >>> order_real_first(torch.tensor([[False, True, False, True]]))
    tensor([[1, 3, 0, 2]])
    """
    return mask.int().argsort(dim=1, descending=True, stable=True)


def reorder(
    states: Float[Tensor, "batch token dims"], order: Int[Tensor, "batch token"]
) -> Float[Tensor, "batch token dims"]:
    """Return the states of the tokens of each row in another order."""
    rows = rearrange(torch.arange(len(states), device=states.device), "batch -> batch 1")
    return states[rows, order]
