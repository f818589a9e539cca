"""Checks of the sizes that a network is built with, and of the images that it is called with."""

import torch
from torch import Tensor

from distill.errors import DistillError


def check_sizes(name: str, dropout: float, **sizes: int) -> None:
    """Refuse sizes that a network cannot be built with.

    Raises:
        DistillError: a size is below 1, or the dropout is not from 0 to 1.
    """
    small = next(((size, value) for size, value in sizes.items() if value < 1), None)
    if small is not None:
        raise DistillError(f"{name}({small[0]}={small[1]}) makes no network; use {small[0]}=1 or more.")
    if not 0 <= dropout <= 1:
        raise DistillError(f"{name}(dropout={dropout}) is no share from 0 to 1; use e.g. dropout=0.1.")


def check_images(images: Tensor, weight: Tensor) -> None:
    """Refuse images that cannot be multiplied with the weights of a network.

    Raises:
        DistillError: they are on another device than the weights, of another dtype, or sparse.
    """
    if not isinstance(weight, Tensor) or weight.is_meta or torch.compiler.is_compiling():
        return  # quantised weights, or shapes alone
    cast = torch.is_autocast_enabled(weight.device.type)
    if images.device == weight.device and (images.dtype == weight.dtype or cast) and images.layout == torch.strided:
        return
    kinds = [f"{each.dtype} {each.layout} {each.device.type}" for each in (images, weight)]
    raise DistillError(
        f"the images are {kinds[0]} and the weights {kinds[1]}; give images.to({weight.device.type!r}, {weight.dtype})."
    )
