"""Data sets that are named, by a path, a pattern or a hub id, and dicts of data sets: their splits, as a task."""

import re
from collections.abc import Sequence
from dataclasses import replace
from glob import has_magic
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.classes import Ranked, Stated, ranked
from distill.data.files import LABEL_COLUMNS, classes_of, columns_of_texts
from distill.data.missing import IGNORED
from distill.data.rows import Rows
from distill.data.sources.opening import Splits, opened_file, splits_of
from distill.data.task import Task, fine_tuning, share
from distill.data.text import MAX_LENGTH, need_tokenizer
from distill.data.texts.given import (
    first_value,
    names_of,
    refuse_instructions,
    refuse_prompts_alone,
    with_columns,
)
from distill.data.texts.labelled import labelled_rows, text_columns
from distill.data.texts.lengths import refuse_empty_rows
from distill.errors import DistillError
from distill.models.inputs import innermost, vocabulary_of
from distill.models.numbering import numbered_as
from distill.models.pad_tokens import longest_input
from distill.models.preprocessors import preprocessors_of, tokenizer_among
from distill.tasks import language
from distill.writing.written import Written

MOST_HELD_OUT, SHARE, SPLIT_SEED = 1000, 0.2, 0
"""Rows that are held out of a data set without a split to measure on: a share of them, and not more than so many."""


def as_rows(data: Any, model: Any, tokenizer: Any = None) -> Rows:
    """Return data as rows: texts and chats as the model reads them, others as `Rows.of` does."""
    rows = Rows.of(texts_read(data, model, tokenizer))
    refuse_empty_rows(rows)
    return rows


def texts_read(data: Any, model: Any, tokenizer: Any = None) -> Any:
    """Return texts and chats in memory, or in a data set, as the rows that a model reads; other data as it is."""
    if data is None or isinstance(data, str | Path | Rows | Task | Written):
        return data
    data = with_columns(data)
    if language.for_model(data, model):
        return language.rows_for_model(data, model, tokenizer)
    if vocabulary_of(model) is None:
        return data
    if not text_columns(data):
        refuse_prompts_alone(data)
        refuse_instructions(data)
        _refuse_other_texts(data)
        return data
    tokenizer = tokenizer or tokenizer_of(model)
    need_tokenizer("text", tokenizer)
    return labelled_rows(data, tokenizer, length_for(model))


def _refuse_other_texts(data: Any) -> None:
    """Raise DistillError for data whose columns are texts or labels alone, under names that are not known."""
    names = [name for name in names_of(data) if name not in LABEL_COLUMNS]
    if names and all(isinstance(first_value(data, name), str) for name in names):
        columns_of_texts("the data", list(names_of(data)), None)


def task_of_splits(splits: Splits, model: Any, tokenizer: Any = None) -> Task:
    """Return the task of a data set that was named, its classes not renumbered.

    Its test rows are the split for validation, or else for tests; without one some of the rows are held out.
    """
    train = as_rows(splits.to_train_on, model, tokenizer)
    if splits.held_out is None:
        train, test = divided(train)
    else:
        test = _numbered_as(as_rows(splits.held_out, model, tokenizer), train)
    return task_of_rows(splits.name, train, test, tokenizer or tokenizer_of(model))


def labelled_task(
    data: Any,
    tokenizer: Any,
    *,
    eval_data: Any = None,
    fraction: float = 1.0,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    max_length: int | None = None,
    split_seed: int = SPLIT_SEED,
    **columns: Any,
) -> Task:
    """Return a task of texts with labels: of a data set that is named, or of a frame, columns, rows or data set.

    Args:
        data: the data set, or its splits. Without a split to measure on, as many rows are held out as
            `task_of_splits` takes.
        tokenizer: of the model.
        eval_data: the rows to test on, in any of these forms.
        fraction: the share of the training rows to keep, drawn by `seed`.
        seed: seeds that draw.
        classes: the labels in the order of the model's outputs.
        max_length: texts are cut at this number of tokens.
        split_seed: seeds the draw of rows that are held out.
        columns: the columns of texts, labels and clusters, as `labelled_rows` takes them.

    Raises:
        DistillError: no tokenizer, no column of texts, or labels that are neither classes nor numbers.
    """
    need_tokenizer("text", tokenizer)
    splits = _opened(data)
    other = None if eval_data is None else _opened(eval_data)
    limit = min(MAX_LENGTH if max_length is None else max_length, tokenizer.model_max_length)

    def read(found: Any, name: str) -> Rows:
        rows = labelled_rows(with_columns(found), tokenizer, limit, source=name, **columns)
        refuse_empty_rows(rows)
        return rows if classes is None else Rows.of(rows, classes=classes)

    train = _with_named_classes(read(splits.to_train_on, splits.name), splits.name)
    held_out = splits.held_out if other is None else to_measure(other)
    if held_out is None:
        train, test = divided(train, split_seed)
    else:
        test = read(held_out, splits.name if other is None else other.name)
        test = _numbered_as(_with_named_classes(test, "", few=True), train)
    if fraction < 1:
        train = train.take(share(len(train), fraction, seed))
    return task_of_rows(splits.name, train, test, tokenizer, columns.get("clusters") or "")


