"""Find the examples of a batch: the rows of inputs and activations that belong to one of them."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from interventions.errors import InterventionError
from interventions.locations import Location
from interventions.models.calls import examples_named


def examples_in(inputs: Any) -> int:
    """Return how many examples inputs hold: the rows of their tokens, else of their first tensor.

    >>> import torch
    >>> examples_in({"pixel_values": torch.zeros(64, 3), "input_ids": torch.zeros(4, 7)})
    4
    """
    named = examples_named(inputs) if isinstance(inputs, Mapping) else None
    return named if named is not None else next((len(each) for _, each in _tensors(inputs, "inputs") if each.ndim), 0)


def numbers_of(rows: Any, examples: int) -> Int[Tensor, " k"]:
    """Return the numbers of the examples `rows`, from 0 on.

    Args:
        rows: numbers of examples (a number, a range, a slice, a list or a 1-D tensor, counted from the end where
            negative), or a mask with an entry for each example.

    Raises:
        InterventionError: something else, or an example that does not exist.

    >>> numbers_of([-1, 0], 3), numbers_of(torch.tensor([True, False, True]), 3)
    (tensor([2, 0]), tensor([0, 2]))
    """
    try:
        index = torch.arange(examples)[rows] if isinstance(rows, slice) else torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError):
        index = torch.empty(0, 0, dtype=torch.long)
    fits = index.dtype != torch.bool or index.shape == (examples,)
    if index.ndim > 1 or index.is_floating_point() or index.is_complex() or not fits:
        given = f"{index.dtype} {list(index.shape)}" if isinstance(rows, Tensor) else repr(rows)
        raise InterventionError(
            f"rows={given} names no examples of this run, which has {examples}; give their numbers, run.take([0, 2]), "
            f"or a boolean mask [{examples}]."
        )
    index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.long().reshape(-1)
    wrong = index[(index < -examples) | (index >= examples)]
    if len(wrong):
        raise InterventionError(
            f"example {int(wrong[0])} is not in this run, which has {examples}: 0 to {examples - 1}, or -1, the last."
        )
    return index % examples


def check_inputs_of(inputs: Any, examples: int) -> None:
    """Raise InterventionError for inputs with a tensor that has neither one row for each example nor one for all."""
    for name, value in _tensors(inputs, "inputs"):
        if value.ndim and len(value) not in (1, examples):
            raise InterventionError(
                f"examples cannot be taken from this run: {name} has {len(value)} rows for {examples} examples; run "
                "those examples alone: run(model, inputs)."
            )


def check_rows(location: Location, rows: int, examples: int) -> None:
    """Raise InterventionError for an activation whose rows are not examples but windows, tiles or patches of them."""
    if rows != examples:
        raise InterventionError(
            f"{location} holds {rows} rows for {examples} examples (windows or parts of them), so which row "
            "belongs to which is unknown; run those examples alone: run(model, inputs, at), or name a block_output."
        )


def _tensors(value: Any, name: str) -> list[tuple[str, Tensor]]:
    """Return the tensors in a value, each with an expression for where it is."""
    if isinstance(value, Tensor):
        return [(name, value)]
    if isinstance(value, Mapping):
        return [each for key, entry in value.items() for each in _tensors(entry, f"{name}[{key!r}]")]
    if isinstance(value, tuple | list):
        return [each for i, entry in enumerate(value) for each in _tensors(entry, f"{name}[{i}]")]
    return []
