"""Texts as rows of tokens, and as tasks."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from distill.data.pad_ids import pad_id_of
from distill.data.rows import Rows
from distill.data.sources.lazy_columns import Column
from distill.data.task import Task, fine_tuning
from distill.errors import DistillError
from interventions import shown

MAX_LENGTH = 128
Text = str | tuple[str, ...]
"""A text, or a pair of texts that a tokenizer puts into one row."""
Labelled = tuple[Sequence[Text], Sequence[int] | Sequence[float] | None]


def text_task(
    name: str,
    train: Labelled,
    test: Labelled,
    classes: tuple[str, ...],
    tokenizer: Any,
    *,
    description: str,
    max_length: int | None = None,
) -> Task:
    """Return a task of tokenized texts and class indices, if there are any; its teacher must be given."""
    recipe = fine_tuning(len(train[0]))
    return Task(
        name=name,
        train=tokenize_texts(tokenizer, *train, max_length),
        test=tokenize_texts(tokenizer, *test, max_length),
        classes=classes,
        recipe=recipe,
        student=replace(recipe, lr=5e-5),  # a student starts from the layers of a fine-tuned teacher
        description=description,
        show=lambda row: tokenizer.decode(row["input_ids"], skip_special_tokens=True),
        tokenizer=tokenizer,
    )


def need_tokenizer(name: str, tokenizer: Any) -> None:
    """Raise DistillError without a tokenizer; call this before anything is read or downloaded."""
    if tokenizer is None:
        raise DistillError(
            f"task {name!r} is text and needs a tokenizer, and none was given or is saved with a teacher; "
            "give one: tokenizer=AutoTokenizer.from_pretrained(...), or --teacher FOLDER_OR_NAME."
        )
    if not (callable(tokenizer) and hasattr(tokenizer, "model_max_length")) or isinstance(tokenizer, type):
        raise DistillError(
            f"tokenizer={shown(tokenizer)} is no tokenizer of Hugging Face; give "
            "tokenizer=AutoTokenizer.from_pretrained(...)."
        )


def tokenize_texts(
    tokenizer: Any, texts: Sequence[Text], labels: Sequence[int] | Sequence[float] | None, max_length: int | None = None
) -> Rows:
    """Return texts as rows of the inputs that a Hugging Face tokenizer makes, with `special_tokens_mask` and `labels`.

    A pair of texts is one row, made by the tokenizer, with `token_type_ids` where it has them. Texts are cut at
    `max_length` tokens (None: 128), of pairs the longer one first, with a warning. Rows are padded on the side of the
    tokenizer, by the token of `pad_id_of`.

    Raises:
        DistillError: a `max_length` below 1.
    """
    if max_length is not None and max_length < 1:
        raise DistillError(f"max_length={max_length} leaves nothing of a text; use e.g. max_length=128")
    limit = min(max_length or MAX_LENGTH, tokenizer.model_max_length)
    sides = list(map(list, zip(*map(_sides, texts), strict=True)))
    encoded = tokenizer(*sides, truncation=True, max_length=limit, return_special_tokens_mask=True)
    full = [text for text, ids in zip(texts, encoded["input_ids"], strict=True) if len(ids) >= limit]
    cut = sum(len(tokenizer(*_sides(text), verbose=False)["input_ids"]) > limit for text in full)
    if cut:
        warnings.warn(
            f"{cut} of {len(texts)} texts have more than {limit} tokens and are cut there; max_length=… (--max-length) "
            "says where, as far as the model has positions",
            stacklevel=4,
        )
    table: dict[str, Column] = {name: _ragged(values) for name, values in encoded.items()}
    if labels is not None:
        table["labels"] = torch.tensor(labels)
    return Rows(table, pad_id=pad_id_of(tokenizer), padding_side=tokenizer.padding_side)


def _sides(text: Text) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def _ragged(values: list[list[int]]) -> list[torch.Tensor]:
    # Views of one tensor: a small tensor of its own for each of 67,000 rows takes five times the time and memory.
    flat = torch.tensor([number for row in values for number in row])
    return list(flat.split([len(row) for row in values]))
