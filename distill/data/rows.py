"""Rows: a data set as columns of tensors, read from the usual kinds of data sets, and batched with padding."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset

from distill.data.classes import Ranked, Stated, folded, matched, ranked, stated
from distill.data.draws import (
    DRAWN_TWICE,
    FIRST_READING,
    DataSource,
    is_frame,
    is_hugging_face,
    named,
    seeded,
    source_of,
    tensors,
    warn_if_unseeded,
)
from distill.data.labels import are_text, check_shape, named_by, numbered, relabelled, texts_of
from distill.errors import DistillError, checked
from interventions import shown

Column = Tensor | Sequence[Tensor]

# The losses of torch and transformers ignore the label -100. Padding counts as special, so that no intervention lands
# on it, and has no place in the text.
PADDING = {
    "special_tokens_mask": 1,
    "labels": -100,
    **dict.fromkeys(("starts", "ends", "teacher_starts", "teacher_ends"), -1),
}
TOKENS = ("input_ids", "decoder_input_ids")


@checked
@dataclass(frozen=True, eq=False)
class Rows(Dataset[dict[str, Tensor]]):
    """A data set as columns: name -> tensor `[rows, ...]`, or one 1-D tensor a row if lengths differ.

    `batch` indexes a tensor column in one operation and pads a ragged one to the longest row of the batch.

    Attributes:
        table: the columns.
        pad_id: the id that pads token ids. Labels are padded with -100, the mask of special tokens with 1, places of
            tokens in the text with -1, anything else with 0.
        padding_side: the side of the padding.
        pads: other numbers that pad, by column.
        classes: the names of the labels 0, 1, … if they are known: `fit` and the measurements then number the labels
            as the model does. None takes the labels for the numbers of the model's outputs.
        source: the data set that the rows were read from, if its rows are drawn anew in each epoch of a training.

    Raises:
        DistillError: no rows, columns of unequal length, or ragged `input_ids` without an `attention_mask`.

    >>> rows = Rows.of({"input_ids": [[5, 6], [7]], "attention_mask": [[1, 1], [1]], "labels": [1, 0]})
    >>> rows.batch([0, 1])["input_ids"]
    tensor([[5, 6],
            [7, 0]])
    """

    table: Mapping[str, Column]
    pad_id: int = 0
    padding_side: Literal["right", "left"] = "right"
    pads: Mapping[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    source: DataSource | None = None

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self.table.items()}
        if not any(lengths.values()):
            raise DistillError("the data has no rows; give at least one")
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name!r} {length}" for name, length in lengths.items())
            raise DistillError(f"the columns of the data differ in length: {found}; give one value a row in each")
        if not isinstance(self.table.get("input_ids", torch.empty(0)), Tensor) and "attention_mask" not in self.table:
            raise DistillError(
                "'input_ids' has rows of several lengths but the data has no 'attention_mask', so padding would be "
                "read as text; "
                "add the attention_mask that the tokenizer returns"
            )
        if self.padding_side not in ("right", "left"):
            raise DistillError(f"padding_side is {self.padding_side!r}; use 'right' or 'left'")

    @classmethod
    @checked
    def of(
        cls,
        data: Any,
        *,
        pad_id: int = 0,
        padding_side: Literal["right", "left"] = "right",
        classes: Sequence[str] | None = None,
    ) -> "Rows":
        """Return data as Rows with the same columns, order and values; a Rows is returned as it is.

        Accepts a Rows, a Hugging Face Dataset of model inputs, a dict or frame of columns, a list of dicts, and a
        map-style torch Dataset (or list) of dicts or of `(x, y)` pairs, which become the columns "inputs" and "labels".
        A column "label" is renamed to "labels", as transformers' own collators do. Floats of Python, NumPy and Hugging
        Face become float32; tensors keep their type, except bool labels, which become 1 and 0.

        Labels may be text; they are numbered in sorted order, and by `fit` as the model numbers its classes. The names
        of a Hugging Face `ClassLabel`, or of `class_to_idx` as torchvision has it, are kept, also through a Subset or a
        DataLoader. `classes` states the names in the order of the model's outputs instead.

        A Dataset that may draw at random (any but a list, a TensorDataset or a Hugging Face one without a transform) is
        read in order here, each row under its own seed, and drawn anew in each epoch of a training. From a DataLoader
        its data set, collation, workers and batch size are used; the order is that of the training's seed. Data without
        a length, or with its own order or choice of rows, is read once, with a warning.

        Args:
            data: any of these.
            pad_id: the id that pads token ids.
            padding_side: the side of the padding.
            classes: the names of the classes, in the order of the model's outputs.

        Raises:
            DistillError: data of any other kind.
        """
        if isinstance(data, cls):
            return data if classes is None else data._with_classes(stated(classes))
        source = source_of(data)
        columns = {
            name: _as_sequence(name, each)
            for name, each in named(_columns(data) if source is None else _read(source)).items()
        }
        order = None if classes is None else stated(classes)
        labels, known = columns.get("labels"), None
        names: tuple[str, ...] | None = None
        text = labels is not None and are_text(labels)
        if text:
            names = order or ranked(texts_of(labels))
        elif (found := named_by(data)) is not None and (source is None or source.keeps_labels()):
            names, known = found, {number: number for number in range(len(found))}
        if names is not None and labels is not None:
            check_shape(labels, columns.get("input_ids"), names)
        if names is not None and text:
            columns["labels"], known = numbered(labels, names)
        table = {name: _column(name, column) for name, column in columns.items()}
        source = None if source is None else replace(source, classes=known)
        rows = cls(table, pad_id, padding_side, classes=names, source=source)
        return rows if order is None or text else rows._with_classes(order)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns, in order."""
        return tuple(self.table)

    def batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """Return the rows at `indices`, in that order, as one tensor `[batch, ...]` a column."""
        index = self._index(indices)
        return {name: self._pad_batch(name, column, index) for name, column in self.table.items()}

    def take(self, indices: Tensor | Sequence[int]) -> "Rows":
        """Return the rows at `indices`, in that order, as Rows."""
        index = self._index(indices)
        table = {
            name: column[index] if isinstance(column, Tensor) else [column[i] for i in index.tolist()]
            for name, column in self.table.items()
        }
        return replace(self, table=table, source=None if self.source is None else self.source.take(index))

    def drawn(self, indices: Tensor | Sequence[int], epoch: int, seed: int) -> dict[str, Tensor]:
        """Return the rows at `indices` as a batch, as they are in an epoch: drawn from their source, if they have one.

        Args:
            indices: the numbers of the rows.
            epoch: the number of the epoch.
            seed: the seed of the training.

        Raises:
            DistillError: rows that cannot be read, or lack a column that they had at the first reading.
        """
        if self.source is None:
            return self.batch(indices)
        rows, numbers = self._index(indices).tolist(), self.source.classes
        collated = self.source.collate is not None
        read: Any = self.source.collated if collated else self.source.draw
        columns = dict(read(rows, epoch, seed)) if collated else named(_transpose(read(rows, epoch, seed)))
        if lost := self.table.keys() - columns.keys():
            raise DistillError(
                f"row {rows[0]} of the data had a column {min(lost)!r} at first and has {', '.join(columns)} now; give "
                "every row the same columns in every reading."
            )
        if numbers is not None and "labels" in columns:
            columns["labels"] = [relabelled(each, numbers) for each in columns["labels"]]
        table = {name: _column(name, column) for name, column in columns.items()}
        return replace(self, table=table, source=None).batch(range(len(rows)))

    def renumbered(self, numbers: Sequence[int], names: tuple[str, ...]) -> "Rows":
        """Return the rows with label i replaced by `numbers[i]`, and with these names; negative labels stay.

        Raises:
            DistillError: a label without a name.
        """
        labels = self.table.get("labels")
        if labels is None or (labels if isinstance(labels, Tensor) else labels[0]).is_floating_point():
            return replace(self, classes=names)
        highest = max(int(each.max()) for each in ([labels] if isinstance(labels, Tensor) else labels) if each.numel())
        if highest >= len(numbers):
            raise DistillError(
                f"the data has label {highest} and names {len(numbers)} classes (0 to {len(numbers) - 1}); name one "
                "for each number."
            )
        number = dict(enumerate(numbers))
        found = relabelled(labels, number) if isinstance(labels, Tensor) else [relabelled(x, number) for x in labels]
        source = self.source
        if source is not None and source.classes is not None:
            source = replace(source, classes={label: number[before] for label, before in source.classes.items()})
        return replace(self, table={**self.table, "labels": found}, classes=names, source=source)

    def _with_classes(self, order: Stated) -> "Rows":
        """Return the rows with the classes that the user states, renumbered if they are the known names."""
        own = set(map(folded, self.classes or ()))
        if not own or (not own & set(map(folded, order)) and not isinstance(self.classes, Ranked)):
            return replace(self, classes=order)
        return self.renumbered(matched(self.classes or (), order, "the names given"), order)

    def __len__(self) -> int:
        return len(next(iter(self.table.values())))

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if not isinstance(i, SupportsIndex):
            raise DistillError(f"rows[{shown(i)}] names no row; write rows[0], or rows.batch([0, 1]) for several.")
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        return {name: column[i] for name, column in self.table.items()}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[i] for i in range(len(self)))

    def _index(self, indices: Tensor | Sequence[int]) -> Tensor:
        try:
            index = torch.as_tensor(indices, device="cpu")
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            reason = str(error).split("\n")[0]
            raise DistillError(
                f"rows are chosen by a list of whole numbers and not by {shown(indices)} ({reason}); give e.g. "
                "rows.take([0, 1])."
            ) from None
        if index.ndim != 1 or not len(index) or index.is_floating_point() or index.dtype == torch.bool:
            raise DistillError(
                f"rows are chosen by a 1-D, non-empty list of integers: got shape {tuple(index.shape)} of {index.dtype}"
            )
        if index.min() < -len(self) or index.max() >= len(self):
            raise DistillError(
                f"rows {int(index.min())} to {int(index.max())} are not all in data with {len(self)} rows, 0 to "
                f"{len(self) - 1}"
            )
        return index.long()

    def _pad_batch(self, name: str, column: Column, index: Tensor) -> Tensor:
        if isinstance(column, Tensor):
            return column[index]
        pad = self.pads.get(name, self.pad_id if name in TOKENS else PADDING.get(name, 0))
        return pad_sequence(
            [column[i] for i in index.tolist()], batch_first=True, padding_value=pad, padding_side=self.padding_side
        )


