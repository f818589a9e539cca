"""Rows and tasks of language models: tokens, their mask, and labels, the tokens that the model learns to write.

The label of a token of the prompt is −100, so that no loss is over it: see `distill/models/loss_masks.py`.
"""

import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, tee
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from distill.data.clusters import split_clusters
from distill.data.files import held_out
from distill.data.missing import IGNORED
from distill.data.pad_ids import pad_id_of
from distill.data.rows import Rows
from distill.data.task import Task, fine_tuning, share
from distill.data.text import need_tokenizer
from distill.data.texts.chats import marked_texts
from distill.data.texts.packing import STRATEGIES, packed, pieces_of
from distill.data.texts.reading import USED_TOO, TextRows
from distill.data.texts.tokens import TokenRow, tokens_of
from distill.errors import DistillError

MAX_LENGTH = 1024
"""The number of tokens at which texts and chats are cut where none is named."""


@dataclass(frozen=True)
class Reader:
    """The way from texts to rows of tokens.

    Attributes:
        tokenizer: of the model.
        max_length: the number of tokens at which a row is cut; None is `MAX_LENGTH`, or the length of a block.
        packing: how documents are put together into blocks: "best-fit", "in order", or None for a row each.
        block_size: the number of tokens of a block.
    """

    tokenizer: Any
    max_length: int | None = None
    packing: str | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_length", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise DistillError(f"{name}={value} leaves nothing to predict; use e.g. {name}={MAX_LENGTH}.")
        if self.packing is not None and self.packing not in STRATEGIES:
            raise DistillError(
                f"packing={self.packing!r} is none of {', '.join(map(repr, STRATEGIES))}; choose one, or None for a "
                "row for each document."
            )

    @property
    def block(self) -> int | None:
        """The number of tokens of a block; None where documents are not packed."""
        if self.packing is None and self.block_size is None:
            return None
        return self.block_size or self.limit

    @property
    def limit(self) -> int:
        """The number of tokens at which a row is cut."""
        wanted = self.max_length or self.block_size or MAX_LENGTH
        return min(wanted, self.tokenizer.model_max_length, *([self.block_size] if self.block_size else []))

    def rows(self, found: TextRows) -> Rows:
        """Return texts or chats as rows of tokens, packed if that is requested."""
        table = self.read(found)
        return table.rows(self.tokenizer, range(len(table)), self.block, self.packing)

    def read(self, found: TextRows) -> "Tokens":
        """Return the tokens of texts or chats, cut at the limit, without rows that have nothing to learn.

        Texts that are packed are not cut but continue in the next block.

        Raises:
            DistillError: no row with anything to learn.
        """
        self.warn_of_unread(found)
        tokens, cut = self.tokens(found)
        self.warn(found, cut, len(found) - len(set(tokens.numbers)))
        return tokens

    def tokens(self, found: TextRows) -> tuple["Tokens", int]:
        """Return the tokens of texts or chats, as `read` does, and how many of them are cut, without warnings."""
        splits = self.block is not None and not found.is_chat
        tokens, cut = Tokens(), 0
        for number, row in enumerate(tokenized(found, self.tokenizer, found.names())):
            cut += len(row.ids) > self.limit and not splits
            for piece in pieces_of(row, self.limit) if splits else (row,):
                tokens.add(number, piece, self.limit)
        return tokens, cut

    def warn_of_unread(self, found: TextRows) -> None:
        """Warn of columns that are not read."""
        if dropped := [name for name in found.others if name and name != USED_TOO]:
            warnings.warn(
                f"of {found.source} only {' and '.join(map(repr, found.columns))} is read, and "
                f"{', '.join(map(repr, dropped))} not; text=… names another column of texts.",
                stacklevel=4,
            )

    def warn(self, found: TextRows, cut: int, left: int) -> None:
        """Warn of rows that are cut, and of those that are left out.

        Raises:
            DistillError: all rows are left out.
        """
        rows = f"of {len(found)} rows of {found.source}"
        if left == len(found):
            raise DistillError(
                f"none {rows} has a token to learn among its first {self.limit}; give a larger max_length=… "
                "(--max-length), or rows with an answer of the assistant."
            )
        parts = [f"{cut} {rows} have more than {self.limit} tokens and are cut there"] if cut else []
        if left:
            parts.append(f"{left} {rows} have no token to learn among their first {self.limit} and are left out")
        if parts:
            warnings.warn(
                f"{'; '.join(parts)}; max_length=… (--max-length) says where, as far as the model has positions.",
                stacklevel=4,
            )


