"""The models inside a wrapper: DataParallel, DDP and FSDP keep theirs as `module`, PEFT adapters name a base model."""

from typing import Any, Protocol, TypeGuard, cast, runtime_checkable

from torch import nn


@runtime_checkable
class Traced(Protocol):
    """A model of nnsight: an `Envoy`, which is no module and holds one. Seen without importing nnsight."""

    path: str
    interleaver: Any
    _module: nn.Module


Model = nn.Module | Traced

_SHARDED = frozenset({"FullyShardedDataParallel", "FSDPModule"})


def unwrapped(model: nn.Module) -> list[nn.Module]:
    """The model and those that it wraps, the outermost first."""
    found = [model]
    while True:
        last: Any = found[-1]
        named = last.get_base_model() if hasattr(last, "get_base_model") else getattr(last, "module", None)
        if not isinstance(named, nn.Module) or named in found:
            return found
        found.append(named)


def compiled_part(model: nn.Module) -> str | None:
    """The path of a part that went through `torch.compile(module)`, inside which hooks never fire; "" is the model."""
    return next((path for path, module in model.named_modules() if "_orig_mod" in module._modules), None)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP shards a part of it: its weights are whole only while a block runs."""
    return any(cls.__name__ in _SHARDED for module in model.modules() for cls in type(module).__mro__)


def is_traced(model: object) -> TypeGuard[Traced]:
    """Whether it is a model of nnsight."""
    return any(cls.__name__ == "Envoy" and cls.__module__.split(".")[0] == "nnsight" for cls in type(model).__mro__)


def module_of(model: Model) -> nn.Module:
    """The torch model that a model of nnsight traces; any other is that itself."""
    return model._module if is_traced(model) else cast(nn.Module, model)
