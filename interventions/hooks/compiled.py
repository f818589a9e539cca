"""Modules and functions that went through `torch.compile`, whose compiled code calls no hooks."""

import sys
from collections.abc import Callable, Set
from types import MethodType
from typing import Any

from torch import nn

from interventions.errors import InterventionError
from interventions.models.modules import modules_of


def is_compiled(forward: Callable) -> bool:
    """Return whether `torch.compile` made this function or method; one that wraps such a function does not count."""
    function = getattr(forward, "__func__", forward)
    return getattr(function, "_torchdynamo_wrapper_id", None) == id(function)


def uncompiled(forward: Any) -> Callable:
    """Return the function that `torch.compile` compiled, bound as the compiled one is; any other function itself."""
    if not is_compiled(forward):
        return forward
    original = forward._torchdynamo_orig_callable
    return MethodType(original, forward.__self__) if isinstance(forward, MethodType) else original


def check_not_compiled(model: nn.Module, tapped: Set[nn.Module]) -> None:
    """Raise where the model or a tapped module lies inside a module made by `torch.compile(module)`.

    Raises:
        InterventionError: hooks would never run there.
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # it takes a second to import, and is where it was used
    if dynamo is None:
        return
    parts = {model, *tapped}
    for module in modules_of(model):
        if isinstance(module, dynamo.OptimizedModule) and any(inner in parts for inner in modules_of(module)):
            path = next(path for path, other in model.named_modules() if other is module)
            name = path or "model"
            raise InterventionError(
                f"{path or 'the model'} went through torch.compile(module), inside which hooks never fire; compile in "
                f"place with {name}.compile(), or pass the original: {name}._orig_mod."
            )
