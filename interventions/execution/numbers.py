"""The addresses and numbers of the tensors of a model, read in the time of a small copy.

All numbers of a model are read up to `WHOLE` numbers. Of a larger one it is a sample that meets every row and every
column of every matrix. Plain tensors in the memory of the CPU are read through arrays of NumPy that know their address
and do not own it: they are made once, and used as long as the tensor is still there. All others are read by torch.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

WHOLE = 2**16
"""A model of up to as many numbers is read whole: to read as many takes some ten microseconds."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_JOINED = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, *_BITS.values()})
"""The types of numbers that `torch.cat` takes on every device."""
_MODES = 4  # of autocast and of inference, whose comparisons of all forms at once are kept
_guards: Any = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)
Form = tuple[torch.Size, torch.dtype]
Place = tuple[int, torch.dtype, torch.device, torch.Size]


@dataclass(eq=False)
class Numbers:
    """Addresses and numbers of the tensors of a model at some time.

    Attributes:
        addresses: the address of each tensor in the memory of the CPU.
        forms: the shape and type of each of these.
        sample: numbers of these.
        places: the address, type, device and shape of each other tensor.
        sums: over the numbers of these, one tensor for each device: the program does not wait for the device until
            they are compared; None where they were not read.
    """

    addresses: list[int]
    forms: list[Form]
    sample: bytearray
    places: tuple[Place, ...]
    sums: tuple[Tensor, ...] | None

    def are_as(self, other: "Numbers") -> bool:
        """Return whether tensors lie where those of others did, and hold the same numbers."""
        if self.addresses != other.addresses or self.places != other.places:
            return False
        if self.forms != other.forms or self.sample != other.sample:
            return False
        if self.sums is None or other.sums is None:
            return True
        return len(self.sums) == len(other.sums) and all(map(torch.equal, self.sums, other.sums))


