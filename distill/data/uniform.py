"""Uniform numbers of many seeds at once, the same bits as torch draws from a generator of each seed.

torch's generator on the CPU is the Mersenne Twister MT19937, seeded by the lower 32 bits, s_0 = seed and
s_i = 1812433253 (s_{i−1} ⊕ s_{i−1}/2³⁰) + i. A float is the lower 24 bits of a number, divided by 2²⁴. Seeding one
generator after the other takes longer than a small model; here the recursion runs for all seeds together.

Matsumoto and Nishimura 1998, ACM Transactions on Modeling and Computer Simulation 8 (1).
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_LENGTH, _SHIFT = 624, 397
_UPPER, _LOWER, _TWIST = np.uint32(0x80000000), np.uint32(0x7FFFFFFF), np.uint32(0x9908B0DF)


def uniform_of(seeds: Sequence[int], count: int) -> Float[Tensor, "seeds count"]:
    """Return for each seed the numbers of `torch.rand(count, generator=torch.Generator().manual_seed(seed))`.

    Args:
        seeds: whole numbers from 0 on.
        count: how many numbers of each.

    >>> alone = torch.rand(3, generator=torch.Generator().manual_seed(7))
    >>> torch.equal(uniform_of([7, 8], 3)[0], alone)
    True
    """
    lower = np.fromiter((seed & 0xFFFFFFFF for seed in seeds), np.uint32, len(seeds))
    few = count <= _LENGTH - _SHIFT
    state = _seeded(lower, _SHIFT + max(count, 1) if few else _LENGTH)
    if few:
        drawn = [_next(state[_SHIFT : _SHIFT + count], state[:count], state[1 : count + 1])]
    else:
        drawn = []
        for _ in range(-(-count // _LENGTH)):
            _twist(state)
            drawn.append(state.copy())
    numbers = _tempered(np.concatenate(drawn)[:count]) & np.uint32(0xFFFFFF)
    return torch.from_numpy(np.ascontiguousarray(numbers.T.astype(np.float32) * np.float32(2.0**-24)))


def _seeded(seeds: np.ndarray, length: int) -> np.ndarray:
    """Return the first numbers of the states that these seeds give, `[length, seeds]`."""
    state = np.empty((length, len(seeds)), np.uint32)
    state[0] = seeds
    for i in range(1, length):
        row = state[i]
        np.right_shift(state[i - 1], 30, out=row)
        np.bitwise_xor(row, state[i - 1], out=row)
        np.multiply(row, np.uint32(1812433253), out=row)
        np.add(row, np.uint32(i), out=row)
    return state


def _next(far: np.ndarray, here: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the next numbers of states, from those at the same place, after it, and `_SHIFT` further."""
    both = (here & _UPPER) | (after & _LOWER)
    return far ^ (both >> np.uint32(1)) ^ (np.where(both & np.uint32(1), _TWIST, np.uint32(0)))


def _twist(state: np.ndarray) -> None:
    """Replace all numbers of states by the next ones; a number needs others of the new state, so in three parts."""
    part = _LENGTH - _SHIFT
    for first in range(0, _LENGTH - 1, part):
        last = min(first + part, _LENGTH - 1)
        far = state[first + _SHIFT : last + _SHIFT] if first == 0 else state[first - part : last - part]
        state[first:last] = _next(far, state[first:last], state[first + 1 : last + 1])
    state[-1] = _next(state[_SHIFT - 1], state[-1], state[0])


def _tempered(numbers: np.ndarray) -> np.ndarray:
    """Return the output of the generator for numbers of its state."""
    numbers = numbers ^ (numbers >> np.uint32(11))
    numbers = numbers ^ ((numbers << np.uint32(7)) & np.uint32(0x9D2C5680))
    numbers = numbers ^ ((numbers << np.uint32(15)) & np.uint32(0xEFC60000))
    return numbers ^ (numbers >> np.uint32(18))
