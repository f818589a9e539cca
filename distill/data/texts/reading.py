"""Rows of texts and chats, from files, lists of dicts, columns, frames and data sets of Hugging Face."""

import csv
import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distill.data import tables
from distill.data.draws import is_frame, is_hugging_face
from distill.data.texts.chats import CHATS, PROMPT, TEXT
from distill.data.texts.given import first_value, is_transformed
from distill.errors import DistillError
from interventions import shown

LABELS = frozenset({"label", "labels"})
TOKENS = "input_ids"
USED_TOO = "tools"


@dataclass(frozen=True, eq=False)
class TextRows:
    """Rows of texts or chats.

    Attributes:
        columns: the columns that are read: `messages`, `conversations`, `prompt` and `completion`, or one of texts.
        others: the other columns.
        data: a list of dicts, columns by name, or a data set that is iterated in dicts.
        source: what errors call the data.
        first: the number of the first row: 1 in files.
    """

    columns: tuple[str, ...]
    others: tuple[str, ...]
    data: Any
    source: str
    first: int = 0

    @property
    def is_chat(self) -> bool:
        """True for rows with completions."""
        return self.columns in (*CHATS, PROMPT)

    def __len__(self) -> int:
        return len(next(iter(self.data.values()))) if isinstance(self.data, Mapping) else len(self.data)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        read = (*self.columns, *(name for name in self.others if name == USED_TOO))
        if isinstance(self.data, Mapping):
            values = zip(*(self.data[name] for name in read), strict=True)
            yield from (dict(zip(read, row, strict=True)) for row in values)
            return
        for row, name in zip(self.data, self.names(), strict=False):
            lost = next((each for each in self.columns if not isinstance(row, Mapping) or row.get(each) is None), None)
            if lost is not None:
                raise DistillError(
                    f"{name} has no {lost!r}: {shown(row)}; write one, or leave the row out, as every row needs "
                    f"{' and '.join(map(repr, self.columns))}."
                )
            yield {each: row[each] for each in read if each in row}

    def values(self, column: str) -> list[Any]:
        """Return the values of one of the other columns.

        Raises:
            DistillError: a column that does not exist.
        """
        known = (*self.columns, *self.others)
        if column not in known:
            raise DistillError(
                f"{self.source} has no column {column!r}: its columns are {', '.join(map(repr, known))}; name one of "
                "them."
            )
        return list(self.data[column]) if isinstance(self.data, Mapping) else [row[column] for row in self.data]

    def part(self, columns: Mapping[str, Any]) -> "TextRows":
        """Return rows of the same kind with other values."""
        return replace(self, data=columns)

    def names(self) -> Iterator[str]:
        """Yield what errors call each row."""
        return (f"row {number + self.first} of {self.source}" for number in range(len(self)))


def kind_of_texts(data: Any, text: str | None = None) -> str | None:
    """Return "chat" for prompts with completions, "text" for texts, "labelled" for texts with labels, else None.

    Args:
        data: what `text_rows` takes; of a file only the beginning is read.
        text: the column of texts, "text" where none is named.
    """
    if isinstance(data, str | Path):
        names = _head(Path(data)) if Path(data).is_file() else ()
        columns = _columns(names, text)
    else:
        found = text_rows(data, text)
        columns, names = (None, ()) if found is None else (found.columns, (*found.columns, *found.others))
    if columns is None:
        return None
    return "chat" if columns in (*CHATS, PROMPT) else "labelled" if LABELS & set(names) else "text"


def text_rows(data: Any, text: str | None = None) -> TextRows | None:
    """Return data as rows of texts or chats; None where it is something else.

    Args:
        data: a file, a list of dicts, a dict of columns, a frame, or a Hugging Face Dataset.
        text: the column of texts, "text" where none is named.
    """
    if isinstance(data, str | Path):
        return _of_file(Path(data), text)
    if is_frame(data):
        data = {str(name): list(data[name]) for name in data.columns}
    if isinstance(data, Mapping):
        names = tuple(data)
    elif is_hugging_face(data) and not is_transformed(data):
        data = data.with_format(None)
        names = tuple(data.column_names)
    elif isinstance(data, list | tuple) and data and isinstance(data[0], Mapping):
        names = tuple(data[0])
    else:
        return None
    columns = _columns(names, text)
    kinds = str | list | tuple | np.ndarray if columns in (*CHATS, PROMPT) else str
    if columns is None or not all(isinstance(first_value(data, name), kinds) for name in columns):
        return None
    return TextRows(columns, tuple(name for name in names if name not in columns), data, "the data")


def _of_file(path: Path, text: str | None) -> TextRows | None:
    """Return the rows of a file; None where its columns are no texts."""
    if _columns(_head(path), text) is None:
        tables.kind_of(path)
        return None
    rows = tables.read(path)
    names = tuple(dict.fromkeys(name for row in rows for name in row if name))
    columns = _columns(names, text)
    assert columns is not None
    return TextRows(columns, tuple(name for name in names if name not in columns), rows, str(path), 1)


def _columns(names: tuple[str, ...], text: str | None) -> tuple[str, ...] | None:
    """Return the columns of texts among some; None if there are none, or tokens already."""
    if TOKENS in names:
        return None
    wanted = (*CHATS, PROMPT, TEXT) if text is None else ((text,),)
    return next((each for each in wanted if set(each) <= set(names)), None)


def _head(path: Path) -> tuple[str, ...]:
    """Return the columns of a file by its beginning; none where it cannot be read, which its reading will say."""
    try:
        kind = tables.kind_of(path)
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            if kind == ".txt":
                return TEXT
            if kind == ".jsonl":
                row = json.loads(next(line for line in file if line.strip()))
                return tuple(row) if isinstance(row, dict) else ()
            return tuple(name.strip() for name in next(csv.reader(file, delimiter="," if kind == ".csv" else "\t")))
    except (DistillError, OSError, EOFError, ValueError, StopIteration, csv.Error, RecursionError):
        return ()
