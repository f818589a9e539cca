"""Modules and functions that went through `torch.compile`, whose compiled code calls no hooks.

Code of a module that is compiled in place, `module.compile()`, is still used while hooks are on that module alone: they
run outside of it, around a compiled `forward`. It runs as it was written where something inside is read or written.
"""

import sys
from collections.abc import Callable, Iterable
from inspect import getclosurevars
from types import MethodType
from typing import Any

from torch import nn

from interventions.errors import InterventionError

_FORWARD = "_forward_compiled_alike"
"""The attribute of a compiled call that keeps its `forward`, which takes 0.2 ms to make."""


MARK = "_torchdynamo_wrapper_id"
"""The attribute of each function that `torch.compile` made, and of those that wrap one."""


def is_compiled(forward: Callable) -> bool:
    """Return whether `torch.compile` made this function or method; one that wraps such a function does not count."""
    function = getattr(forward, "__func__", forward)
    return getattr(function, MARK, None) == id(function)


def uncompiled(forward: Any) -> Callable:
    """Return the function that `torch.compile` compiled, bound as the compiled one is; any other function itself."""
    if not is_compiled(forward):
        return forward
    original = forward._torchdynamo_orig_callable
    return MethodType(original, forward.__self__) if isinstance(forward, MethodType) else original


def compiled_forward(module: nn.Module) -> Callable | None:
    """Return the `forward` of a module compiled as the module was by `module.compile()`; None if it was not.

    torch compiles `forward`, and not the method around it that calls the hooks, so it finds what it compiled before.
    """
    call = module._compiled_call_impl
    if call is None:
        return None
    written, compiled = getattr(call, _FORWARD, (None, None))
    if written != module.forward:
        settings: Any = getclosurevars(call).nonlocals.get("self")  # torch keeps them nowhere else
        is_known = isinstance(settings, sys.modules["torch._dynamo.eval_frame"].OptimizeContext)
        compiled = settings(module.forward) if is_known else None
        setattr(call, _FORWARD, (module.forward, compiled))  # a table here would keep the module alive
    return compiled


def check_not_compiled(model: nn.Module, around: Iterable[nn.Module]) -> None:
    """Raise where a module is one made by `torch.compile(module)`.

    Args:
        model: the model.
        around: the modules that are tapped, and all those around them.

    Raises:
        InterventionError: hooks would never run there.
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # it takes a second to import, and is where it was used
    if dynamo is None:
        return
    for module in around:
        if isinstance(module, dynamo.OptimizedModule):
            path = next(path for path, other in model.named_modules() if other is module)
            name = path or "model"
            raise InterventionError(
                f"{path or 'the model'} went through torch.compile(module), inside which hooks never fire; compile in "
                f"place with {name}.compile(), or pass the original: {name}._orig_mod."
            )
