"""Prompts and completions in rows of tokens, and the rows that a model has completed.

A decoder reads both in one row: the labels of the prompt are −100, and those of the completion are its tokens. A prompt
for an encoder–decoder is what the encoder reads, and the labels are the completion.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from distill.data.draws import is_hugging_face
from distill.data.missing import IGNORED
from distill.data.pad_ids import pad_id_of
from distill.data.rows import Rows
from distill.data.sources.lazy_columns import Column
from distill.data.texts.chats import ASSISTANT, CHATS, messages_of, prompt_text
from distill.data.texts.given import has_none, names_of, refuse_instructions, with_columns
from distill.errors import DistillError
from distill.models.host_copies import host_columns
from distill.writing.first_tokens import labels_after

OF_TOKENS = ("input_ids", "attention_mask", "labels", "special_tokens_mask")
"""The columns with a value for each token that are known for tokens that a model writes too."""
FEW, LOOKED_AT = 8, 256
"""The numbers of rows whose columns are looked at, and whose labels are compared with their tokens."""


def as_tokens(prompts: Any, tokenizer: Callable[[], Any], *, by_encoder: bool) -> Any:
    """Return prompts that are texts or chats as rows of tokens, whole; others as they are.

    Args:
        prompts: of any kind. Texts are a list of them, or rows with a column `text`, or `prompt`, of texts or lists of
            messages, and no completion, or none but None; or chats in `messages` or `conversations` that all end with
            another message than the assistant's.
        tokenizer: returns the tokenizer that reads texts.
        by_encoder: whether an encoder reads them; a decoder would not continue a text that has ended, so an end token
            that the tokenizer puts behind a text is taken off.

    Raises:
        DistillError: no tokenizer, a chat for one without a template, or a value that is neither.
    """
    prompts = with_columns(prompts)
    values = _prompt_values(prompts)
    if values is None:
        return prompts
    reader = tokenizer()
    if reader is None:
        raise DistillError(
            "the prompts of Written are texts, and no tokenizer was saved with the models; give it, "
            "fit(…, tokenizer=tokenizer), or read them before: Written(tokenizer(texts))."
        )
    texts = [prompt_text(value, reader, f"row {number} of the prompts") for number, value in enumerate(values)]
    ids = []
    for special in (False, True):  # a chat has the special tokens of its template
        kind = [text.text for text in texts if text.is_chat != special]
        read = reader(kind, add_special_tokens=special, verbose=False)["input_ids"] if kind else []
        ids.append(map(torch.tensor, read))
    rows = [next(ids[not text.is_chat]).long() for text in texts]
    if not by_encoder:
        end = [reader.eos_token_id]
        rows = [
            row[:-1] if not text.is_chat and row[-1:].tolist() == end else row
            for row, text in zip(rows, texts, strict=True)
        ]
    return Rows({"input_ids": rows, "attention_mask": list(map(torch.ones_like, rows))}, pad_id=pad_id_of(reader))


def _prompt_values(prompts: Any) -> list[Any] | None:
    """Return the texts or chats of prompts without completions; None for prompts of another kind."""
    names = names_of(prompts)
    refuse_instructions(prompts)
    if {"input_ids", "labels", "label"} & set(names) or ("completion" in names and not has_none(prompts, "completion")):
        return None
    column = next((name for name in ("prompt", "text", *(chat for (chat,) in CHATS)) if name in names), None)
    if column is None:
        return None
    if isinstance(prompts, list | tuple):
        if not all(isinstance(row, Mapping) and column in row for row in prompts):
            return None
        values = [row[column] for row in prompts]
    else:
        values = list(prompts.with_format(None)[column] if is_hugging_face(prompts) else prompts[column])
    return values if column in ("prompt", "text") or not any(map(_is_answered, values)) else None


def _is_answered(chat: Any) -> bool:
    """Return whether the last message of a chat is the assistant's; true for what is no chat."""
    try:
        return messages_of(chat, "", "")[-1]["role"] == ASSISTANT
    except DistillError:
        return True