@dataclass(eq=False)
class Layout:
    """The addresses of the tensors of a model and ways to read them there. It holds neither tensors nor their memory.

    Attributes:
        key: says of which tensors this is the layout.
        whole: whether all numbers are read.
        near: which of the tensors are plain ones in the memory of the CPU; empty where all are.
        addresses: the address of each of these.
        forms: the shape and type of each of these.
        arrays: their samples, by the size of a number, the largest first.
        counts: how many numbers are in all arrays of each size.
        guards: comparisons of all forms at once, each for a mode of autocast and of inference.
        spare: memory for the next sample.
    """

    key: object
    whole: bool
    near: list[bool]
    addresses: list[int]
    forms: list[Form]
    arrays: dict[int, list[np.ndarray]]
    counts: dict[int, int]
    guards: list[Any] = field(default_factory=list)
    spare: list[bytearray] = field(default_factory=list)

    @classmethod
    def of(cls, tensors: list[Tensor], key: object) -> "Layout":
        """Return the layout of tensors."""
        near = list(map(_is_near, tensors))
        close = list(compress(tensors, near))
        parts = [part for tensor, is_near in zip(tensors, near, strict=True) if not is_near for part in _parts(tensor)]
        whole = sum(each.numel() for each in (*close, *parts)) <= WHOLE
        arrays: dict[int, list[np.ndarray]] = defaultdict(list)
        for tensor in close:
            size, stride = tensor.element_size(), 1 if whole else _stride(tensor.shape)
            memory = _Memory(tensor.data_ptr(), -(-tensor.numel() // stride), size, stride)
            arrays[size].append(np.asarray(memory))
        forms = [(tensor.shape, tensor.dtype) for tensor in close]
        arrays = dict(sorted(arrays.items(), reverse=True))  # so that each begins at a multiple of its size
        counts = {size: sum(map(len, group)) for size, group in arrays.items()}
        return cls(key, whole, [] if all(near) else near, list(map(Tensor.data_ptr, close)), forms, arrays, counts)

    def read(self, tensors: list[Tensor], *, with_sums: bool) -> Numbers | None:
        """Return the numbers of the tensors now; None where they lie elsewhere than they did.

        Args:
            tensors: those whose layout this is.
            with_sums: whether those are read that lie on other devices, or are not plain.
        """
        close = list(compress(tensors, self.near)) if self.near else tensors
        addresses = list(map(Tensor.data_ptr, close))
        if addresses != self.addresses or not self._fits(close):
            return None
        if not self.near:
            return Numbers(addresses, self.forms, self._sample(), (), ())
        far = [tensor for tensor, near in zip(tensors, self.near, strict=True) if not near]
        if any(map(_is_near, far)):
            return None
        return Numbers(addresses, self.forms, self._sample(), *_far(far, self.whole, with_sums=with_sums))

    def give_back(self, sample: bytearray) -> None:
        """Take back the memory of a sample that is not needed."""
        if not self.spare:
            self.spare.append(sample)

    def _fits(self, close: list[Tensor]) -> bool:
        """Return whether tensors have the forms that they had, without gaps."""
        if any(guard.check(*close) for guard in list(self.guards)):
            return True
        forms = [(tensor.shape, tensor.dtype) for tensor in close]
        if forms != self.forms or not all(map(Tensor.is_contiguous, close)):
            return False
        if _guards is not None and close:
            sizes, strides = [list(each.shape) for each in close], [list(each.stride()) for each in close]
            guard = _guards(*close, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
            self.guards[:] = [guard, *self.guards[: _MODES - 1]]
        return True

    def _sample(self) -> bytearray:
        """Return the samples of all arrays."""
        try:
            sample = self.spare.pop()
        except IndexError:
            sample = bytearray(sum(size * count for size, count in self.counts.items()))
        start = 0
        for size, arrays in self.arrays.items():
            np.concatenate(arrays, out=np.frombuffer(sample, f"u{size}", self.counts[size], start))
            start += size * self.counts[size]
        return sample


class _Memory:
    """Numbers in the memory of the CPU, described for NumPy. They belong to a tensor, which may free them."""

    def __init__(self, address: int, count: int, size: int, stride: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, True),
            "shape": (count,),
            "strides": (size * stride,),
            "typestr": np.dtype(f"u{size}").str,
        }


def numbers_of(
    tensors: list[Tensor], key: object, layout: Layout | None, *, with_sums: bool = True
) -> tuple[Numbers | None, Layout | None]:
    """Return the numbers of tensors, None where they cannot be read, and the layout for the next reading.

    Args:
        tensors: the tensors.
        key: the same object where the tensors are the same objects as before.
        layout: the layout that the last reading left.
        with_sums: whether those are read that lie on other devices, or are not plain.
    """
    try:
        numbers = None if layout is None or layout.key is not key else layout.read(tensors, with_sums=with_sums)
        if numbers is None:
            layout = Layout.of(tensors, key)
            numbers = layout.read(tensors, with_sums=with_sums)
        return numbers, layout
    except (RuntimeError, NotImplementedError, TypeError):
        return None, None  # the tensors inside functorch or a fake run, and those on no device, hold no numbers


def _is_near(tensor: Tensor) -> bool:
    """Return whether a tensor is a plain one in the memory of the CPU, without gaps."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not (tensor.is_complex() or tensor.is_quantized or tensor.is_neg())
        and tensor.numel() > 0
        and tensor.data_ptr() != 0
    )


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors inside a tensor: quantized and distributed ones consist of several."""
    if is_lazy(tensor):
        return
    if tensor.is_meta:
        raise NotImplementedError("a tensor on no device holds no numbers")
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    if names:
        for part in (getattr(tensor, name) for name in names):
            if isinstance(part, Tensor):  # a distributed one names its mesh too
                yield from _parts(part)
    else:
        yield tensor


@torch.no_grad()
def _far(tensors: list[Tensor], whole: bool, *, with_sums: bool) -> tuple[tuple[Place, ...], tuple[Tensor, ...] | None]:
    """Return the places of tensors, and sums over their bits, one tensor for each device."""
    parts = [part for tensor in tensors for part in _parts(tensor)]
    places = tuple((part.data_ptr(), part.dtype, part.device, part.shape) for part in parts)
    if not with_sums:
        return places, None
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for part in parts:
        if part.numel() and part.layout is torch.strided and not part.is_quantized:
            numbers = sample_of(part, whole)
            groups[numbers.device, numbers.dtype].append(numbers)
    sums: dict[torch.device, list[Tensor]] = defaultdict(list)
    for (device, _), samples in groups.items():
        joined = torch.cat(samples)
        bits = joined.view(_BITS[joined.element_size()]).long()
        order = torch.arange(1, 2 * len(bits), 2, device=device)  # so that an exchange of numbers shows
        sums[device].append((bits * order).sum())
    stacked = tuple(map(torch.stack, sums.values()))
    if not all(type(each) is Tensor and each.data_ptr() for each in stacked):  # functorch raises an error here
        raise NotImplementedError("numbers of a fake run or of functorch cannot be compared outside of it")
    return places, stacked


def sample_of(part: Tensor, whole: bool) -> Tensor:
    """Return the numbers of a tensor, or a sample of them."""
    if part.is_complex():
        part = torch.view_as_real(part.resolve_conj()).flatten(-2)
    if part.dtype not in _JOINED:
        part = part.view(_BITS[part.element_size()])
    stride = 1 if whole else _stride(part.shape)
    if part.is_contiguous():
        return part.as_strided((-(-part.numel() // stride),), (stride,))
    return part.reshape(-1)[::stride]


def _stride(shape: torch.Size) -> int:
    """Return a stride through a matrix whose samples meet every row and every column."""
    columns = shape[-1] if shape else 1
    rows = math.prod(shape[:-1])
    stride = max(1, min(rows, columns) - 1)
    while math.gcd(stride, columns) > 1:
        stride -= 1
    return stride
