"""The models inside a wrapper: DataParallel, DDP and FSDP keep theirs as `module`, PEFT adapters name a base model."""

from typing import Any

from torch import nn

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


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP shards a part of it: its weights are whole only while a block runs."""
    return any(cls.__name__ in _SHARDED for module in model.modules() for cls in type(module).__mro__)
