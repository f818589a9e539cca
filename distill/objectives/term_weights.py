"""The weight of a term in the loss: a number, or a function of the share of the training that is done."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isfinite
from numbers import Real
from typing import Any

from torch import Tensor

from distill.errors import DistillError, checked
from interventions import shown


@checked
@dataclass(frozen=True)
class Ramp:
    """A weight that changes: from `start` to `end`, linearly, over the first `until` share of the training.

    >>> Ramp(2.0, 0.0, until=0.5)(0.25)
    1.0
    """

    start: float
    end: float
    until: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise DistillError(f"Ramp(until={self.until}) is no share of the training; use above 0, up to 1.")
        if not isfinite(self.start) or not isfinite(self.end):
            raise DistillError(f"{self} is no weight at its ends; use finite numbers, e.g. Ramp(4, 1).")

    def __call__(self, progress: float) -> float:
        """Return the weight when this share of the training is done."""
        return self.start + (self.end - self.start) * min(progress / self.until, 1.0)


Weight = float | Callable[[float], float]


def weight_at(weight: Weight, progress: float, term: str) -> float:
    """Return the weight of a term when this share of the training is done.

    Raises:
        DistillError: the function returns something else than a number.
    """
    found: Any = weight(progress) if callable(weight) else weight
    found = found.item() if isinstance(found, Tensor) and not found.ndim else found
    if isinstance(found, bool) or not isinstance(found, Real):
        raise DistillError(
            f"the weight of {term!r} is {shown(found)} after {progress:.3g} of the training, and a number is needed; "
            f"return one, as weights={{{term!r}: Ramp(4, 1)}}."
        )
    return float(found)


def describe_function(function: Callable[..., object]) -> str:
    """Return a text for a function that is the same in every process.

    >>> from functools import partial
    >>> describe_function(partial(pow, 2))
    'partial(pow, 2)'
    """
    if isinstance(function, partial):
        settings = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in function.keywords.items())]
        return f"partial({', '.join([describe_function(function.func), *settings])})"
    return getattr(function, "__qualname__", None) or repr(function)