def _opened(data: Any) -> Splits:
    """Return a data set in its splits: one that is named, the file of a table, or rows in memory."""
    if isinstance(data, Splits):
        return data
    if (splits := splits_of(data)) is not None:
        return splits
    return opened_file(data) if isinstance(data, str | Path) else Splits("the data", data)


def _with_named_classes(rows: Rows, name: str, *, few: bool = False) -> Rows:
    """Return rows whose labels, if they are a class a row by its number alone, have their numbers for names.

    Args:
        rows: texts with labels.
        name: what errors call the data.
        few: whether fewer than two classes may be there.

    Raises:
        DistillError: one class, or as many as are none.
    """
    labels = rows.table.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        return rows
    if isinstance(rows.classes, Stated):
        return rows
    known = labels[labels != IGNORED]
    if rows.classes is not None:
        if not few and isinstance(rows.classes, Ranked):
            classes_of([rows.classes[number] for number in known.tolist()], name)
        return rows
    numbers = known.unique()
    names = ranked(map(str, numbers.tolist())) if few else classes_of([str(each) for each in known.tolist()], name)
    placed = torch.where(labels == IGNORED, labels, torch.searchsorted(numbers, labels))
    return replace(rows, table={**rows.table, "labels": placed}, classes=names)


def task_of_rows(name: str, train: Rows, test: Rows, tokenizer: Any, clusters: str = "") -> Task:
    """Return the task of the rows of a data set with a name; `clusters` names what they share."""
    return Task(
        name=named_after(name),
        train=train,
        test=test,
        classes=train.classes or (),
        recipe=fine_tuning(len(train)),
        description=f"Rows of {name}.",
        tokenizer=tokenizer,
        clusters=clusters,
    )


def divided(rows: Rows, split_seed: int = SPLIT_SEED) -> tuple[Rows, Rows]:
    """Return the rows to train on and those that are held out, drawn by a seed."""
    if len(rows) < 2:
        raise DistillError("the data has one row, so none can be held out for testing; give eval_data=… or more rows.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(split_seed))
    count = min(MOST_HELD_OUT, max(1, round(len(rows) * SHARE)), len(rows) - 1)
    return rows.take(order[count:].sort().values), rows.take(order[: max(1, count)].sort().values)


def named_after(data: str) -> str:
    """Return the name of a task that its data gives it, which may be the name of a folder.

    >>> named_after("films/train.csv.gz"), named_after("films/*.csv"), named_after("org/films")
    ('train', 'films', 'films')
    """
    heads = [part.split(".")[0].removeprefix("the ") for part in Path(data).parts if not has_magic(part)]
    parts = [re.sub(r"[^\w-]+", "", head) for head in heads]
    return next((part for part in reversed(parts) if part), "data")


def named_rows(data: Any, model: Any, tokenizer: Any = None) -> Rows | None:
    """Return the rows of a named data set to measure on: the split for that, else all; None for any other data."""
    splits = splits_of(data)
    if splits is None:
        return None
    return as_rows(to_measure(splits), model, tokenizer)


def to_measure(splits: Splits) -> Any:
    """Return the split of a data set to measure on, or all of it."""
    return splits.to_train_on if splits.held_out is None else splits.held_out


def _numbered_as(test: Rows, train: Rows) -> Rows:
    """Return rows with their classes numbered as those of others."""
    return test if train.classes is None else numbered_as(test, names=train.classes)


def length_for(model: Any, max_length: int | None = None) -> int:
    """Return the number of tokens at which texts are cut for a model: `max_length`, or the positions that it has."""
    wanted = MAX_LENGTH if max_length is None else max_length
    most = longest_input(innermost(model))
    return wanted if most is None else min(wanted, most)


def tokenizer_of(model: Any) -> Any:
    """Return the tokenizer saved beside a transformers model, None if there is none."""
    return tokenizer_among(preprocessors_of(model))
