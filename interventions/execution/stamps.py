"""A stamp of a model: it shows whether tensors, modes, adapters or settings have changed since a run.

Torch counts writes into a tensor, but not those through `.data`, NumPy or other views of its memory. So a stamp also
holds the address of each tensor, a sum over all numbers of models up to `WHOLE` numbers, and for larger ones a sample
from every row and every column of every matrix. Changed rows, columns, heads, units and layers are seen; one number
of a large matrix, written past torch, is not.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from interventions.hooks.replacements import own_forward
from interventions.models.modules import modules_of
from interventions.models.wrappers import Model, is_sharded, module_of

WHOLE = 2**24  # up to as many numbers of a model are all read, in some milliseconds
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_OF_TORCH = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Stamp:
    """The state of a model at some time, as two hashes.

    Attributes:
        made: the hash of versions of tensors, modes and settings.
        held: the hash of addresses and numbers of the tensors; None where these are elsewhere or move from run to run
            (FSDP, offloading).
    """

    made: int
    held: int | None

    @classmethod
    def of(cls, model: Model) -> "Stamp":
        """Return the stamp of a model now."""
        module = module_of(model)
        modules = modules_of(module)
        parameters = [each for module in modules for each in module._parameters.values() if each is not None]
        # In train mode a run itself changes the buffers of a norm, which reads none of them then.
        still = [module for module in modules if not module.training]
        tensors = [*parameters, *(each for module in still for each in module._buffers.values() if each is not None)]
        made = hash((tuple(map(_version, tensors)), tuple(map(_settings, modules)), tuple(_configs(modules))))
        elsewhere = any(each.is_meta for each in tensors) or is_sharded(module)
        return cls(made, None if elsewhere else _memory(list({id(each): each for each in tensors}.values())))

    def is_of(self, model: Model) -> bool:
        """Return whether the model is still the same."""
        now = Stamp.of(model)
        return self.made == now.made and (self.held == now.held or None in (self.held, now.held))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _settings(module: nn.Module) -> tuple[object, ...]:
    """Return the identity, mode and `forward` of a module, and the settings that it keeps as plain values."""
    forward: Any = own_forward(module) or MethodType(type(module).forward, module)
    function, of = getattr(forward, "__func__", forward), getattr(forward, "__self__", None)
    return (id(module), module.training, id(function), id(of), *_plain(vars(module)))


def _configs(modules: Iterable[nn.Module]) -> Iterator[tuple[object, ...]]:
    """Return the plain settings in each configuration of the modules."""
    configs = {id(config): config for module in modules if (config := vars(module).get("config")) is not None}
    return (tuple(_plain(vars(config))) for config in configs.values() if hasattr(config, "__dict__"))


def _plain(attributes: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    """Yield those attributes that are settings: bools, floats and strings.

    Integers are left out, as modules count with them while they run, and so are private attributes, except those of
    adapters, as modules note in them what they have done.
    """
    for name, value in attributes.items():
        kind = type(value)
        if name in _OF_TORCH or (name[0] == "_" and "adapter" not in name):
            continue
        if kind in (bool, float, str):
            yield name, value
        elif kind is dict:
            yield from ((name, key, each) for key, each in value.items() if type(each) in (bool, int, float, str))
        elif kind in (list, tuple):
            yield from ((name, each) for each in value if type(each) is str)


def _memory(tensors: list[Tensor]) -> int | None:
    """Return a hash of the addresses and the numbers of tensors; None where they cannot be read."""
    parts = [part for tensor in tensors for part in _parts(tensor)]
    try:
        places = tuple((part.data_ptr(), part.dtype, str(part.device), part.shape) for part in parts)
        return hash((places, _content(parts)))
    except (RuntimeError, NotImplementedError, TypeError):
        return None  # the tensors inside functorch or a fake run hold no numbers


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors inside a tensor: quantized and distributed ones consist of several."""
    if is_lazy(tensor):
        return
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    if names:
        for name in names:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor.detach()


def _content(parts: list[Tensor]) -> tuple[int, ...]:
    """Return sums over the bits of the tensors, of all or of a sample, which change with their numbers."""
    whole = sum(part.numel() for part in parts) <= WHOLE
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    sums: dict[torch.device, list[Tensor]] = defaultdict(list)
    for part in parts:
        if part.numel() and part.layout is torch.strided and not part.is_quantized:
            bits = torch.view_as_real(part) if part.is_complex() else part
            bits = bits.reshape(-1).view(_BITS[bits.element_size()])
            groups[part.device, bits.dtype].append(bits[:: _stride(part.shape)])
            if whole:
                sums[part.device].append(_sum(bits))
    for (device, _), samples in groups.items():
        numbers = torch.cat(samples).long()
        order = torch.arange(1, 2 * len(numbers), 2, device=device)  # so that an exchange of numbers shows
        sums[device].append((numbers * order).sum())
    return tuple(number for each in sums.values() for number in torch.stack(each).tolist())


def _stride(shape: torch.Size) -> int:
    """Return a stride through a matrix whose samples meet every row and every column."""
    columns = shape[-1] if shape else 1
    rows = math.prod(shape[:-1])
    stride = max(1, min(rows, columns) - 1)
    while math.gcd(stride, columns) > 1:
        stride -= 1
    return stride


def _sum(bits: Tensor) -> Tensor:
    """Return the sum of all bits, read eight bytes at a time where possible, which is several times faster."""
    size = bits.element_size()
    even = len(bits) * size % 8 == 0 and bits.storage_offset() * size % 8 == 0
    return (bits.view(torch.int64) if even else bits).sum()
