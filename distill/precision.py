"""The precision of computations whose inputs may be of half precision."""

import torch
from torch import Tensor

_WIDE = frozenset({torch.float32, torch.float64})


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for half precision and integers, and the dtype itself for float32 and float64.

    >>> at_least_single(torch.bfloat16), at_least_single(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def widen(values: Tensor) -> Tensor:
    """Return the values in single precision if they are of half precision or integers; double stays double."""
    return values if values.dtype in _WIDE else values.to(at_least_single(values.dtype))