def as_prompts(rows: Rows, prompt_tokens: int | None = None, *, by_encoder: bool) -> Rows:
    """Return rows of tokens, after a check of their columns; those that an encoder reads have labels, −100 if not.

    Args:
        rows: the rows.
        prompt_tokens: the number of tokens at the beginning of a row that are its prompt; None leaves it to the labels.
        by_encoder: whether an encoder reads the prompts.

    Raises:
        DistillError: no tokens, a column with other facts of tokens, labels that are no completions, or rows of an
            encoder that are to be parted.
    """
    table = dict(rows.table)
    if "input_ids" not in table:
        raise DistillError(
            f"Written completes rows of tokens, and the prompts have {', '.join(table)}; give them input_ids and "
            "attention_mask, as a tokenizer returns them: Written(tokenizer(texts))."
        )
    ids = table["input_ids"]
    for name, column in table.items():
        if name not in OF_TOKENS and _is_of_tokens(column, ids):
            raise DistillError(
                f"the column {name!r} of the prompts has a value for each token, and the tokens that a model writes "
                f"have none; leave it out: Written({{name: prompts[name] for name in {list(OF_TOKENS)}}})."
            )
    if prompt_tokens is not None:
        if by_encoder:
            raise DistillError(
                f"prompt_tokens={prompt_tokens} parts rows that a decoder reads, and an encoder reads a prompt of its "
                "own; give prompts as input_ids and completions as labels, and leave it out."
            )
        return replace(rows, table={**table, "labels": labels_after(table, prompt_tokens)})
    labels = table.get("labels")
    if labels is None and by_encoder:  # without any a decoder of its own has nothing to read
        return replace(rows, table={**table, "labels": torch.full((len(rows), 1), IGNORED)})
    if labels is None:
        return rows
    first = labels[0]
    if first.ndim != 1 or first.is_floating_point() or (not by_encoder and first.shape != ids[0].shape):
        raise DistillError(
            f"the labels of the prompts are {first.dtype} of shape {list(first.shape)} a row, and those of text are "
            f"its tokens, -100 at the prompt; leave them out: Written({{name: prompts[name] for name in "
            "['input_ids', 'attention_mask']})."
        )
    if not by_encoder:
        _check_labels(rows)
    return rows