def _columns(data: Any) -> Mapping[str, Any]:
    """Return the columns of data that is read once."""
    if isinstance(data, Mapping):
        if not data or any(hasattr(column, "column_names") for column in data.values()):
            raise DistillError(
                f"the data is a dict of {len(data)} data sets ({', '.join(map(repr, data))}); "
                "give one of them, as data[name]"
            )
        return data
    if is_frame(data):
        return {name: list(data[name]) for name in data.columns}
    if is_hugging_face(data):
        return data.with_format("torch", columns=data.format["columns"])[:]
    if isinstance(data, DataLoader):
        _warn_of_one_reading(data)
        with seeded(0):
            return _join([named(batch) for batch in data])
    if isinstance(data, IterableDataset) or (hasattr(data, "__iter__") and not hasattr(data, "__getitem__")):
        _warn_of_one_reading(data)
        with seeded(0):
            return _transpose(list(data))
    single = isinstance(data, Tensor | np.ndarray) and data.ndim == 0
    if isinstance(data, str) or single or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise DistillError(
            f"data of type {type(data).__name__} cannot be read as rows; "
            "give a dict of columns, a list of dicts, a datasets.Dataset, "
            "a torch Dataset with __len__ and __getitem__, or a DataLoader"
        )
    # Not `list(data)`: a map-style Dataset need not raise IndexError at its end, and its iteration would never end.
    return _transpose([data[i] for i in range(len(data))])


