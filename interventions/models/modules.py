"""The modules of a model, and how error texts name a model and its parts."""

from collections.abc import Callable

import torch
from torch import nn

changes_of: Callable[[dict], int] | None = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "dict_version", None
)
"""Returns the number of the last change of a dict, which no other change of any dict has; None where torch lacks it."""


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model, each once: those of `model.modules()` in another order, several times faster."""
    found = {model: None}
    waiting = [model]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and child not in found:
                found[child] = None
                waiting.append(child)
    return list(found)


def model_name(model: nn.Module) -> str:
    """Return what errors call a model: its transformers type, else its class."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return f"{kind!r} model" if kind else f"{type(model).__name__}"


def indexed(path: str) -> str:
    """Return a dotted path as Python code.

    >>> indexed("encoder.layer.0")
    'encoder.layer[0]'
    """
    return "".join(f"[{name}]" if name.isdecimal() else f".{name}" for name in path.split(".")).removeprefix(".")


def example_path(model: nn.Module) -> str:
    """Return the path of one module without parts, as an example for an error text; "" if there is none."""
    paths = [path for path, module in model.named_modules() if path and not any(True for _ in module.children())]
    return paths[len(paths) // 2] if paths else ""