@dataclass(eq=False)
class Tokens:
    """The tokens of rows, one after the other.

    Attributes:
        numbers: the number of the text of each row.
        lengths: the number of tokens of each row.
        ids: the tokens.
        labels: the tokens that are learned, −100 elsewhere.
    """

    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    ids: "array[int]" = field(default_factory=lambda: array("q"))
    labels: "array[int]" = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self.numbers)

    def add(self, number: int, row: TokenRow, limit: int) -> None:
        """Add the first tokens of a row, if any is learned that another one stands before."""
        ids, learned = row.ids[:limit], row.learned[:limit]
        if not any(learned[1:]):
            return
        self.numbers.append(number)
        self.lengths.append(len(ids))
        self.ids.extend(ids)
        self.labels.extend(token if kept else IGNORED for token, kept in zip(ids, learned, strict=True))

    def split(self, values: "array[int]") -> list[list[int]]:
        """Return the values of each row."""
        ends = accumulate(self.lengths)
        return [values[end - length : end].tolist() for end, length in zip(ends, self.lengths, strict=True)]

    def rows(self, tokenizer: Any, chosen: Sequence[int], block: int | None, packing: str | None) -> Rows:
        """Return some rows, packed into blocks if these have a size."""
        lengths = list(self.lengths)
        ids, labels = (torch.tensor(each, dtype=torch.int64) for each in (self.ids, self.labels))
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids, dtype=torch.int64)).to(torch.uint8)
        ones = torch.ones(max([*lengths, block or 0]), dtype=torch.int64)
        columns = {"input_ids": ids, "labels": labels, "special_tokens_mask": special}
        split = {name: column.split(lengths) for name, column in columns.items()}
        table = {name: [rows[i] for i in chosen] for name, rows in split.items()}
        if block is not None:
            table = packed(table, block, packing)
        table["attention_mask"] = [ones[: len(row)] for row in table["input_ids"]]
        return Rows(table, pad_id=pad_id_of(tokenizer), padding_side=tokenizer.padding_side)


def language_task(
    found: TextRows,
    reader: Reader,
    *,
    tested: TextRows | None = None,
    fraction: float = 1.0,
    seed: int = 0,
    test_share: float = 0.2,
    split_seed: int = 0,
    clusters: str | None = None,
) -> Task:
    """Return a task of texts or chats for language models, without classes.

    Args:
        found: the rows.
        reader: makes tokens of them.
        tested: rows to test on; without them a share of the rows is held out.
        fraction: the share of the training rows to keep, drawn by `seed`.
        seed: seeds that draw.
        test_share: the share to hold out, drawn by `split_seed`.
        split_seed: seeds that draw.
        clusters: the column of what rows share, e.g. a source.

    Raises:
        DistillError: no tokenizer, or data that cannot be used.
    """
    name = "chat" if found.is_chat else "text"
    need_tokenizer(name, reader.tokenizer)
    if clusters is not None and reader.block is not None:
        raise DistillError(
            f"clusters={clusters!r} names what documents share, and a packed row has several of them; leave out "
            "packing and block_size, or clusters."
        )
    here = _Documents(found, reader, reader.read(found))
    if tested is None:
        there = here
        train, test = (
            here.known[torch.tensor(each)] for each in held_out([0] * len(here.known), test_share, split_seed)
        )
    else:
        there = _Documents(tested, reader, reader.read(tested))
        train, test = here.known, there.known
    train = train[share(len(train), fraction, seed)]
    recipe = fine_tuning(len(train))
    return Task(
        name=name,
        train=here.rows(train, clusters),
        test=there.rows(test, clusters),
        classes=(),
        recipe=recipe,
        student=replace(recipe, lr=5e-5),
        description=f"{'Chats' if found.is_chat else 'Texts'} of a language model, from {_file_name(found)}.",
        show=lambda row: reader.tokenizer.decode(row["input_ids"], skip_special_tokens=True),
        tokenizer=reader.tokenizer,
        clusters=clusters or "",
    )


@dataclass(frozen=True)
class _Documents:
    """Texts, and the tokens of those that have any to learn."""

    found: TextRows
    reader: Reader
    tokens: Tokens

    @property
    def known(self) -> Int[Tensor, " documents"]:
        """The numbers of the texts that have tokens."""
        return torch.tensor(self.tokens.numbers, dtype=torch.int64).unique()

    def rows(self, documents: Int[Tensor, " documents"], clusters: str | None) -> Rows:
        """Return the rows of some texts, with the clusters that they are in."""
        numbers = torch.tensor(self.tokens.numbers, dtype=torch.int64)
        chosen = torch.isin(numbers, documents).nonzero()[:, 0]
        reader = self.reader
        rows = self.tokens.rows(reader.tokenizer, chosen.tolist(), reader.block, reader.packing)
        if clusters is None:
            return rows
        values = self.found.values(clusters)
        _, shared = split_clusters({clusters: values, "row": values}, clusters)
        return rows if shared is None else replace(rows, clusters=shared[numbers[chosen]])


def tokenized(found: TextRows, tokenizer: Any, names: Iterable[str]) -> Iterator[TokenRow]:
    """Yield the tokens of each row; `names` are what errors call them."""
    names, too = tee(names)
    return tokens_of(zip(names, marked_texts(found, tokenizer, too), strict=False), tokenizer)


def _file_name(found: TextRows) -> str:
    """Return the name of a file, or "rows in memory"."""
    return "rows in memory" if found.source == "the data" else Path(found.source).name