def _read(source: DataSource) -> Mapping[str, Any]:
    """Return all rows of a source, in order, as columns."""
    if source.collate is None:
        found = source.draw(range(len(source)), FIRST_READING, 0)
        warn_if_unseeded(source, found)
        return _transpose(found)
    warn_if_unseeded(source, source.draw(range(min(DRAWN_TWICE, len(source))), FIRST_READING, 0))
    parts = torch.arange(len(source)).split(source.size)
    return _join([source.collated(part.tolist(), FIRST_READING, 0) for part in parts])


def _join(batches: list[dict[str, Any]]) -> Mapping[str, Any]:
    """Return the columns of several batches, concatenated."""
    read = [tensors(batch) for batch in batches]
    return {name: [row for batch in read for row in batch[name]] for name in (read[0] if read else ())}


def _as_sequence(name: str, column: Any) -> Any:
    """Return a column in a form that can be indexed by number, which a column of a frame need not be."""
    if isinstance(column, str | bytes) or not isinstance(column, Iterable):
        raise DistillError(f"column {name!r} is {shown(column)}; give a value a row, as {{{name!r}: [0, 1]}}.")
    return column if isinstance(column, Tensor | np.ndarray | list | tuple) else list(column)


def _warn_of_one_reading(data: Any) -> None:
    warnings.warn(
        f"a {type(data).__name__} without length, or with an order or a choice of rows of its own, is read once: every "
        "epoch sees the same rows, in the order of the seed; for rows that are drawn anew give a Dataset with "
        "__len__ and __getitem__.",
        stacklevel=2,
    )


