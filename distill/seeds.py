"""What decides all draws: a whole number."""

from typing import Any, SupportsIndex

from distill.errors import DistillError


def seed_of(given: Any) -> int:
    """The seed as a number of Python.

    Raises:
        DistillError: it is no whole number: a text or a NaN would be another one in each process.

    >>> seed_of(3)
    3
    """
    if isinstance(given, bool) or not isinstance(given, SupportsIndex) or not -(2**63) <= given.__index__() < 2**63:
        raise DistillError(f"seed={given!r} is no whole number that 64 bits hold; use e.g. seed=0.")
    return given.__index__()
