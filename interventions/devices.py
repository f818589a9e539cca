"""Tensors on an accelerator, which Python must not wait for: it runs ahead, until it asks for a value or for a copy."""

import torch
from torch import Tensor


def is_on_host(tensor: Tensor) -> bool:
    """Return whether the values of a tensor are there at once, so that asking for them waits for no device."""
    return tensor.device.type == "cpu"


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without waiting for the copy where the device orders it itself.

    >>> moved(torch.tensor([1]), torch.device("cpu"))
    tensor([1])
    """
    if tensor.device == device:
        return tensor
    # Into the memory of the host no device orders it: Python could read values that are not there yet.
    return tensor.to(device, non_blocking=device.type != "cpu")


def indices_on(device: torch.device, indices: object) -> Tensor:
    """Return whole numbers as an index on a device, without waiting for the copy."""
    return moved(torch.tensor(indices), device)