def _transpose(items: list[Any]) -> dict[str, list[Any]]:
    """Return rows, dicts or pairs (x, y), as columns."""
    if items and all(isinstance(item, tuple) and len(item) == 2 for item in items):
        items = [{"inputs": x, "labels": y} for x, y in items]
    for i, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise DistillError(
                f"row {i} of the data is a {type(item).__name__}; give columns, data={{'inputs': x, 'labels': y}}, or "
                "a list of dicts or (x, y) pairs, one a row"
            )
    for i, (item, following) in enumerate(pairwise(items)):
        if set(item) != set(following):
            raise DistillError(
                f"rows {i} and {i + 1} of the data have different columns: {sorted(item)} and {sorted(following)}; "
                "give every row the same"
            )
    return {name: [item[name] for item in items] for name in (items[0] if items else ())}


def _column(name: str, values: Any) -> Column:
    if isinstance(values, Tensor):
        if values.ndim == 0:
            raise DistillError(f"column {name!r} is a single number; give a value a row")
        return values.long() if name == "labels" and values.dtype == torch.bool else values
    try:
        if isinstance(values, np.ndarray) or (len(values) and isinstance(values[0], int | float)):
            return _to_model_dtype(name, torch.tensor(values))
        tensors = [
            value if isinstance(value, Tensor) else _to_model_dtype(name, torch.as_tensor(value)) for value in values
        ]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DistillError(
            f"column {name!r} cannot become a tensor ({error}); "
            "remove the column, or turn text into input_ids with a tokenizer first"
        ) from None
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1 and any(len(shape) != 1 for shape in shapes):
        raise DistillError(
            f"the rows of column {name!r} differ in shape: {shapes[0]} and {shapes[-1]}; "
            "only 1-D rows may, give the others one shape"
        )
    return torch.stack(tensors) if len(shapes) == 1 else tensors


def _to_model_dtype(name: str, values: Tensor) -> Tensor:
    """Return values that were no tensor in the dtypes of models: fp32, and int64 for labels that are whole numbers."""
    if values.dtype == torch.float64:
        return values.float()
    return values.long() if name == "labels" and not values.is_floating_point() else values


@checked
def batches(count: int, size: int) -> Iterator[Int[Tensor, " batch"]]:
    """Yield the numbers from 0 to count − 1, in order, `size` at a time.

    Raises:
        DistillError: a size below 1.
    """
    if size < 1 or count < 0:
        raise DistillError(
            f"batch_size={size} of {count} rows measures nothing; use a whole number above 0, e.g. batch_size=128."
        )
    yield from torch.arange(count).split(size)
