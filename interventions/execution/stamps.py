"""What tells whether a model is still the one that a run was made of: its tensors, modes, adapters and settings.

Torch counts what is written into a tensor, but not through `.data`, NumPy or other views of its memory. So a stamp also
holds where each tensor is, a sum of all numbers of models up to `WHOLE` numbers, and of larger ones a sample that meets
every row and every column of every matrix: changed rows, columns, heads, units, layers are seen, and one single number
of a large matrix written past torch is not.
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

from interventions.hooks.hooks import own_forward
from interventions.models.modules import modules_of
from interventions.models.wrappers import Model, is_sharded, module_of

WHOLE = 2**24  # numbers of a model that are all read: some milliseconds
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_OF_TORCH = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Stamp:
    """What a model was at some time.

    Attributes:
        made: of what torch and the modules say.
        held: of the memory and the numbers; None where they are elsewhere, or move from run to run (FSDP, offloading).
    """

    made: int
    held: int | None

    @classmethod
    def of(cls, model: Model) -> "Stamp":
        """The stamp of a model now."""
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
        """Whether the model is still the same."""
        now = Stamp.of(model)
        return self.made == now.made and (self.held == now.held or None in (self.held, now.held))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _settings(module: nn.Module) -> tuple[object, ...]:
    """The module itself, its mode, its `forward`, and the settings that it keeps as plain values, as adapters do."""
    forward: Any = own_forward(module) or MethodType(type(module).forward, module)
    function, of = getattr(forward, "__func__", forward), getattr(forward, "__self__", None)
    return (id(module), module.training, id(function), id(of), *_plain(vars(module)))


def _configs(modules: Iterable[nn.Module]) -> Iterator[tuple[object, ...]]:
    configs = {id(config): config for module in modules if (config := vars(module).get("config")) is not None}
    return (tuple(_plain(vars(config))) for config in configs.values() if hasattr(config, "__dict__"))


def _plain(attributes: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    """Switches, numbers with a fraction and names, as they decide what is computed.

    No whole numbers, as modules count with them while they run, and nothing private, where they note what they have
    done, but for adapters.
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
    """A number for where tensors are and what they hold."""
    parts = [part for tensor in tensors for part in _parts(tensor)]
    try:
        places = tuple((part.data_ptr(), part.dtype, str(part.device), part.shape) for part in parts)
        return hash((places, _content(parts)))
    except (RuntimeError, NotImplementedError, TypeError):
        return None  # tensors that stand for others, inside functorch or a fake run, hold nothing to be read


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of: quantized and distributed ones keep others."""
    if is_lazy(tensor):
        return
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    if names:
        for name in names:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor.detach()


def _content(parts: list[Tensor]) -> tuple[int, ...]:
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
    """The distance of numbers that lie in every row and every column."""
    columns = shape[-1] if shape else 1
    rows = math.prod(shape[:-1])
    stride = max(1, min(rows, columns) - 1)
    while math.gcd(stride, columns) > 1:
        stride -= 1
    return stride


def _sum(bits: Tensor) -> Tensor:
    """The sum of all bits, eight bytes at a time where they can be: several times faster."""
    size = bits.element_size()
    even = len(bits) * size % 8 == 0 and bits.storage_offset() * size % 8 == 0
    return (bits.view(torch.int64) if even else bits).sum()
