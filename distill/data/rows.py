"""Rows: a data set as columns of tensors, read from the usual kinds of data sets, and batched with padding."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape
from typing import Any, Literal, SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from distill.data.classes import Ranked, Stated, folded, matched, ranked, stated
from distill.data.clusters import check_length, split_clusters
from distill.data.columns import as_sequence, column_of, columns_of, transpose, without_texts
from distill.data.draws import DataSource, named, seeded, source_of
from distill.data.labels import are_text, check_shape, named_by, numbered, relabelled, texts_of
from distill.data.missing import filled, missing_rows, with_known_labels
from distill.data.sources.batched import is_batched
from distill.data.sources.drawn import read
from distill.data.sources.lazy_columns import (
    Column,
    LazyColumn,
    is_floating,
    is_lazy,
    is_ragged,
    read_columns,
    take_columns,
)
from distill.data.sources.stream import Stream
from distill.errors import DistillError, checked
from interventions import printable, printed, shown

# The losses of torch and transformers ignore the label -100. Padding counts as special, so that no intervention lands
# on it, and has no place in the text.
PADDING = {
    "special_tokens_mask": 1,
    "labels": -100,
    **dict.fromkeys(("starts", "ends", "teacher_starts", "teacher_ends"), -1),
}
TOKENS = ("input_ids", "decoder_input_ids")


@checked
@dataclass(frozen=True, eq=False, repr=False)
class Rows(Dataset[dict[str, Tensor]]):
    """A data set as columns: name -> tensor `[rows, ...]`, or one tensor a row, `[tokens, ...]`, if lengths differ.

    `batch` indexes a tensor column in one operation and pads a ragged one to the longest row of the batch. A column may
    also lie outside of memory, in Arrow files or with an object that makes batches; its rows are read by `batch`.

    Attributes:
        table: the columns.
        pad_id: the id that pads token ids. Labels are padded with -100, the mask of special tokens with 1, places of
            tokens in the text with -1, anything else with 0.
        padding_side: the side of the padding.
        pads: other numbers that pad, by column.
        classes: the names of the labels 0, 1, … if they are known: `fit` and the measurements then number the labels
            as the model does. None takes the labels for the numbers of the model's outputs.
        source: the data set that the rows were read from, if its rows are drawn anew in each epoch of a training.
        clusters: what the rows share, e.g. an image or a template, by numbers; −1 fills up where a row is in fewer than
            others. It is no column, so models are not given it; intervals count rows of one cluster as related. None
            where each row is independent of the others.
        stream: reads the rows of a training in order; the table holds the first of them, by which it is checked. None
            where the table holds all rows.

    Raises:
        DistillError: no rows, columns or clusters of unequal length, or ragged `input_ids` without an `attention_mask`.

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
    clusters: Int[Tensor, "rows memberships"] | None = None
    stream: Stream | None = None

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self.table.items()}
        if not any(lengths.values()):
            raise DistillError("the data has no rows; give at least one")
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name!r} {length}" for name, length in lengths.items())
            raise DistillError(f"the columns of the data differ in length: {found}; give one value a row in each")
        if "input_ids" in self.table and "attention_mask" not in self.table and is_ragged(self.table["input_ids"]):
            raise DistillError(
                "'input_ids' has rows of several lengths but the data has no 'attention_mask', so padding would be "
                "read as text; "
                "add the attention_mask that the tokenizer returns"
            )
        if self.padding_side not in ("right", "left"):
            raise DistillError(f"padding_side is {self.padding_side!r}; use 'right' or 'left'")
        if self.clusters is not None:
            check_length(self.clusters, len(self))

    @classmethod
    @checked
    def of(
        cls,
        data: Any,
        *,
        pad_id: int = 0,
        padding_side: Literal["right", "left"] = "right",
        classes: Sequence[str] | None = None,
        clusters: Tensor | str | Sequence[str] | None = None,
    ) -> "Rows":
        """Return data as Rows with the same columns, order and values; a Rows is returned as it is.

        Accepts a Rows, a Hugging Face Dataset of model inputs, a dict or frame of columns, a list of dicts, and a
        map-style torch Dataset (or list) of dicts or of `(x, y)` pairs, which become the columns "inputs" and "labels".
        Also any object with `len` and `batch(numbers)`, which returns the rows of these numbers as a batch, `{column:
        tensor [rows, ...]}`, padded by itself. Its rows, and those of a large Hugging Face Dataset, are read when they
        are used.
        A column "label" is renamed to "labels", as transformers' own collators do. Floats of Python, NumPy and Hugging
        Face become float32; tensors keep their type, except bool labels, which become 1 and 0.

        Columns of texts and records beside those of numbers are left out, with a warning that names them.

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
            clusters: what rows share: the numbers of each row, `[rows]` or `[rows, memberships]`, or the name of a
                column, or several, whose equal values are one cluster. Models are not given these columns.

        Raises:
            DistillError: data of any other kind, or clusters that are not one a row.

        >>> data = {"x": [[0.0], [1.0], [2.0]], "template": ["a is b", "is a b", "a is b"]}
        >>> rows = Rows.of(data, clusters="template")
        >>> rows.columns, rows.clusters.tolist()
        (('x',), [[0], [1], [0]])
        """
        if isinstance(data, cls):
            if clusters is not None:
                table, numbers = split_clusters(data.table, clusters)
                data = replace(data, table=table, clusters=numbers)
            return data if classes is None else data._with_classes(stated(classes))
        source = None if is_batched(data) else source_of(data)
        columns = {
            name: as_sequence(name, each)
            for name, each in named(columns_of(data) if source is None else read(source)).items()
        }
        columns, numbers = split_clusters(columns, clusters)
        columns = with_known_labels(without_texts(columns))
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
        table = {name: column_of(name, column) for name, column in columns.items()}
        source = None if source is None else replace(source, classes=known)
        rows = cls(table, pad_id, padding_side, classes=names, source=source, clusters=numbers)
        return rows if order is None or text else rows._with_classes(order)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns, in order."""
        return tuple(self.table)

    def batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """Return the rows at `indices`, in that order, as one tensor `[batch, ...]` a column."""
        return self._pad(read_columns(self.table, self._index(indices)))

    def take(self, indices: Tensor | Sequence[int]) -> "Rows":
        """Return the rows at `indices`, in that order, as Rows."""
        index = self._index(indices)
        table = take_columns(self.table, index)
        source = None if self.source is None else self.source.take(index)
        clusters = None if self.clusters is None else self.clusters[index]
        return replace(self, table=table, source=source, clusters=clusters, stream=None)

    def drawn(self, indices: Tensor | Sequence[int], epoch: int, seed: int) -> dict[str, Tensor]:
        """Return the rows at `indices` as a batch, as they are in an epoch: drawn from their source, if they have one.

        Args:
            indices: the numbers of the rows.
            epoch: the number of the epoch.
            seed: the seed of the training.

        Raises:
            DistillError: rows that cannot be read, or lack a column that they had at the first reading.
        """
        if self.source is None and not is_lazy(self.table):
            return self.batch(indices)
        if self.source is None:  # an object that makes batches may draw
            index = self._index(indices)
            with seeded(seed, epoch, int(index[0])):
                return self.batch(index)
        rows, numbers = self._index(indices).tolist(), self.source.classes
        collated = self.source.collate is not None
        read: Any = self.source.collated if collated else self.source.draw
        columns = dict(read(rows, epoch, seed)) if collated else named(transpose(read(rows, epoch, seed)))
        if lost := self.table.keys() - columns.keys():
            raise DistillError(
                f"row {rows[0]} of the data had a column {min(lost)!r} at first and has {', '.join(columns)} now; give "
                "every row the same columns in every reading."
            )
        if "labels" in self.table and missing_rows(columns["labels"]):
            columns["labels"] = filled(
                columns["labels"],
                lambda place: f"row {rows[place]} of the data",
                are_values=is_floating(self.table["labels"]) and self.table["labels"][0].ndim == 0,
            )
        if numbers is not None and "labels" in self.table:
            columns["labels"] = [relabelled(each, numbers) for each in columns["labels"]]
        table = {name: column_of(name, column) for name, column in columns.items() if name in self.table}
        return replace(self, table=table, source=None, clusters=None).batch(range(len(rows)))

    def next_of_stream(self, count: int, process: int = 0, processes: int = 1) -> tuple[dict[str, Tensor], bool]:
        """Return the share of a process in the next rows of the stream, and whether it has none.

        The first row stands in for those of a process that has none.

        Args:
            count: the number of rows of all processes together.
            process: the number of this process.
            processes: the number of processes.

        Raises:
            DistillError: a row that cannot be read.
        """
        assert self.stream is not None
        table = self.stream.take(count)
        own = range(len(next(iter(table.values()))))[process::processes]
        return self._pad(read_columns(table, torch.tensor(own or [0]))), not own

    def renumbered(self, numbers: Sequence[int], names: tuple[str, ...]) -> "Rows":
        """Return the rows with label i replaced by `numbers[i]`, and with these names; negative labels stay.

        Raises:
            DistillError: a label without a name.
        """
        labels = self.table.get("labels")
        if self.stream is not None:
            self.stream.renumber(numbers)
        if labels is None or is_floating(labels):
            return replace(self, classes=names)
        if isinstance(labels, LazyColumn):
            changed = labels.changed(partial(_renumber, numbers=tuple(numbers)))
            return replace(self, table={**self.table, "labels": changed}, classes=names)
        highest = max(int(each.max()) for each in ([labels] if isinstance(labels, Tensor) else labels) if each.numel())
        _refuse_unnamed(highest, len(numbers))
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

    @printed
    def __repr__(self) -> str:
        return f"Rows({self._heading}: {', '.join(f'{name} {kind}' for name, kind in self._kinds())})"

    def _repr_html_(self) -> str:
        lines = "".join(f"<tr><td>{escape(printable(name))}<td>{kind}" for name, kind in self._kinds())
        return f"<p>Rows: {escape(printable(self._heading))}</p><table><tr><th>column<th>each row{lines}</table>"

    @property
    def _heading(self) -> str:
        """The number of rows, and the classes of their labels."""
        few = "the first of a stream, " if self.stream is not None else ""
        names = "" if self.classes is None else f", classes {', '.join(self.classes[:4])}"
        more = ", …" if self.classes is not None and len(self.classes) > 4 else ""
        return f"{few}{len(self):,} rows{names}{more}"

    def _kinds(self) -> Iterator[tuple[str, str]]:
        """Yield the name of each column with the shape and dtype of a row, without reading rows from a store."""
        for name, column in self.table.items():
            if isinstance(column, Tensor):
                yield name, f"{list(column.shape[1:])} {str(column.dtype).removeprefix('torch.')}"
            else:
                yield name, "read when used" if isinstance(column, LazyColumn) else "of several lengths"

    def __len__(self) -> int:
        return len(next(iter(self.table.values())))

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if not isinstance(i, SupportsIndex):
            raise DistillError(f"rows[{shown(i)}] names no row; write rows[0], or rows.batch([0, 1]) for several.")
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        read = read_columns(self.table, torch.tensor([range(len(self))[i]]))
        return {name: column[0] for name, column in read.items()}

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
        index = index.long()
        least, greatest = (int(each) for each in torch.aminmax(index))
        if least < -len(self) or greatest >= len(self):
            raise DistillError(
                f"rows {least} to {greatest} are not all in data with {len(self)} rows, 0 to {len(self) - 1}"
            )
        return index % len(self)

    def _pad(self, table: Mapping[str, Column]) -> dict[str, Tensor]:
        """Return columns of rows of several lengths as one tensor each, padded to the longest row."""
        return {
            name: column
            if isinstance(column, Tensor)
            else pad_sequence(
                list(column),
                batch_first=True,
                padding_value=self.pads.get(name, self.pad_id if name in TOKENS else PADDING.get(name, 0)),
                padding_side=self.padding_side,
            )
            for name, column in table.items()
        }


def _refuse_unnamed(label: int, classes: int) -> None:
    """Raise DistillError for a label without a name."""
    if label >= classes:
        raise DistillError(
            f"the data has label {label} and names {classes} classes (0 to {classes - 1}); name one for each number."
        )


def _renumber(labels: Tensor, numbers: tuple[int, ...]) -> Tensor:
    """Return labels that were just read with label i replaced by `numbers[i]`; negative labels stay."""
    if labels.numel():
        _refuse_unnamed(int(labels.max()), len(numbers))
    return relabelled(labels, dict(enumerate(numbers)))


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
