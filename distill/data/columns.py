"""The reading of the usual kinds of data sets as columns of tensors, or of one 1-D tensor a row."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from distill.data.draws import (
    is_frame,
    is_hugging_face,
    named,
    seeded,
    tensors,
)
from distill.data.sources.arrow import OtherColumn, columns_of_hugging_face
from distill.data.sources.batched import columns_of_batched, is_batched
from distill.data.sources.lazy_columns import Column, LazyColumn
from distill.errors import DistillError
from interventions import shown

MOST_OF_STREAM = 2**30
"""The bytes of a stream that are read into memory at most."""


def columns_of(data: Any) -> Mapping[str, Any]:
    """Return the columns of data that is read once."""
    if isinstance(data, Mapping):
        if not data or any(hasattr(column, "column_names") for column in data.values()):
            raise DistillError(
                f"the data is a dict of {len(data)} data sets ({', '.join(map(repr, data))}); "
                "give one of them, as data[name]"
            )
        return data
    if is_frame(data):
        if len(set(data.columns)) < len(data.columns):
            twice = next(name for name in data.columns if list(data.columns).count(name) > 1)
            raise DistillError(
                f"the data has {list(data.columns).count(twice)} columns called {twice!r}, and which is meant is not "
                "known; rename or remove all but one."
            )
        return {name: list(data[name]) for name in data.columns}
    if is_hugging_face(data):
        return columns_of_hugging_face(data)
    if is_batched(data):
        return columns_of_batched(data)
    if isinstance(data, DataLoader):
        _warn_of_one_reading(data)
        with seeded(0):
            return join([named(batch) for batch in data])
    if isinstance(data, IterableDataset) or (hasattr(data, "__iter__") and not hasattr(data, "__getitem__")):
        return transpose(read_once(data))
    single = isinstance(data, Tensor | np.ndarray) and data.ndim == 0
    if isinstance(data, str) or single or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise DistillError(
            f"data of type {type(data).__name__} cannot be read as rows; "
            "give a dict of columns, a list of dicts, a datasets.Dataset, "
            "a torch Dataset with __len__ and __getitem__, or a DataLoader"
        )
    # Not `list(data)`: a map-style Dataset need not raise IndexError at its end, and its iteration would never end.
    return transpose([data[i] for i in range(len(data))])


def join(batches: list[dict[str, Any]]) -> Mapping[str, Any]:
    """Return the columns of several batches, concatenated."""
    read = [tensors(batch) for batch in batches]
    return {name: [row for batch in read for row in batch[name]] for name in (read[0] if read else ())}


def as_sequence(name: str, column: Any) -> Any:
    """Return a column in a form that can be indexed by number, which a column of a frame need not be."""
    if isinstance(column, str | bytes) or not isinstance(column, Iterable):
        raise DistillError(f"column {name!r} is {shown(column)}; give a value a row, as {{{name!r}: [0, 1]}}.")
    kept = Tensor | np.ndarray | list | tuple | LazyColumn | OtherColumn
    return column if isinstance(column, kept) else list(column)


def without_texts(columns: dict[str, Any]) -> dict[str, Any]:
    """Return the columns without those that models cannot be given, as texts or records; they are named in a warning.

    Labels may be text. Where nothing else is left, all columns are returned, and what becomes of them says the error.
    """
    dropped = [name for name, column in columns.items() if name != "labels" and _holds_no_number(column)]
    kept = {name: column for name, column in columns.items() if name not in dropped}
    if not dropped or not kept.keys() - {"labels"}:
        return columns
    warnings.warn(
        f"the columns {', '.join(map(repr, dropped))} hold no numbers, which models could be given, and are left out; "
        f"those that stay are {', '.join(map(repr, kept))}.",
        stacklevel=4,
    )
    return kept


def _holds_no_number(column: Any) -> bool:
    """Return whether a column is one of texts, bytes, dates or records, by its first value that is not missing."""
    if isinstance(column, OtherColumn):
        return True
    if isinstance(column, Tensor | LazyColumn) or (isinstance(column, np.ndarray) and column.dtype.kind in "biufc"):
        return False
    first = next((each for each in column if not (each is None or (isinstance(each, float) and each != each))), 0)
    while isinstance(first, list | tuple) and len(first):
        first = first[0]
    return isinstance(first, str | bytes | Mapping | date)


def read_once(stream: Iterable[Any]) -> list[Any]:
    """Return all rows of a stream, with a warning.

    Raises:
        DistillError: it has more than memory is meant for.
    """
    _warn_of_one_reading(stream)
    with seeded(0):
        return list(_bounded(stream))


def _bounded(stream: Iterable[Any]) -> Iterator[Any]:
    """Yield the rows of a stream, as far as memory is meant for them.

    Raises:
        DistillError: it has more.
    """
    size = 0
    for number, row in enumerate(stream):
        values = row.values() if isinstance(row, Mapping) else row if isinstance(row, list | tuple) else ()
        size += sum(bytes_of(each) for each in values)
        if size > MOST_OF_STREAM:
            raise DistillError(
                f"a {type(stream).__name__} is read once, into memory, and its first {number} rows fill the "
                f"{MOST_OF_STREAM // 2**20} MiB that are meant for it; write it to disk, where rows are read when they "
                "are used: datasets.Dataset.from_generator(lambda: iter(stream)).save_to_disk('folder'), and give "
                f"data='folder', or take its beginning: stream.take({number // 2})."
            )
        yield row


def bytes_of(value: Any) -> int:
    """Return about how many bytes a value of a row takes as a tensor."""
    if isinstance(value, Tensor | np.ndarray):
        return int(value.nbytes)
    return 8 * len(value) if isinstance(value, list | tuple | str | bytes) else 8


def _warn_of_one_reading(data: Any) -> None:
    warnings.warn(
        f"a {type(data).__name__} without length, or with an order or a choice of rows of its own, is read once: every "
        "epoch sees the same rows, in the order of the seed; for rows that are drawn anew give a Dataset with "
        "__len__ and __getitem__.",
        stacklevel=3,
    )


def transpose(items: list[Any], first: int = 0) -> dict[str, list[Any]]:
    """Return rows, dicts or pairs (x, y), as columns; `first` is the number of the first row in errors."""
    if items and all(isinstance(item, tuple) and len(item) == 2 for item in items):
        items = [{"inputs": x, "labels": y} for x, y in items]
    for i, item in enumerate(items, first):
        if not isinstance(item, Mapping):
            raise DistillError(
                f"row {i} of the data is a {type(item).__name__}; give columns, data={{'inputs': x, 'labels': y}}, or "
                "a list of dicts or (x, y) pairs, one a row"
            )
    for i, (item, following) in enumerate(pairwise(items), first):
        if set(item) != set(following):
            raise DistillError(
                f"rows {i} and {i + 1} of the data have different columns: {sorted(item)} and {sorted(following)}; "
                "give every row the same"
            )
    return {name: [item[name] for item in items] for name in (items[0] if items else ())}


def column_of(name: str, values: Any) -> Column:
    """Return a column as a tensor, or as one tensor a row where their first axis, of tokens, differs in length.

    Raises:
        DistillError: values that are no numbers, or of shapes that cannot stand in one column.
    """
    if isinstance(values, LazyColumn):
        return values.changed(_without_bool) if name == "labels" else values
    if isinstance(values, Tensor):
        if values.ndim == 0:
            raise DistillError(f"column {name!r} is a single number; give a value a row")
        return _without_bool(values) if name == "labels" else values
    try:
        if isinstance(values, np.ndarray) or (len(values) and isinstance(values[0], int | float)):
            return _to_model_dtype(name, torch.tensor(values))
        values = _like_others(values)
        tensors = [
            value if isinstance(value, Tensor) else _to_model_dtype(name, torch.as_tensor(value)) for value in values
        ]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DistillError(
            f"column {name!r} cannot become a tensor ({error}); "
            "remove the column, or turn text into input_ids with a tokenizer first"
        ) from None
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1 and (not all(shapes) or len({shape[1:] for shape in shapes}) > 1):
        raise DistillError(
            f"the rows of column {name!r} differ in shape: {shapes[0]} and {shapes[-1]}; "
            "only the first axis, of tokens, may differ; give the others one size"
        )
    return torch.stack(tensors) if len(shapes) == 1 else tensors


def _like_others(values: Any) -> Any:
    """Return rows with those that are empty lists, which have no type, as tensors of the type of the others."""
    empty = [isinstance(value, list | tuple) and not len(value) for value in values]
    if not any(empty) or all(empty):
        return values
    first = torch.as_tensor(values[empty.index(False)])
    none = first.new_empty(0, *first.shape[1:])
    return [none if is_empty else value for value, is_empty in zip(values, empty, strict=True)]


def _without_bool(values: Tensor) -> Tensor:
    """Return labels that are yes or no as 1 and 0."""
    return values.long() if values.dtype == torch.bool else values


def _to_model_dtype(name: str, values: Tensor) -> Tensor:
    """Return values that were no tensor in the dtypes of models: fp32, and int64 for labels that are whole numbers."""
    if values.dtype == torch.float64:
        return values.float()
    return values.long() if name == "labels" and not values.is_floating_point() else values
