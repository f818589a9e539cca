"""Which columns of a batch a model is called with, and which of its tokens are real."""

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from distill.errors import DistillError

NEVER = frozenset({"labels", "special_tokens_mask"})


def inputs_of(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor] | tuple[Tensor]:
    """What `model` is called with: the columns that its `forward` names, labels left out.

    Raises:
        DistillError: no column fits.
    """
    parameters = signature(_innermost(model).forward).parameters
    named = {name: batch[name] for name in parameters if name in batch and name not in NEVER}
    if named:
        return named
    rest = [name for name in batch if name not in NEVER]
    if len(rest) == 1 and any(
        p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.VAR_POSITIONAL) for p in parameters.values()
    ):
        return (batch[rest[0]],)
    raise DistillError(
        f"{type(model).__name__}.forward takes {', '.join(parameters)} and the data has {', '.join(batch)}; "
        "rename a column, e.g. data={'inputs': x, 'labels': y}."
    )


def real_tokens(
    batch: Mapping[str, Tensor], rows: int, width: int, device: torch.device, *, column: str = "attention_mask"
) -> Bool[Tensor, "rows width"]:
    """Which of `width` positions of each example are no padding: those of its mask, or all where the batch has none."""
    mask = batch.get(column)
    if mask is None:
        return torch.ones(rows, width, dtype=torch.bool, device=device)
    if mask.shape != (rows, width):
        raise DistillError(
            f"{column} has shape {list(mask.shape)} and the mapped locations have {width} positions; map locations "
            "of the token "
            "axis, or leave the mask out."
        )
    return mask.bool().to(device)


def vocabulary_of(model: nn.Module) -> int | None:
    """How many token ids `model` knows; None if it reads no tokens."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)
    try:
        table = embeddings()
    except NotImplementedError:
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on `device`."""
    return {name: column.to(device, non_blocking=True) for name, column in batch.items()}


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter of `model` is; the CPU for a model without parameters."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _innermost(model: Any) -> nn.Module:
    """The model whose `forward` names its arguments: adapters and parallel wrappers take `*args, **kwargs`."""
    if hasattr(model, "get_base_model"):
        return _innermost(model.get_base_model())
    return _innermost(model.module) if isinstance(getattr(model, "module", None), nn.Module) else model
