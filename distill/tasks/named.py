"""Data sets that are named, by a path, a pattern or a hub id, and dicts of data sets: their splits, as a task."""

from pathlib import Path
from typing import Any

import torch

from distill.data.rows import Rows
from distill.data.sources.opening import Splits, splits_of
from distill.data.task import Task, fine_tuning
from distill.data.text import MAX_LENGTH, need_tokenizer
from distill.data.texts.given import refuse_prompts_alone, with_columns
from distill.data.texts.labelled import labelled_rows, text_columns
from distill.data.texts.lengths import refuse_empty_rows
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
        return data
    tokenizer = tokenizer or tokenizer_of(model)
    need_tokenizer("text", tokenizer)
    return labelled_rows(data, tokenizer, length_for(model))


def task_of_splits(splits: Splits, model: Any, tokenizer: Any = None) -> Task:
    """Return the task of a data set that was named, its classes not renumbered.

    Its test rows are the split for validation, or else for tests; without one some of the rows are held out.
    """
    train = as_rows(splits.to_train_on, model, tokenizer)
    if splits.held_out is None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SPLIT_SEED))
        count = min(MOST_HELD_OUT, max(1, round(len(train) * SHARE)), len(train) - 1)
        train, test = train.take(order[count:].sort().values), train.take(order[: max(1, count)].sort().values)
    else:
        test = _numbered_as(as_rows(splits.held_out, model, tokenizer), train)
    recipe = fine_tuning(len(train))
    return Task(
        name=Path(splits.name).name.split(".")[0] or "data",
        train=train,
        test=test,
        classes=train.classes or (),
        recipe=recipe,
        description=f"Rows of {splits.name}.",
        tokenizer=tokenizer or tokenizer_of(model),
    )


def named_rows(data: Any, model: Any, tokenizer: Any = None) -> Rows | None:
    """Return the rows of a named data set to measure on: the split for that, else all; None for any other data."""
    splits = splits_of(data)
    if splits is None:
        return None
    return as_rows(_to_measure(splits), model, tokenizer)


def _to_measure(splits: Splits) -> Any:
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
