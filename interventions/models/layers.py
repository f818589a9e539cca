"""Recognise norms, linear layers and scales by their classes and settings; compare the paths of layers."""

import re
from collections.abc import Iterator

from torch import nn

_SCALES = re.compile("scale|gamma|gain|alpha", re.I)


class Missing(LookupError):
    """The error for a site that a block does not have, with the reason."""


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalisation: by the name of its class, with only normalisations inside it."""
    return "norm" in type(module).__name__.lower() and all(map(is_norm, module.children()))


def is_scale(module: nn.Module) -> bool:
    """Return whether all weights that a module itself has are scales of a residual sum."""
    return all(map(_SCALES.search, module._parameters))


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a matrix product: a linear layer, plain, quantised or adapted, or `Conv1D`."""
    return width_in(module) is not None and width_out(module) is not None


def width_in(module: nn.Module) -> int | None:
    """Return the width of the input of a linear module; None of any other."""
    width = getattr(module, "in_features", None)
    return width if isinstance(width, int) else getattr(module, "nx", None)


def width_out(module: nn.Module) -> int | None:
    """Return the width of the output of a linear module; None of any other."""
    width = getattr(module, "out_features", None)
    return width if isinstance(width, int) else getattr(module, "nf", None)


def count(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """Return the first positive number that a module, or its configuration, has under one of `names`."""
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            number = getattr(holder, name, None)
            if isinstance(number, int) and not isinstance(number, bool) and number > 0:
                return number
    return None


def linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear modules inside a module, but not those inside an adapted one."""
    if is_linear(module):
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from linears(child, f"{prefix}.{name}" if prefix else name)


def is_inside(path: str, areas: list[str]) -> bool:
    """Return whether a path lies below one of `areas`."""
    return any(f"{path}.".startswith(f"{area}.") if area else True for area in areas)


def ancestor(paths: list[str], leaf: bool = False) -> str:
    """Return the path of the innermost module around all paths; "" for the block itself."""
    parts = [path.split(".") if leaf else path.split(".")[:-1] for path in paths]
    common = []
    for steps in zip(*parts, strict=False):
        if len(set(steps)) > 1:
            break
        common.append(steps[0])
    return ".".join(common)
