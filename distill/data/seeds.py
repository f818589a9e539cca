"""Seeds: whole numbers that decide all random draws."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from distill.errors import DistillError
from interventions import shown


def seed_of(given: Any) -> int:
    """Return a seed as a Python integer.

    Raises:
        DistillError: no whole number (the hash of a text or a NaN differs between processes).

    >>> seed_of(3)
    3
    """
    if not isinstance(given, int | np.integer) or isinstance(given, bool) or not -(2**63) <= int(given) < 2**63:
        raise DistillError(f"seed={shown(given)} is no whole number that 64 bits hold; use e.g. seed=0.")
    return int(given)


def seed_from(*numbers: int) -> int:
    """Return a seed that these numbers decide, the same in every process."""
    return hash(numbers) % 2**63


@contextmanager
def decided(seed: int) -> Iterator[None]:
    """Seed the default generators of Python, NumPy and torch (on the CPU) for a block, and restore them after it.

    Models draw from each of them: dropout from torch's, and wav2vec2, Whisper and SpeechT5 draw the masks of their
    inputs from NumPy's.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
