"""What functions of the user return for a batch, and how it reads in an error."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from distill.errors import DistillError

Values = Mapping[str, Tensor]
"""A value `[batch]` or `[batch, ...]` of each of some variables."""


def called(what: str, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """What a function of the user returns; its failures say which one failed."""
    try:
        return function(*args, **named)
    except DistillError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise DistillError(
            f"{what} failed, {type(error).__name__}: {lines[0]}; it gets batched tensors on the device of the model, "
            "so index tables as table.to(values.device)[values]."
        ) from error


def described(value: object) -> str:
    """A value, for an error: its shape, dtype and device."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype} on {value.device}"
    return f"an object of type {type(value).__name__}"


def rows_in(value: Tensor) -> str:
    """How many examples a value is of, for an error."""
    return f"{len(value)} examples on {value.device}"
