"""Kept answers as bytes, and back bit for bit.

Each tensor keeps its dtype. Two kinds of numbers take less room than in memory. The indices of the largest logits have
as many bits as the largest of them needs. The values of the largest logits stand in order, so their highest bytes, of
sign and exponent, are alike, and are compressed.
"""

import struct
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.errors import DistillError

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
"""A tensor's dtype is written as its number in this list, which may only grow at its end."""


class _Codec(NamedTuple):
    """A way to write the numbers of a tensor.

    Attributes:
        pack: from the bytes of the numbers, `[number, byte]`, the lowest byte first, to those that are written.
        unpack: back, from these, the count of numbers and the bytes of each.
    """

    pack: Callable[[np.ndarray], bytes]
    unpack: Callable[[memoryview, int, int], np.ndarray]


def packed(entry: Mapping[str, Tensor]) -> bytes:
    """Return named tensors as bytes; those named `values` and `indices` take less room."""
    parts = [struct.pack("<B", len(entry))]
    for name, tensor in entry.items():
        value = tensor.detach().cpu().contiguous()
        if value.dtype not in DTYPES:
            raise DistillError(
                f"answers of {value.dtype} cannot be kept; give the teacher another precision: model.float()."
            )
        numbers = value.reshape(-1, 1).view(torch.uint8).numpy()
        codec = NAMED.get(name, RAW) if len(numbers) else RAW
        content, named = CODECS[codec].pack(numbers), name.encode()
        head = (len(named), DTYPES.index(value.dtype), codec, value.ndim, len(content))
        parts += [struct.pack("<BBBBQ", *head), named, struct.pack(f"<{value.ndim}I", *value.shape), content]
    return b"".join(parts)


def unpacked(content: memoryview | bytes) -> dict[str, Tensor]:
    """Return the named tensors that `packed` wrote, in memory of their own.

    Raises:
        ValueError: bytes that it did not write.
    """
    content, found = memoryview(content), dict[str, Tensor]()
    try:
        (tensors,), place = struct.unpack_from("<B", content), 1
        for _ in range(tensors):
            letters, number, codec, axes, length = struct.unpack_from("<BBBBQ", content, place)
            place += 12
            name = bytes(content[place : place + letters]).decode()
            shape = struct.unpack_from(f"<{axes}I", content, place + letters)
            place += letters + 4 * axes
            dtype, size = DTYPES[number], int(np.prod(shape, dtype=np.int64))
            numbers = CODECS[codec].unpack(content[place : place + length], size, dtype.itemsize)
            found[name] = torch.from_numpy(numbers.reshape(-1)).view(dtype).reshape(shape)
            place += length
    except (struct.error, IndexError, zlib.error, UnicodeDecodeError, RuntimeError) as error:
        raise ValueError(f"no packed tensors: {error}") from error
    return found


def _pack_raw(numbers: np.ndarray) -> bytes:
    return numbers.tobytes()


def _unpack_raw(content: memoryview, count: int, width: int) -> np.ndarray:
    return np.frombuffer(content, np.uint8, count * width).reshape(count, width).copy()


def _pack_ordered(numbers: np.ndarray) -> bytes:
    """Return floating-point numbers with their highest bytes compressed."""
    return numbers[:, :-1].tobytes() + zlib.compress(numbers[:, -1].tobytes(), 1)


def _unpack_ordered(content: memoryview, count: int, width: int) -> np.ndarray:
    numbers, low = np.empty((count, width), np.uint8), count * (width - 1)
    numbers[:, :-1] = np.frombuffer(content, np.uint8, low).reshape(count, width - 1)
    numbers[:, -1] = np.frombuffer(zlib.decompress(content[low:]), np.uint8, count)
    return numbers


def _pack_small(numbers: np.ndarray) -> bytes:
    """Return whole numbers with the bits that the largest needs: whole bytes, and the bits above them."""
    used = int(np.bitwise_or.reduce(numbers, 0).astype(object) @ [256**place for place in range(numbers.shape[1])])
    bits = used.bit_length()
    whole, above = divmod(bits, 8)
    low = np.ascontiguousarray(numbers[:, :whole].T).tobytes()
    high = np.unpackbits(numbers[:, whole : whole + 1], axis=1, count=above, bitorder="little") if above else None
    return bytes([bits]) + low + (b"" if high is None else np.packbits(high, bitorder="little").tobytes())


def _unpack_small(content: memoryview, count: int, width: int) -> np.ndarray:
    whole, above = divmod(content[0], 8)
    numbers = np.zeros((count, width), np.uint8)
    numbers[:, :whole] = np.frombuffer(content, np.uint8, whole * count, 1).reshape(whole, count).T
    if above:
        packed_bits = np.frombuffer(content, np.uint8, offset=1 + whole * count)
        high = np.unpackbits(packed_bits, count=count * above, bitorder="little").reshape(count, above)
        numbers[:, whole] = np.packbits(high, axis=1, bitorder="little")[:, 0]
    return numbers


RAW, ORDERED, SMALL = range(3)
CODECS = (_Codec(_pack_raw, _unpack_raw), _Codec(_pack_ordered, _unpack_ordered), _Codec(_pack_small, _unpack_small))
"""The number of a codec is written, so the list may only grow at its end."""
NAMED = {"values": ORDERED, "indices": SMALL}
