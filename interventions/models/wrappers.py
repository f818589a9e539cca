"""The models inside a wrapper: `module` of DataParallel, DDP and FSDP, the base model of PEFT adapters."""

from typing import Any, Protocol, TypeGuard, cast, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class Traced(Protocol):
    """A model of nnsight: an `Envoy`, which is no module and holds one. It is recognised without importing nnsight."""

    path: str
    interleaver: Any
    _module: nn.Module


Model = nn.Module | Traced

_SHARDED = frozenset({"FullyShardedDataParallel", "FSDPModule"})


def unwrapped(model: nn.Module) -> list[nn.Module]:
    """Return the model and those that it wraps, the outermost first."""
    found = [model]
    while True:
        last: Any = found[-1]
        inner = last.get_base_model() if hasattr(last, "get_base_model") else getattr(last, "module", None)
        if not isinstance(inner, nn.Module) or inner in found:
            return found
        found.append(inner)


def compiled_part(model: nn.Module) -> str | None:
    """Return the path of a part made by `torch.compile(module)`, inside which hooks never fire; "" is the model."""
    return next((path for path, module in model.named_modules() if "_orig_mod" in module._modules), None)


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP shards a part of the model, whose weights are then whole only while a block runs."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False  # FSDP needs a group of processes, and to look at every module takes long
    return any(cls.__name__ in _SHARDED for module in model.modules() for cls in type(module).__mro__)


def is_traced(model: object) -> TypeGuard[Traced]:
    """Return whether a model is one of nnsight."""
    if isinstance(model, nn.Module):
        return False
    return any(cls.__name__ == "Envoy" and cls.__module__.split(".")[0] == "nnsight" for cls in type(model).__mro__)


def module_of(model: Model) -> nn.Module:
    """Return the torch model inside a model of nnsight; a torch model is returned itself."""
    return model._module if is_traced(model) else cast(nn.Module, model)
