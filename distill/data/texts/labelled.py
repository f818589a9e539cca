"""Texts with labels, or without, as the rows of a classifier: frames, columns and data sets of Hugging Face."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from distill.data.clusters import split_clusters
from distill.data.columns import as_sequence
from distill.data.draws import is_frame, is_hugging_face, named
from distill.data.files import LABEL_COLUMNS, PAIRS, TEXT_COLUMNS, columns_of_texts, find_column
from distill.data.missing import are_all_missing, warn_of_no_labels
from distill.data.pad_ids import pad_id_of
from distill.data.rows import Rows
from distill.data.sources.arrow import columns_of_hugging_face, is_textual
from distill.data.text import tokenize_texts
from distill.data.texts.chats import text_of
from distill.data.texts.given import first_value, is_transformed
from distill.data.texts.on_disk import is_large, mapped
from distill.errors import DistillError

CUT = "is_cut"


def text_columns(data: Any) -> tuple[str, ...]:
    """Return the column of texts, "text" or "sentence", or the two of pairs, of data without tokens; else none."""
    names = _columns(data)
    if "input_ids" in names:
        return ()
    usual = (*((name,) for name in TEXT_COLUMNS), *PAIRS)
    return next((each for each in usual if set(each) <= set(names) and all(_is_text(data, name) for name in each)), ())


def labelled_rows(
    data: Any,
    tokenizer: Any,
    limit: int,
    first: int = 0,
    *,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    clusters: str | None = None,
    source: str = "the data",
) -> Rows:
    """Return texts, or pairs of texts, as rows of tokens, with their labels if there are any.

    Args:
        data: a data set of Hugging Face, a frame, a dict of columns or a list of dicts, with columns of texts.
        tokenizer: of the model.
        limit: the number of tokens at which texts are cut.
        first: the number of the first row in errors.
        text: the column of texts, or two of pairs; None takes the usual ones.
        label: the column of labels; None takes a usual one, if there is one.
        clusters: the column of what rows share.
        source: what errors call the data.

    Raises:
        DistillError: no rows, a column that does not exist, or a row without a text.
    """
    names = _columns(data)
    _refuse_no_table(data, names, source)
    columns = text_columns(data) if text is None else ()
    columns = columns or columns_of_texts(source, [*names], text)
    if label is not None:
        label = find_column(source, [*names], "label", label, ())
    label = label or next((name for name in LABEL_COLUMNS if name in names), None)
    if label in columns:
        raise DistillError(
            f"text and label of {source} are both the column {label!r}, which would be its own answer; name another: "
            "label=… (--label)."
        )
    if clusters is not None:
        shared = _clusters(data, find_column(source, [*names], "clusters", clusters, ()))
    read = [*columns, *(each for each in (label, clusters) if each is not None)]
    if dropped := [name for name in names if name not in read]:
        warnings.warn(
            f"of {source} only {' and '.join(map(repr, read))} is read, and {', '.join(map(repr, dropped))} not.",
            stacklevel=4,
        )
    if is_large(data):
        rows = _on_disk(data, tokenizer, limit, columns, label)
        return rows if clusters is None else replace(rows, clusters=shared)
    sides = [
        [text_of(each, f"row {number} of {source}", column) for number, each in enumerate(_values(data, column), first)]
        for column in columns
    ]
    rows = tokenize_texts(tokenizer, sides[0] if len(sides) == 1 else list(zip(*sides, strict=True)), None, limit)
    rows = rows if clusters is None else replace(rows, clusters=shared)
    if label is None:
        return rows
    labels = data.select_columns([label]) if is_hugging_face(data) else {"labels": _values(data, label)}
    return _with_labels(rows, labels)


def _refuse_no_table(data: Any, names: tuple[str, ...], source: str) -> None:
    """Raise DistillError for data without columns or rows, or with two columns of one name."""
    is_table = hasattr(data, "column_names") or is_frame(data) or isinstance(data, Mapping)
    if not names and not is_table and not (isinstance(data, list) and not data):
        raise DistillError(
            f"{source} is a {type(data).__name__} and has no columns of texts; give a frame, a list of dicts, or "
            "columns: data={'text': […], 'label': […]}, or rows of numbers to fit itself."
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DistillError(
            f"{source} has {names.count(twice)} columns called {twice!r}, and which is meant is not known; rename or "
            "remove all but one."
        )
    for name in names if isinstance(data, Mapping) else ():
        as_sequence(name, data[name])  # raises DistillError for a single value
    if not names or not (len(data[names[0]]) if isinstance(data, Mapping) else len(data)):
        raise DistillError(f"{source} has no rows; give at least one.")


def _clusters(data: Any, name: str) -> Tensor | None:
    """Return the clusters of rows by a column, of which equal values are one cluster."""
    values = _values(data, name)
    return split_clusters({name: values, "row": values}, name)[1]


def _on_disk(data: Any, tokenizer: Any, limit: int, columns: tuple[str, ...], label: str | None) -> Rows:
    """Return the texts of a large data set as rows whose tokens are read from disk when they are used."""
    from datasets import Features, List, Value

    limit = min(limit, tokenizer.model_max_length)
    inputs = [name for name in tokenizer("a", return_special_tokens_mask=True) if name != "input_ids"]
    ids = "uint16" if len(tokenizer) <= 2**16 else "int32"
    features = {"input_ids": List(Value(ids)), **{name: List(Value("uint8")) for name in inputs}, CUT: Value("bool")}
    function = partial(_encoded, tokenizer=tokenizer, limit=limit, columns=columns)
    made = mapped(data, function, (tokenizer, limit, columns), columns=[*columns], features=Features(features))
    table = columns_of_hugging_face(made.select_columns(["input_ids", *inputs]))
    cut = int(columns_of_hugging_face(made.select_columns([CUT]))[CUT].sum())
    if cut:
        warnings.warn(f"{cut} of {len(made)} texts have more than {limit} tokens and are cut there.", stacklevel=5)
    rows = Rows(table, pad_id=pad_id_of(tokenizer), padding_side=tokenizer.padding_side)
    return rows if label is None else _with_labels(rows, data.select_columns([label]))


def _encoded(
    batch: Mapping[str, list[Any]], indices: list[int], *, tokenizer: Any, limit: int, columns: tuple[str, ...]
) -> dict[str, Any]:
    """Return the inputs that a tokenizer makes of a batch of texts, or of pairs."""
    names = [f"row {number} of the data" for number in indices]
    sides = [
        [text_of(value, name, column) for value, name in zip(batch[column], names, strict=True)] for column in columns
    ]
    found = dict(tokenizer(*sides, truncation=True, max_length=limit, return_special_tokens_mask=True))
    full = [len(ids) >= limit for ids in found["input_ids"]]
    long = [[text for text, is_full in zip(texts, full, strict=True) if is_full] for texts in sides]
    whole = iter(tokenizer(*long, verbose=False)["input_ids"] if long[0] else ())
    return {**found, CUT: [is_full and len(next(whole)) > limit for is_full in full]}


def _with_labels(rows: Rows, labels: Any) -> Rows:
    """Return rows with labels that a data set, or a column by name, has for them, and with the names of its classes."""
    if is_hugging_face(labels):
        (name,) = labels.column_names
        labels = labels.rename_column(name, "labels") if name != "labels" else labels
    read = columns_of_hugging_face(labels) if is_hugging_face(labels) else named(labels)
    if are_all_missing(read["labels"]):
        warn_of_no_labels(len(rows))
        return rows
    texts = read["labels"] if isinstance(read["labels"], list) else ()
    if texts and all(each is None or isinstance(each, str) for each in texts):
        labels = {"labels": [each if each is None else each.strip() for each in texts]}
    found = Rows.of(labels)
    column: Tensor | Any = found.table["labels"]
    if isinstance(column, Tensor) and column.ndim == 1 and not column.is_floating_point():
        column = column.long()
    table: dict[str, Any] = {**rows.table, "labels": column}
    return replace(rows, table=table, classes=found.classes)


def _columns(data: Any) -> tuple[str, ...]:
    """Return the names of the columns of data; none of data that has none."""
    if is_hugging_face(data):
        return () if is_transformed(data) else tuple(data.column_names)
    if is_frame(data):
        return tuple(map(str, data.columns))
    if isinstance(data, Mapping):
        return tuple(map(str, data))
    is_rows = isinstance(data, list | tuple) and bool(data) and isinstance(data[0], Mapping)
    return tuple(map(str, data[0])) if is_rows else ()


def _is_text(data: Any, name: str) -> bool:
    """Return whether a column holds texts, by its type or its first value."""
    if is_hugging_face(data):
        return is_textual(data.features[name]) and str(getattr(data.features[name], "dtype", "")).endswith("string")
    return isinstance(first_value(data, name), str)


def _values(data: Any, name: str) -> list[Any]:
    """Return a column as a list.

    Raises:
        DistillError: a row that lacks it.
    """
    if isinstance(data, list | tuple):
        lost = next((number for number, row in enumerate(data) if name not in row), None)
        if lost is not None:
            raise DistillError(f"row {lost} of the data has no {name!r}; give every row the same columns.")
        return [row[name] for row in data]
    return list(data.with_format(None)[name] if is_hugging_face(data) else data[name])
