"""Copies of tensors in the memory of the host, so that reading a value does not wait for the device that holds it.

The values of a batch that is moved to a device are known: counts, lengths and padding can be read from the batch as it
was. A copy belongs to one tensor object and to the versions that both have now; a write into one makes it stale.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from interventions.errors import InterventionError
from interventions.names import shown

_copies: Any = WeakIdKeyDictionary()
"""{tensor: (version, copy, version of the copy)}; or a function that makes the copy, without a version."""


def keep_on_host(tensor: Tensor, copy: Tensor | Callable[[], Tensor]) -> Tensor:
    """Return the tensor, after remembering its values on the host for as long as it exists.

    Args:
        tensor: a tensor on a device.
        copy: its values on the CPU, or a function that returns them; it must not hold the tensor itself.

    Raises:
        InterventionError: values that are no tensor on the CPU.

    >>> import torch
    >>> mask = torch.tensor([True, False])
    >>> moved = keep_on_host(mask.to("cpu", non_blocking=True, copy=True), mask)  # or to "cuda"
    >>> on_host(moved) is mask
    True
    """
    is_known = copy.is_cpu if isinstance(copy, Tensor) else callable(copy)
    if not isinstance(tensor, Tensor) or not is_known:
        raise InterventionError(
            f"keep_on_host({shown(tensor)}, {shown(copy)}) keeps no copy of a tensor; give one on the CPU: "
            "keep_on_host(mask.to(device), mask)."
        )
    if tensor is not copy and not tensor.is_inference():  # whose changes are not counted
        _copies[tensor] = (tensor._version, copy, _version(copy))
    return tensor


def on_host(tensor: Tensor) -> Tensor:
    """Return the values of a tensor on the CPU, without waiting for its device where a copy is kept.

    Without one it is copied, once. A tensor on the CPU is returned as it is.

    Raises:
        InterventionError: no tensor.

    >>> import torch
    >>> mask = torch.tensor([True, False])
    >>> on_host(mask) is mask
    True
    """
    if not isinstance(tensor, Tensor):
        raise InterventionError(f"on_host({shown(tensor)}) is no tensor; give one: on_host(torch.as_tensor(values)).")
    kept = kept_copy(tensor)
    if kept is not None:
        return kept
    if tensor.is_cpu:
        return tensor
    try:
        copy = tensor.detach().cpu()
    except NotImplementedError as error:  # of the device meta
        raise InterventionError(
            f"on_host({shown(tensor)}) holds no values; give a tensor that does: tensor.to('cpu')."
        ) from error
    keep_on_host(tensor, copy)
    return copy


def kept_copy(tensor: Tensor) -> Tensor | None:
    """Return the values of a tensor that are kept on the host; None where none are, or one of both was written into."""
    known = _copies.get(tensor) if _copies.data else None
    if known is None or known[0] != _version(tensor) or known[2] != _version(known[1]):
        return None
    copy: Tensor = known[1]
    if callable(copy):
        copy = copy()
        keep_on_host(tensor, copy)
    return copy


def _version(value: object) -> int:
    """Return the version of a tensor, which counts the writes into it; 0 for what has none."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
