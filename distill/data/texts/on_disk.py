"""Tokens of large data sets of texts in Arrow files on disk: made once, found again by what they were made of.

The files lie in the folder `distill` of the cache of `datasets` (`HF_DATASETS_CACHE`). Their name is a hash of the data
set, the tokenizer and the settings, so that other texts, words or lengths have other files.
"""

from collections.abc import Callable, Mapping
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.draws import is_hugging_face
from distill.data.pad_ids import pad_id_of
from distill.data.rows import Rows
from distill.data.sources.arrow import ArrowStore, columns_of_hugging_face
from distill.data.sources.lazy_columns import LazyColumn
from distill.data.texts.language import Reader, Tokens, tokenized
from distill.data.texts.packing import pieces_of
from distill.data.texts.reading import USED_TOO, TextRows
from distill.errors import DistillError
from interventions import shown

LARGE = 16 * 2**20
"""The bytes of texts from which on their tokens lie on disk."""
FORM = "1"
"""The version of the files; another one makes them anew."""
AT_ONCE = 1000
"""The number of texts that are tokenized at a time, and among which documents are packed."""
CUT, NUMBER = "is_cut", "number"


def is_large(data: Any) -> bool:
    """Return whether data is a data set of Hugging Face whose tokens are not held in memory."""
    return is_hugging_face(data) and data.data.nbytes * len(data) / max(1, data.data.num_rows) > LARGE


def rows_on_disk(found: TextRows, reader: Reader) -> Rows:
    """Return texts or chats of a large data set as rows of tokens, which are read from disk when they are used.

    Documents that are packed are put together with those beside them, `AT_ONCE` at a time.

    Args:
        found: the rows of texts; their data is a data set of Hugging Face.
        reader: makes tokens of them.

    Raises:
        DistillError: as `Reader.read`; or a disk that cannot hold the tokens.
    """
    tokenizer = reader.tokenizer
    made = mapped(
        found.data,
        partial(_tokens, found=found, reader=reader),
        (tokenizer, reader.limit, reader.block, reader.packing, found.columns, found.first),
        columns=[*found.columns, *(name for name in found.others if name == USED_TOO)],
        features=_features(reader, is_chat=found.is_chat),
    )
    store = ArrowStore(made)
    known = columns_of_hugging_face(made.select_columns([NUMBER, CUT]))
    for each in (ArrowStore(found.data), store):
        each.let_go()
    reader.warn_of_unread(found)
    reader.warn(found, int(known[CUT].sum()), len(found) - len(known[NUMBER].unique()))
    ids = LazyColumn(store, "input_ids")
    special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.int64)
    table = {
        "input_ids": ids,
        "labels": LazyColumn(store, "labels") if found.is_chat else ids,
        "special_tokens_mask": ids.changed(partial(_is_among, special=special)),
        "attention_mask": ids.changed(torch.ones_like),
    }
    if reader.block is not None:
        table["position_ids"] = LazyColumn(store, "position_ids")
        if not found.is_chat:  # of each document the first token has none before it
            table["labels"] = LazyColumn(store, "labels")
    return Rows(table, pad_id=pad_id_of(tokenizer), padding_side=tokenizer.padding_side)


def mapped(
    data: Any, function: Callable[..., Any], made_of: tuple[Any, ...], *, columns: list[str], features: Any
) -> Any:
    """Return what a function makes of a data set, batch by batch, from the cache if it is there.

    Args:
        data: a data set of Hugging Face.
        function: takes the columns of a batch and the numbers of its rows.
        made_of: decides the result together with the data set: tokenizers, settings.
        columns: those that the function reads.
        features: the types of what it makes.

    Raises:
        DistillError: the function fails, or the disk cannot hold what it makes.
    """
    from datasets import config

    digest = blake2b(digest_size=16)
    for part in (FORM, data._fingerprint, len(data), columns, str(features), *map(_facts, made_of)):
        digest.update(f"{part}\n".encode())
    name = digest.hexdigest()
    folder = Path(config.HF_DATASETS_CACHE) / "distill"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return data.with_format(None).map(
            function, batched=True, batch_size=AT_ONCE, with_indices=True, input_columns=None,
            remove_columns=data.column_names, cache_file_name=str(folder / f"{name}.arrow"), new_fingerprint=name,
            load_from_cache_file=True, features=features, desc="Tokenizing",
        )  # fmt: skip
    except OSError as error:
        raise DistillError(
            f"the tokens of the data cannot be kept in {folder} ({error.strerror or error}); make room, or name "
            "another folder: HF_DATASETS_CACHE=/path."
        ) from error


def _tokens(batch: Mapping[str, list[Any]], indices: list[int], *, found: TextRows, reader: Reader) -> dict[str, Any]:
    """Return the tokens of a batch of texts, as columns."""
    splits = reader.block is not None and not found.is_chat
    names = [f"row {number + found.first} of {found.source}" for number in indices]
    tokens, cut = Tokens(), dict[int, bool]()
    for number, row in zip(indices, tokenized(found.part(batch), reader.tokenizer, names), strict=True):
        cut[number] = len(row.ids) > reader.limit and not splits
        for piece in pieces_of(row, reader.limit) if splits else (row,):
            tokens.add(number, piece, reader.limit)
    if not len(tokens):
        return {name: [] for name in _features(reader, is_chat=found.is_chat)}
    if reader.block is None:
        kept = {"input_ids": tokens.split(tokens.ids), NUMBER: list(tokens.numbers)}
        return {
            **kept,
            CUT: [cut[number] for number in tokens.numbers],
            **({"labels": tokens.split(tokens.labels)} if found.is_chat else {}),
        }
    rows = tokens.rows(reader.tokenizer, range(len(tokens)), reader.block, reader.packing)
    table = {name: [each.tolist() for each in rows.table[name]] for name in ("input_ids", "labels", "position_ids")}
    return {**table, NUMBER: [indices[0]] * len(rows), CUT: [False] * len(rows)}


def _features(reader: Reader, *, is_chat: bool) -> Any:
    """Return the types of the columns of tokens: the smallest that holds all ids."""
    from datasets import Features, List, Value

    ids = List(Value("uint16" if len(reader.tokenizer) <= 2**16 else "int32"))
    found = {"input_ids": ids, NUMBER: Value("int32"), CUT: Value("bool")}
    if reader.block is not None:
        found |= {"position_ids": List(Value("int32"))}
    if is_chat or reader.block is not None:
        found |= {"labels": List(Value("int32"))}
    return Features(found)


def _is_among(ids: Tensor, special: Tensor) -> Tensor:
    """Return which tokens are special ones."""
    return torch.isin(ids, special).to(torch.uint8)


def _facts(value: Any) -> str:
    """Return a setting as text, and of a tokenizer everything that decides its tokens."""
    if not hasattr(value, "get_vocab"):
        return shown(value)
    backend = getattr(value, "backend_tokenizer", None)
    words = str(sorted(value.get_vocab().items())) if backend is None else backend.to_str()
    rest = (type(value).__name__, value.special_tokens_map, getattr(value, "chat_template", None))
    return blake2b(f"{words}{rest}".encode()).hexdigest()
