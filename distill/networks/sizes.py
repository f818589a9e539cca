"""Sizes that make a network, and images that it can compute with."""

import torch
from torch import Tensor

from distill.errors import DistillError


def check_sizes(name: str, dropout: float, **sizes: int) -> None:
    """That a network can be made of these sizes.

    Raises:
        DistillError: one below 1, or a dropout that is no share.
    """
    small = next(((size, value) for size, value in sizes.items() if value < 1), None)
    if small is not None:
        raise DistillError(f"{name}({small[0]}={small[1]}) makes no network; use {small[0]}=1 or more.")
    if not 0 <= dropout <= 1:
        raise DistillError(f"{name}(dropout={dropout}) is no share from 0 to 1; use e.g. dropout=0.1.")


def check_images(images: Tensor, weight: Tensor) -> None:
    """That images can be computed with.

    Raises:
        DistillError: they are on another device than the weights, of another type, or sparse.
    """
    if not isinstance(weight, Tensor) or weight.is_meta or torch.compiler.is_compiling():
        return  # quantised weights, or shapes alone
    cast = torch.is_autocast_enabled(weight.device.type)
    if images.device == weight.device and (images.dtype == weight.dtype or cast) and images.layout == torch.strided:
        return
    given, own = ((each.dtype, each.layout, each.device.type) for each in (images, weight))
    raise DistillError(
        f"the images are {' '.join(map(str, given))} and the weights {' '.join(map(str, own))}; give images.to("
        f"{weight.device.type!r}, {weight.dtype})."
    )
