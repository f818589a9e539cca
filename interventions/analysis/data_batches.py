"""Data sets as verbs take them: batches of inputs one after the other, or rows that are read by their numbers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from interventions.devices import moved
from interventions.errors import InterventionError
from interventions.execution.examples import examples_in
from interventions.execution.origins import Stored
from interventions.execution.run import Inputs, Run
from interventions.models.calls import parameters_of
from interventions.models.wrappers import Model, module_of, unwrapped
from interventions.names import shown

BATCH_SIZE = 32
"""How many rows of a data set are in a batch where the caller does not say it."""


@runtime_checkable
class NumberedRows(Protocol):
    """Rows that are read by their numbers: `len(rows)`, and `rows.batch(numbers)` with a tensor for each column."""

    def __len__(self) -> int: ...

    def batch(self, numbers: Any) -> Mapping[str, Tensor]:
        """Return the rows of these numbers: {name: `[rows, …]`}."""


@dataclass(frozen=True, eq=False)
class DataBatch:
    """A batch of a data set.

    Attributes:
        number: of the batch, from 0 on.
        rows: the numbers of its rows in the data set.
        inputs: returns the inputs of the model, which are read no earlier.
    """

    number: int
    rows: range
    inputs: Callable[[], Inputs]


def are_rows(data: object) -> bool:
    """Return whether data are rows that are read by their numbers."""
    return isinstance(data, NumberedRows) and not isinstance(data, type | Mapping | Tensor)


def are_batches(model: Model, data: object) -> bool:
    """Return whether data are several batches of inputs, and not the inputs of one call.

    A tuple or a list are positional arguments of one call, unless each entry is a mapping that names arguments of the
    model.
    """
    if isinstance(data, tuple | list) and data and all(isinstance(each, Mapping) for each in data):
        names = set(_arguments(model))
        return all(len(each) > 0 and names.issuperset(each) for each in data)
    return isinstance(data, Iterable) and not isinstance(
        data, Mapping | Tensor | np.ndarray | str | bytes | tuple | list | Run | Stored
    )


def batches_of(model: Model, data: Any, batch_size: int | None = None, name: str = "data") -> Iterator[DataBatch]:
    """Yield the batches of a data set in order.

    Args:
        model: the model, whose arguments say which columns of rows are read; their tensors are moved to its device.
        data: inputs, batch by batch, or rows that are read by their numbers.
        batch_size: how many rows are in a batch; batches that are given stay as they are.
        name: of the data in errors.

    Raises:
        InterventionError: a batch size below 1; data of another kind, without rows, or with columns that the model does
            not take.
    """
    if batch_size is not None and batch_size < 1:
        raise InterventionError(f"batch_size={batch_size} holds no row; write batch_size={BATCH_SIZE}.")
    if are_rows(data):
        size = batch_size or BATCH_SIZE
        for number, first in enumerate(range(0, len(data), size)):
            rows = range(first, min(first + size, len(data)))
            yield DataBatch(number, rows, lambda rows=rows: _read(model, data, rows))  # type: ignore[misc]
        return
    if isinstance(data, Mapping | Tensor | str) or not isinstance(data, Iterable):
        raise InterventionError(
            f"{name} is one {type(data).__name__}, and an iterable of inputs is needed, one for each batch, or rows "
            "with rows.batch(numbers); write [inputs]."
        )
    first = 0
    for number, inputs in enumerate(data):
        examples = examples_in(inputs.inputs if isinstance(inputs, Run) else inputs)
        if not examples:
            raise InterventionError(
                f"batch {number} of {name} is {shown(inputs)}, which holds no rows of tensors; give the inputs of "
                "the model, batch by batch: tokenizer(texts, return_tensors='pt', padding=True)."
            )
        yield DataBatch(number, range(first, first + examples), lambda inputs=inputs: inputs)  # type: ignore[misc]
        first += examples


def _read(model: Model, data: NumberedRows, rows: range) -> Inputs:
    """Return the columns of rows that the model takes, on its device; the only column of a model that names none.

    Labels are left out, except for an encoder–decoder model that makes the inputs of its decoder from them.
    """
    columns: Any
    try:
        columns = data.batch(list(rows))
        fits = isinstance(columns, Mapping) and all(isinstance(each, Tensor) for each in columns.values())
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, InterventionError) or type(error).__module__.partition(".")[0] == "distill":
            raise
        columns, fits = error, False
    if not fits:
        found = f"{type(columns).__name__}: {columns}" if isinstance(columns, Exception) else shown(columns)
        raise InterventionError(
            f"the rows {rows[0]} to {rows[-1]} of this {type(data).__name__} were read as {found}, and a tensor for "
            "each column is needed, {'input_ids': [rows, token], …}; write a class with such a method batch(numbers), "
            "or give batches of inputs."
        )
    names = _arguments(model)
    shifts = "decoder_input_ids" in names and not any(name.startswith("decoder_input") for name in columns)
    useful = {name: each for name, each in columns.items() if name != "labels" or shifts}
    taken = {name: each for name, each in useful.items() if name in names}
    alone = next(iter(useful)) if not taken and len(useful) == 1 else None
    taken = useful if alone is not None else taken
    if not taken:
        raise InterventionError(
            f"the rows have the columns {', '.join(columns)} and the model takes {', '.join(names)}; name the columns "
            "as the arguments of the model."
        )
    wrong = next((name for name, each in taken.items() if not each.ndim or len(each) != len(rows)), None)
    if wrong is not None:
        raise InterventionError(
            f"column {wrong!r} of rows {rows[0]} to {rows[-1]} has shape {list(taken[wrong].shape)}; return one entry "
            f"for each of the {len(rows)} rows."
        )
    device = next((each.device for each in module_of(model).parameters()), torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device
    inputs = {name: moved(each, device) for name, each in taken.items()}
    return inputs if alone is None else inputs[alone]


def _arguments(model: Model) -> list[str]:
    """Return the names of the arguments of a model."""
    named = parameters_of(unwrapped(module_of(model))[-1])
    kinds = (each for each in named.values())
    return [each.name for each in kinds if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]  # type: ignore[attr-defined]


def count_of(data: Any, batch_size: int | None = None) -> int | None:
    """Return the number of batches, where the data say it."""
    if are_rows(data):
        return -(-len(data) // (batch_size or BATCH_SIZE))
    return len(data) if hasattr(data, "__len__") else None
