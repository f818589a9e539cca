"""The data of language models: texts and chats, read for a model that predicts the next token."""

from pathlib import Path
from typing import Any

from distill.data.files import is_same_file
from distill.data.rows import Rows
from distill.data.task import Task
from distill.data.text import need_tokenizer
from distill.data.texts.given import with_columns
from distill.data.texts.language import MAX_LENGTH, Reader, language_task
from distill.data.texts.on_disk import is_large, rows_on_disk
from distill.data.texts.reading import TextRows, kind_of_texts, text_rows
from distill.errors import DistillError
from distill.models.inputs import innermost
from distill.models.loss_masks import predicts_next
from distill.models.preprocessors import preprocessors_of, tokenizer_among
from interventions import shown

CHAT, TEXT = "chat", "text"
NAMES = (TEXT, CHAT)
"""The names of tasks of language models, whose data is the user's."""


def task(
    data: Any,
    tokenizer: Any,
    *,
    name: str | None = None,
    eval_data: Any = None,
    text: Any = None,
    max_length: int | None = None,
    packing: str | None = None,
    block_size: int | None = None,
    **settings: Any,
) -> Task:
    """Return a task of texts or chats without classes, for models that predict the next token.

    Args:
        data: a file, a list of dicts, a dict of columns, a frame or a Hugging Face Dataset with `messages`, with
            `prompt` and `completion`, or with texts.
        tokenizer: of the model; chats need its chat template.
        name: "text" or "chat", which the data must be; None takes either.
        eval_data: rows to test on, in any of these forms; without them a fifth of the rows is held out.
        text: the column of texts, "text" by default.
        max_length: rows are cut at this number of tokens, 1024 by default.
        packing: "best-fit" or "in order" puts several documents into a row.
        block_size: the tokens of such a row.
        settings: the others of `language_task`.

    Raises:
        DistillError: data of another kind, or one file given as both.
    """
    need_tokenizer(name or CHAT, tokenizer)
    if is_same_file(data, eval_data):
        raise DistillError(
            f"eval_data is {eval_data}, the file that is trained on, so nothing would be held out; leave eval_data out "
            "(--eval-data), and a fifth is held out, or give another file."
        )
    if text is not None and not isinstance(text, str):
        raise DistillError(
            f"text={shown(text)} names no one column, and a language model reads a text a row; name it, text='text', "
            "or give rows of 'prompt' and 'completion'."
        )
    reader = Reader(tokenizer, max_length, packing, block_size)
    found = _found(data, name, text)
    tested = None if eval_data is None else _found(eval_data, name, text)
    return language_task(found, reader, tested=tested, **settings)


def for_model(data: Any, model: Any) -> bool:
    """Return whether data is texts or chats that a model is to read as a language model does.

    Texts without labels are, for a model that predicts the next token; prompts with completions and chats always.

    Raises:
        DistillError: chats for a transformers model that does not predict the next token.
    """
    kind = kind_of_texts(data)
    if kind is None or (kind == TEXT and not predicts_next(model)):
        return False
    if kind == CHAT and hasattr(innermost(model), "loss_type") and not predicts_next(model):
        raise DistillError(
            f"the data has prompts with completions, and {type(innermost(model)).__name__} does not predict the next "
            "token; give a causal language model, or rows of its inputs: {**tokenizer(prompts), 'labels': …}."
        )
    return kind in NAMES


def rows_for_model(data: Any, model: Any, tokenizer: Any = None) -> Rows:
    """Return all rows of texts or chats, cut at the positions of a model."""
    tokenizer = tokenizer or tokenizer_among(preprocessors_of(model))
    need_tokenizer(kind_of_texts(data) or TEXT, tokenizer)
    found, reader = _found(data), Reader(tokenizer, longest_for(model))
    return rows_on_disk(found, reader) if is_large(found.data) else reader.rows(found)


def task_for_model(data: Any, model: Any, tokenizer: Any = None) -> Task:
    """Return the task of a file of texts or chats, cut at the positions of a model."""
    return task(data, tokenizer or tokenizer_among(preprocessors_of(model)), max_length=longest_for(model))


def longest_for(model: Any) -> int:
    """Return the number of tokens at which texts are cut for a language model: 1024, or the positions that it has."""
    config: Any = getattr(innermost(model), "config", None)
    known = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(known, "max_position_embeddings", None)
    return min(MAX_LENGTH, most) if isinstance(most, int) and most > 1 else MAX_LENGTH


def _found(data: Any, name: str | None = None, text: str | None = None) -> TextRows:
    """Return data as texts or chats.

    Raises:
        DistillError: data of another kind.
    """
    found = text_rows(with_columns(data), text)
    if found is None or (name is not None and found.is_chat != (name == CHAT)):
        has = f"has the columns {', '.join(map(repr, found.columns))}" if found else "has none of these"
        wanted = "'messages', or 'prompt' and 'completion'" if name == CHAT else repr(text or "text")
        other = TEXT if name == CHAT else CHAT
        raise DistillError(
            f"{shown(data) if isinstance(data, str | Path) else 'the data'} {has}, and task {name or TEXT!r} needs "
            f"{wanted}; name the column of texts, text=… (--text), or the other task: {other!r}."
        )
    return found
