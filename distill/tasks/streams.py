"""Streams as rows of a training: iterable data sets with a state, read step by step, texts tokenized on the way."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from distill.data.columns import transpose
from distill.data.draws import named
from distill.data.labels import are_text, named_by
from distill.data.missing import filled, missing_rows, warn_of_missing
from distill.data.rows import Rows
from distill.data.sources.lazy_columns import Column, is_floating
from distill.data.sources.stream import Stream, is_stream
from distill.data.text import need_tokenizer
from distill.data.texts.labelled import labelled_rows, text_columns
from distill.data.texts.language import Reader
from distill.data.texts.reading import TextRows, text_rows
from distill.errors import DistillError
from distill.models.inputs import vocabulary_of
from distill.tasks import language
from distill.tasks.named import length_for, tokenizer_of

LOOKED_AT = 32
"""The first rows of a stream, by which models, columns and labels are checked before the first step."""


def streamed(data: Any, model: Any, tokenizer: Any = None) -> Any:
    """Return a stream as rows: its first ones, and `stream`, which reads the others in order; other data as it is.

    Args:
        data: an iterable data set with `state_dict` and `load_state_dict`, or any other data.
        model: decides how texts are read, as those in memory are.
        tokenizer: of the model; None is the one saved with it.

    Raises:
        DistillError: no rows, or rows that a model cannot be given.
    """
    if not is_stream(data):
        return data
    stream = Stream(data)
    first = stream.first(LOOKED_AT)
    columns = named(transpose(first))
    if "labels" in columns and are_text(columns["labels"]):
        raise DistillError(
            f"the labels of the {stream.name} are texts, of which only reading all rows would show the classes; make "
            "them numbers: data.map(lambda row: {**row, 'label': names.index(row['label'])})."
        )
    form = _form_of(columns, model, tokenizer)
    rows = form.rows(columns, 0)
    labels = rows.table.get("labels")
    real = labels is not None and is_floating(labels) and labels[0].ndim == 0
    stream.read = _Reading(form, rows.columns, real).read
    return replace(rows, classes=named_by(data) if "labels" in rows.columns else None, stream=stream)


@dataclass(frozen=True)
class _Columns:
    """Rows of numbers."""

    def rows(self, columns: Mapping[str, Any], first: int) -> Rows:
        """Return all rows."""
        return Rows.of(columns)

    def some(self, columns: Mapping[str, Any], first: int) -> tuple[Mapping[str, Column], Sequence[int]]:
        """Return the columns of all rows, and their numbers."""
        rows = self.rows(columns, first)
        return rows.table, range(first, first + len(rows))


@dataclass(frozen=True)
class _Labelled(_Columns):
    """Texts for a classifier.

    Attributes:
        tokenizer: of the model.
        limit: the number of tokens at which texts are cut.
    """

    tokenizer: Any
    limit: int

    def rows(self, columns: Mapping[str, Any], first: int) -> Rows:
        """Return all rows."""
        return labelled_rows(columns, self.tokenizer, self.limit, first)


@dataclass(frozen=True)
class _Language(_Columns):
    """Texts or chats for a language model.

    Attributes:
        reader: makes tokens of them.
    """

    reader: Reader

    def rows(self, columns: Mapping[str, Any], first: int) -> Rows:
        """Return the rows that have a token to learn, of which there must be one."""
        return self.reader.rows(_texts(columns, first))

    def some(self, columns: Mapping[str, Any], first: int) -> tuple[Mapping[str, Column], Sequence[int]]:
        """Return the rows that have a token to learn, and their numbers."""
        found = _texts(columns, first)
        tokens, cut = self.reader.tokens(found)
        kept = len(tokens)
        if cut or kept < len(found):
            _say_what_is_lost(cut, len(found) - kept, self.reader.limit)
        table = tokens.rows(self.reader.tokenizer, range(kept), None, None).table if kept else {}
        return table, [first + number for number in tokens.numbers]


@dataclass(frozen=True)
class _Reading:
    """The way from rows to columns, the same for all rows of a stream.

    Attributes:
        form: of the rows.
        columns: the names of those that the first rows have.
        real: whether their labels are real values, a number a row.
        warned: the warnings so far, without their numbers.
    """

    form: _Columns
    columns: Sequence[str]
    real: bool = False
    warned: set[str] = field(default_factory=set)

    def read(self, rows: Sequence[Any], first: int) -> tuple[Mapping[str, Column], Sequence[int]]:
        """Return the columns of rows that follow each other, and the numbers of the rows in them.

        Raises:
            DistillError: rows without a column that the first ones have.
        """
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            columns = named(transpose(list(rows), first))
            if "labels" in columns and "labels" in self.columns:
                columns["labels"] = self._filled(columns["labels"], first)
            table, numbers = self.form.some(columns, first)
        for each in said:
            kind = re.sub(r"\d+", "", str(each.message))
            if kind not in self.warned:
                self.warned.add(kind)
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        lost = [name for name in self.columns if name not in table] if numbers else []
        if lost:
            raise DistillError(
                f"row {first} of the data has no column {lost[0]!r}, which the first rows have; give every row the "
                f"same columns: {', '.join(self.columns)}."
            )
        return {name: table[name] for name in self.columns} if numbers else {}, numbers

    def _filled(self, labels: Any, first: int) -> Any:
        """Return labels with −100 for those that are missing, with a warning."""
        if missing := missing_rows(labels):
            warn_of_missing(len(missing), len(labels), f"row {first + missing[0]} of the data")
        return filled(labels, lambda place: f"row {first + place} of the data", are_values=self.real)


def _form_of(columns: Mapping[str, Any], model: Any, tokenizer: Any) -> _Columns:
    """Return the form of rows by the first of them."""
    is_language = language.for_model(columns, model)
    if not is_language and (vocabulary_of(model) is None or not text_columns(columns)):
        return _Columns()
    tokenizer = tokenizer or tokenizer_of(model)
    need_tokenizer("text", tokenizer)
    if not is_language:
        return _Labelled(tokenizer, length_for(model))
    return _Language(Reader(tokenizer, language.longest_for(model)))


def _texts(columns: Mapping[str, Any], first: int) -> TextRows:
    """Return columns as texts or chats whose first row has a number.

    Raises:
        DistillError: the first row has none.
    """
    found = text_rows(columns)
    if found is None:
        raise DistillError(
            f"row {first} of the data has no text ({', '.join(columns)}); write one, or leave the row out."
        )
    return replace(found, first=first)


def _say_what_is_lost(cut: int, left: int, limit: int) -> None:
    """Warn of rows that are cut or left out."""
    parts = [f"rows have more than {limit} tokens and are cut there"] if cut else []
    parts += [f"rows have no token to learn among their first {limit} and are left out"] if left else []
    warnings.warn(f"of the data {' and '.join(parts)}.", stacklevel=2)
