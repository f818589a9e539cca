"""Objects of users that make batches themselves: anything with `len` and `batch(numbers)` is data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from distill.data.draws import FIRST_READING, named, seeded
from distill.data.sources.lazy_columns import LazyColumn
from distill.errors import DistillError
from interventions import InterventionError


@runtime_checkable
class Batched(Protocol):
    """Data by number: `len(data)` rows, of which `data.batch([3, 0])` are two, as `{column: tensor [2, ...]}`."""

    def __len__(self) -> int: ...

    def batch(self, numbers: Any) -> Mapping[str, Tensor]:
        """Return the rows of these numbers, in this order, padded to one length."""


def is_batched(data: Any) -> bool:
    """Return whether data makes its batches itself; a data set of Hugging Face, whose `batch` groups rows, does not."""
    return (
        isinstance(data, Batched)
        and not isinstance(data, type | Tensor | Mapping)
        and not (hasattr(data, "column_names") or hasattr(data, "to_dict"))
    )


@dataclass(frozen=True, eq=False)
class BatchStore:
    """The rows of an object that makes batches itself, read through its `batch`.

    Attributes:
        data: the object.
        names: {name of a column here: its name in the object}.
    """

    data: Batched
    names: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.data)

    def read(self, names: Sequence[str], numbers: Int[Tensor, " rows"]) -> dict[str, Tensor]:
        """Return these columns of these rows, as the object pads them.

        Raises:
            DistillError: the object fails, or makes another number of rows, or leaves a column out.
        """
        batch = _batch_of(self.data, numbers)
        lost = next((self.names[name] for name in names if self.names[name] not in batch), None)
        if lost is not None:
            raise DistillError(
                f"{_name(self.data)}.batch had a column {lost!r} at first and has {', '.join(batch)} now; give every "
                "batch the same columns."
            )
        return {name: batch[self.names[name]] for name in names}

    def lengths(self, name: str) -> None:
        """Return None: only reading shows how long rows are."""


def columns_of_batched(data: Batched) -> dict[str, LazyColumn]:
    """Return the columns of an object that makes batches itself, by those of its first row.

    Raises:
        DistillError: no rows, or a batch that is none.
    """
    if not len(data):
        raise DistillError(f"{_name(data)} has no rows; give at least one.")
    with seeded(0, FIRST_READING, 0):
        first = list(_batch_of(data, torch.tensor([0])))
    own = named(dict(zip(first, first, strict=True)))
    store = BatchStore(data, own)
    return {name: LazyColumn(store, name) for name in own}


def _batch_of(data: Batched, numbers: Int[Tensor, " rows"]) -> dict[str, Tensor]:
    """Return a batch of an object, after a check that it is one."""
    shown = f"{_name(data)}.batch of {len(numbers)} rows"
    try:
        batch = data.batch(numbers)
    except (DistillError, InterventionError):
        raise
    except Exception as error:
        why = " ".join(str(error).split()).rstrip(".;")
        raise DistillError(
            f"{shown} fails: {type(error).__name__}: {why}; look at data.batch(torch.tensor({numbers[:3].tolist()}))."
        ) from error
    if not isinstance(batch, Mapping) or not batch:
        raise DistillError(f"{shown} is a {type(batch).__name__}; return a dict {{column: tensor [rows, ...]}}.")
    for name, column in batch.items():
        if not isinstance(column, Tensor) or not column.ndim or len(column) != len(numbers):
            found = f"of shape {list(column.shape)}" if isinstance(column, Tensor) else f"a {type(column).__name__}"
            raise DistillError(
                f"{shown} has a column {name!r} that is {found}; make it a tensor with a row for each number, "
                f"[{len(numbers)}, ...]."
            )
    return dict(batch)


def _name(data: Any) -> str:
    return type(data).__name__
