"""Texts as they are given in memory, with columns: lists, streams, and data sets with a transform are read once.

A tokenizer reads all texts before the training, so that what a transform or a stream would draw in a later epoch is not
seen, which one line says.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from distill.data.columns import read_once
from distill.data.draws import FIRST_READING, is_frame, is_hugging_face, seeded
from distill.data.files import PAIRS, TEXT_COLUMNS
from distill.data.sources.opening import is_list_of_files
from distill.data.sources.stream import Stream, gives_batches, is_stream
from distill.data.texts.chats import CHATS, PROMPT
from distill.errors import DistillError

TOKENS = "input_ids"
INSTRUCTIONS = ("instruction", "input", "output")
LABELS = ("label", "labels")
LOOKED_AT = 1000
"""The rows of a data set among which the first value of a column is looked for."""
NAMES = frozenset({*(name for chat in CHATS for name in chat), PROMPT[0], *TEXT_COLUMNS, *(pair[0] for pair in PAIRS)})


def with_columns(data: Any) -> Any:
    """Return texts without columns, in a stream or made by a transform as rows with columns; other data as it is.

    Args:
        data: of any kind. A list, an array or a Series of texts becomes the column "text".
    """
    if _is_list_of_texts(data) and not is_list_of_files(data):
        return {"text": list(data)}
    if is_stream(data):
        return data if gives_batches(data) else _of_state(data)
    is_indexed = hasattr(data, "__getitem__") and not isinstance(data, IterableDataset)
    if isinstance(data, Iterable) and not is_indexed and not isinstance(data, Mapping | Tensor | DataLoader):
        return _of_stream(data)
    if is_transformed(data) and len(data):
        return _of_transform(data)
    return data


def is_transformed(data: Any) -> bool:
    """Return whether data is a data set of Hugging Face with a transform, whose rows have columns of their own."""
    return is_hugging_face(data) and data.format["type"] == "custom"


def first_value(data: Any, name: str) -> Any:
    """Return the first value of a column that is not missing; None if there is none among those that are looked at.

    Args:
        data: a dict of columns, a frame, a list of dicts, or a data set of Hugging Face.
        name: the name of the column.
    """
    if is_hugging_face(data):
        values: Any = data.with_format(None)[:LOOKED_AT][name] if len(data) else ()
    elif isinstance(data, list | tuple):
        values = (row.get(name) for row in data if isinstance(row, Mapping))
    else:
        values = data[name]
    if not (hasattr(values, "__iter__") and (hasattr(values, "__getitem__") or isinstance(data, list | tuple))):
        return None
    return next((each for each in values if not _is_missing(each)), None)


def refuse_prompts_alone(data: Any) -> None:
    """Raise DistillError for prompts without completions, from which nothing is learned."""
    names = names_of(data)
    has_one = PROMPT[1] in names and not has_none(data, PROMPT[1])
    if PROMPT[0] in names and not has_one and TOKENS not in names:
        raise DistillError(
            f"the data has a column {PROMPT[0]!r} and no {PROMPT[1]!r}, so that nothing is learned; let a model "
            "write it, data=distill.Written(rows), or add it."
        )


def refuse_instructions(data: Any) -> None:
    """Raise DistillError for instructions with inputs and outputs, as of Alpaca, which no template joins by itself."""
    names = names_of(data)
    if INSTRUCTIONS[0] not in names or {TOKENS, "text", *PROMPT, *(name for chat in CHATS for name in chat)} & set(
        names
    ):
        return
    has = [name for name in INSTRUCTIONS if name in names]
    prompt = " + '\\n\\n' + ".join(f"row[{name!r}]" for name in has[:2] if name != INSTRUCTIONS[2])
    completion = f", 'completion': row[{INSTRUCTIONS[2]!r}]" if INSTRUCTIONS[2] in names else ""
    raise DistillError(
        f"the data has the columns {', '.join(map(repr, has))}, and how they make a prompt is not said; write it: "
        f"[{{'prompt': {prompt}{completion}}} for row in data]."
    )


def has_none(data: Any, name: str) -> bool:
    """Return whether all values of a column are missing; arguments are those of `first_value`."""
    if isinstance(data, list | tuple):
        values: Any = [row.get(name) for row in data if isinstance(row, Mapping)]
    else:
        values = data.with_format(None)[name] if is_hugging_face(data) else data[name]
    return all(map(_is_missing, values))


def names_of(data: Any) -> tuple[str, ...]:
    """Return the names of the columns of data, of a list of dicts those of the first; none of data that has none."""
    if isinstance(data, list | tuple):
        data = data[0] if data else {}
    names = () if is_transformed(data) else getattr(data, "column_names", None)
    names = list(data.columns) if names is None and is_frame(data) else names
    return tuple(map(str, data if names is None and isinstance(data, Mapping) else names or ()))


def _is_missing(value: Any) -> bool:
    """Return whether a value is None or no number, as frames write what is missing."""
    return value is None or (isinstance(value, float) and value != value)


def _is_list_of_texts(data: Any) -> bool:
    """Return whether data is a list, an array or a Series of texts."""
    if isinstance(data, np.ndarray):
        return data.ndim == 1 and len(data) > 0 and isinstance(data[0], str)
    is_series = hasattr(data, "to_list") and hasattr(data, "dtype")
    if not isinstance(data, list | tuple) and not is_series:
        return False
    return len(data) > 0 and isinstance(next(iter(data)), str) and all(isinstance(each, str) for each in data)


def _of_stream(data: Any) -> Any:
    """Return the rows of a stream, if they are texts or if it can be read but once; else the stream."""
    if iter(data) is not data:
        with seeded(0):
            if not _is_of_text(next(iter(data), None)):
                return data
    rows = read_once(data)
    return {"text": rows} if rows and all(isinstance(each, str) for each in rows) else _with_classes(rows, data)


def _of_state(data: Any) -> Any:
    """Return the rows of a stream with a state, if they are texts; it is left at its beginning."""
    stream = Stream(data)
    first = stream.first(1)
    stream.rewind()
    if not first or not _is_of_text(first[0]):
        return data
    rows = read_once(data)
    stream.rewind()
    return _with_classes(rows, data)


def _of_transform(data: Any) -> Any:
    """Return the rows of a data set as its transform makes them first, if they are texts; else the data set."""
    with seeded(0, FIRST_READING, 0):
        if not _is_of_text(data[0]):
            return data
    warnings.warn(
        "the transform of the data makes texts, which are read once: every epoch sees the same ones; for texts that "
        "are drawn anew let the transform make the tokens: data.with_transform(lambda rows: tokenizer(rows['text'])).",
        stacklevel=4,
    )
    rows = []
    for number in range(len(data)):
        with seeded(0, FIRST_READING, number):
            rows.append(data[number])
    return _with_classes(rows, data)


def _is_of_text(row: Any) -> bool:
    """Return whether a row is a text, or has a column of texts or chats and no tokens."""
    if not isinstance(row, Mapping):
        return isinstance(row, str)
    return TOKENS not in row and any(isinstance(row.get(name), str | list | tuple) for name in NAMES)


def _with_classes(rows: list[Any], data: Any) -> Any:
    """Return rows with the names of the classes that the data that they were read from has, if it has any."""
    features = getattr(data, "features", None) or {}
    names = next((name for name in LABELS if hasattr(features.get(name), "int2str")), None)
    if names is None or not all(isinstance(row, Mapping) and isinstance(row.get(names), int) for row in rows):
        return rows
    import datasets

    return datasets.Dataset.from_list([dict(row) for row in rows]).cast_column(names, features[names])
