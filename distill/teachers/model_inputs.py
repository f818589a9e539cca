"""The inputs of a model as named columns and back, and their move to another device."""

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from interventions import Location


def columns_of(inputs: Any) -> dict[str, Tensor]:
    """Return the inputs of a model as columns by name; inputs given by position get their number as name."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    return {str(number): column for number, column in enumerate(inputs if isinstance(inputs, tuple) else (inputs,))}


def inputs_from(columns: Mapping[str, Tensor]) -> Any:
    """Return what a model is called with, from the columns that `columns_of` made of it."""
    return tuple(columns.values()) if "0" in columns else dict(columns)


def device_of_inputs(inputs: Any) -> torch.device:
    """Return the device of the inputs of a model."""
    return next(iter(columns_of(inputs).values())).device


def move(value: Any, device: torch.device) -> Any:
    """Return a value with its tensors on a device: a tensor, a dict, a tuple, or an operator that holds tensors."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: move(each, device) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(move(each, device) for each in value)
    if is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Location):  # an operator
        tensors = {name: each.to(device) for name, each in vars(value).items() if isinstance(each, Tensor)}
        return replace(value, **tensors) if tensors else value
    return value