def split(batch: Mapping[str, Tensor], *, by_encoder: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Return the prompt and the completion of each row of a batch, without padding, on the host.

    Args:
        batch: columns as of `as_prompts`, padded on either side.
        by_encoder: whether an encoder reads the prompts.
    """
    host = host_columns(batch)
    ids, labels = host["input_ids"], _labels(host)
    real = host["attention_mask"].bool() if "attention_mask" in host else torch.ones_like(ids).bool()
    if by_encoder:
        tokens = [row[kept] for row, kept in zip(ids, real, strict=True)]
        return tokens, [row[row != IGNORED] for row in labels]
    prompts, completions = [], []
    for row, kept, own in zip(ids, real, labels, strict=True):
        tokens, is_labelled = row[kept], own[kept] != IGNORED
        start = int(is_labelled.int().argmax()) if bool(is_labelled.any()) else len(tokens)
        prompts.append(tokens[:start])
        completions.append(tokens[start:])
    return prompts, completions


def lengths(batch: Mapping[str, Tensor], *, by_encoder: bool) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Return the number of tokens in the prompt and in the completion of each row of a batch, on the host."""
    host = host_columns(batch)
    ids, is_labelled = host["input_ids"], _labels(host) != IGNORED
    real = host["attention_mask"].bool() if "attention_mask" in host else torch.ones_like(ids).bool()
    if by_encoder:
        return real.sum(1), is_labelled.sum(1)
    before = real & ((is_labelled & real).int().cumsum(1) == 0)
    return before.sum(1), real.sum(1) - before.sum(1)


def prompts_for(
    batch: Mapping[str, Tensor], prompts: Sequence[Int[Tensor, " token"]], pad: int, *, by_encoder: bool
) -> dict[str, Tensor]:
    """Return the columns of prompts, padded on the left for a decoder, on the right for an encoder, on the host.

    Args:
        batch: the columns of the rows; those of whole examples, as an image, stay.
        prompts: the tokens.
        pad: the token that pads them.
        by_encoder: whether an encoder reads them.
    """
    side = "right" if by_encoder else "left"
    masks = [torch.ones_like(each) for each in prompts]
    return {
        **{name: column for name, column in batch.items() if name not in OF_TOKENS},
        "input_ids": pad_sequence(list(prompts), batch_first=True, padding_value=pad, padding_side=side),
        "attention_mask": pad_sequence(masks, batch_first=True, padding_side=side),
    }


def completed(
    rows: Rows,
    batch: Mapping[str, Tensor],
    prompts: Sequence[Int[Tensor, " token"]],
    written: Sequence[Int[Tensor, " written"]],
    ends: Sequence[int],
    *,
    by_encoder: bool,
) -> dict[str, Tensor]:
    """Return the batch with the prompts completed by what a model wrote, on the host, padded as the rows are.

    Args:
        rows: the rows, whose tokens pad.
        batch: the columns of the rows; those of whole examples stay.
        prompts, written: the tokens of both.
        ends: the tokens that end a text, which are special ones.
        by_encoder: whether an encoder reads the prompts.
    """
    wholes = list(prompts) if by_encoder else [torch.cat(both) for both in zip(prompts, written, strict=True)]
    table: dict[str, Any] = {"input_ids": wholes, "attention_mask": [torch.ones_like(each) for each in wholes]}
    if by_encoder:
        table["labels"] = list(written)
    else:
        table["labels"] = [_masked(whole, len(prompt)) for whole, prompt in zip(wholes, prompts, strict=True)]
    if "special_tokens_mask" in batch:
        table["special_tokens_mask"] = _special(batch, wholes, prompts, ends)
    padded = replace(rows, table=table, source=None, clusters=None).batch(range(len(wholes)))
    return {name: padded.get(name, column) for name, column in batch.items()} | padded


def _labels(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the labels of a batch, all −100 where it has none."""
    return batch["labels"] if "labels" in batch else torch.full_like(batch["input_ids"], IGNORED)


def _special(
    batch: Mapping[str, Tensor], wholes: Sequence[Tensor], prompts: Sequence[Tensor], ends: Sequence[int]
) -> list[Tensor]:
    """Return which tokens of completed rows are special: those of the prompt that were, and the ends of texts."""
    host, found = host_columns(batch), []
    for number, (whole, prompt) in enumerate(zip(wholes, prompts, strict=True)):
        real = host["attention_mask"][number].bool() if "attention_mask" in host else slice(None)
        own = host["special_tokens_mask"][number][real][: len(prompt)]
        rest = torch.isin(whole[len(prompt) :], torch.tensor(list(ends), dtype=whole.dtype))
        found.append(torch.cat([own, rest.to(own.dtype)]))
    return found


def _masked(tokens: Tensor, until: int) -> Tensor:
    """Return labels: the tokens, −100 at the first ones."""
    labels = tokens.clone()
    labels[:until] = IGNORED
    return labels


def _is_of_tokens(column: Column, ids: Column) -> bool:
    """Return whether a column has a value for each token of the first rows."""
    rows = range(min(FEW, len(ids)))
    return all(column[row].ndim == 1 and len(column[row]) == len(ids[row]) for row in rows)


def _check_labels(rows: Rows) -> None:
    """Raise DistillError if labels of the first rows are no tokens of their places."""
    for number in range(min(LOOKED_AT, len(rows))):
        row = rows[number]
        tokens, labels = row["input_ids"], row["labels"]
        counts = labels != IGNORED
        if labels.shape != tokens.shape or not bool((labels == tokens)[counts].all()):
            raise DistillError(
                f"the labels of row {number} of the prompts are not its tokens (-100 at the prompt), so which of them "
                "are its completion is not known; use labels = input_ids.clone(), and labels[:prompt] = -100."
            )
