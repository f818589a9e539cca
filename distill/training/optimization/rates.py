"""The learning rate over the steps: a rise, and a decay by name, by shares of the training, or by a function.

Step n of N, counted from 0, with a rise of w steps, has the learning rate

    lr · min((n + 1) / w, 1) · f(n / N)

for a function f, and that of `transformers.get_scheduler` for the names of its schedules.
"""

from collections.abc import Callable
from functools import lru_cache
from math import cos, isfinite, pi
from typing import Any

import torch

from distill.errors import DistillError
from distill.objectives.term_weights import describe_function
from interventions import shown

DECAYS = ("linear", "cosine", "constant")


def check_decay(decay: Any) -> None:
    """Raise DistillError for what is no decay of a learning rate."""
    if isinstance(decay, str):
        if decay not in DECAYS:
            shape_of(decay, 1, 10, 1.0)
    elif not callable(decay) and (not decay or not all(0 < share < 1 for share in decay)):
        raise DistillError(f"decay={decay} must be shares of the training, between 0 and 1, as (0.5, 0.75).")


def share_of_rate(decay: Any, step: int, total: int, rise: int, lr: float) -> float:
    """Return the share of the learning rate that a step has.

    Args:
        decay: a name, shares of the training, or a function of the share that is done.
        step: its number, from 0.
        total: the number of steps.
        rise: the number of steps in which the learning rate rises.
        lr: the learning rate; "polynomial" ends at one that is not a share of it.
    """
    if isinstance(decay, str) and decay not in DECAYS:
        return float(shape_of(decay, rise, total, lr)(step))
    rise = max(1, rise)
    rising = (step + 1) / rise
    if callable(decay):
        return min(rising, 1.0) * _value(decay, step / total)
    return min(rising, _left(decay, step, total, rise), 1.0)


@lru_cache(maxsize=16)
def shape_of(name: str, rise: int, total: int, lr: float) -> Callable[[int], float]:
    """Return a schedule of transformers as a function of the step.

    Raises:
        DistillError: there is none of this name that is a function of the step alone.
    """
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    known = [each.value for each in TYPE_TO_SCHEDULER_FUNCTION]
    why = ""
    if name in known:
        try:
            made: Any = get_scheduler(name, optimizer, num_warmup_steps=rise, num_training_steps=total)
            found: Callable[[int], float] = made.lr_lambdas[0]
            return found
        except AttributeError:
            why = f"{name!r} of transformers follows a figure and not the step"
        except (TypeError, ValueError) as error:
            why = f"{name!r} of transformers needs settings of its own ({' '.join(str(error).split())})"
    names = ", ".join(
        dict.fromkeys((*DECAYS, "cosine_with_restarts", "polynomial", "inverse_sqrt", "constant_with_warmup"))
    )
    raise DistillError(
        f"decay={name!r:.60} is none of {names}{f', and {why}' if why else ''}; choose one, shares of the training, as "
        "decay=(0.5, 0.75), or a function of the share that is done: decay=lambda share: 1 - share."
    )


def _left(decay: Any, step: int, total: int, rise: int) -> float:
    """Return the share of the learning rate that a decay leaves at a step."""
    if not isinstance(decay, str):
        return float(0.1 ** sum(step >= share * total for share in decay))
    if decay == "constant":
        return 1.0
    left = (total - step) / max(1, total - rise)
    return left if decay == "linear" else (1 - cos(pi * min(left, 1.0))) / 2


def _value(decay: Callable[[float], Any], share: float) -> float:
    """Return what a function gives for a share of the training."""
    value = decay(share)
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
        raise DistillError(
            f"decay={describe_function(decay)} gave {shown(value)} at {share:.3g} of the training; give a finite "
            "number that is not below 0, by which the learning rate is multiplied."
        )
    return float(value)
