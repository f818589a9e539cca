"""Positions in the examples that a causal model encodes, by the names that it gives them or by functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.causal.values import call, describe
from distill.errors import DistillError, did_you_mean

Finder = Callable[[dict[str, Tensor]], Any]
"""Finds positions from the values of the inputs: whole numbers, `[batch]` or `[batch, k]`."""


def select_positions(positions: Any, named: Mapping[str, Finder], inputs: Callable[[], dict[str, Tensor]]) -> Any:
    """Return positions in a form that `interventions` takes, those of names and functions as `[batch, k]`.

    Args:
        positions: a name, several names or numbers, a function, or positions of `interventions`, which are returned
            unchanged.
        named: the functions of the names.
        inputs: returns the values of the inputs, after a check of them.

    Raises:
        DistillError: an unknown name, or a function that returns no whole numbers `[batch]` or `[batch, k]`.
    """
    if isinstance(positions, str):
        if positions not in named:
            known = ", ".join(named) or "none"
            raise DistillError(
                f"the causal model has no position {positions!r}{did_you_mean(positions, named)}; it has {known}. "
                "Name it, as CausalModel(…, positions={'end': lambda values: …}), or give numbers of tokens."
            )
        return _find(f"the position {positions!r}", named[positions], inputs())
    if isinstance(positions, Sequence) and any(isinstance(each, str) for each in positions):
        return torch.cat([_column(each, named, inputs) for each in positions], 1)
    return _find("positions", positions, inputs()) if callable(positions) else positions


def _column(position: Any, named: Mapping[str, Finder], inputs: Callable[[], dict[str, Tensor]]) -> Tensor:
    """Return the positions of one of several names or numbers, `[batch, k]`."""
    found = select_positions(position, named, inputs)
    if isinstance(found, Tensor):
        return found
    first = next(iter(inputs().values()))
    return torch.full((len(first), 1), found, device=first.device)


def _find(what: str, function: Finder, inputs: dict[str, Tensor]) -> Tensor:
    """Return the positions that a function of the user finds for these inputs, `[batch, k]`."""
    rows = len(next(iter(inputs.values())))
    found = call(what, function, inputs)
    if not isinstance(found, Tensor) or found.ndim not in (1, 2) or len(found) != rows or found.is_floating_point():
        raise DistillError(
            f"{what} gave {describe(found)} for {rows} examples; return whole numbers [{rows}] or [{rows}, k]."
        )
    return found if found.ndim == 2 else found[:, None]
