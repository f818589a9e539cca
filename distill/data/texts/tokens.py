"""The tokens of marked texts, and which of them are learned: those of which the marked characters are a part.

Where a mark begins is checked token by token: the tokens of the text before it, alone, are the first tokens of the
whole text. Where they are not, as a token reaches over the border, the characters of the tokens decide.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from distill.data.texts.chats import MarkedText
from distill.errors import DistillError
from interventions import shown

CHUNK = 512
"""The number of texts that are tokenized together."""
Named = tuple[str, MarkedText]
"""What errors call a row, and its text."""


@dataclass(frozen=True)
class TokenRow:
    """The tokens of a row.

    Attributes:
        ids: the tokens.
        learned: which of them are learned.
    """

    ids: Sequence[int]
    learned: Sequence[bool]


def tokens_of(texts: Iterable[Named], tokenizer: Any) -> Iterator[TokenRow]:
    """Yield the tokens of each text.

    Texts that are no chats get the special tokens that the tokenizer puts around a text, and, where it puts none behind
    it, its end token, so that a model learns to stop. A chat has those that its template writes.

    Raises:
        DistillError: a mark that begins or ends within a token.
    """
    before, after = _around(tokenizer)
    if not after and tokenizer.eos_token_id is not None:
        after = [tokenizer.eos_token_id]
    remaining = iter(texts)
    while part := list(islice(remaining, CHUNK)):
        for (_, text), row in zip(part, _tokenized(tokenizer, part), strict=True):
            yield row if text.is_chat else _surrounded(row, text, before, after)


def _surrounded(row: TokenRow, text: MarkedText, before: list[int], after: list[int]) -> TokenRow:
    """Return a row with special tokens around it, if it does not have them as a part of its text."""
    ids = list(row.ids)
    before = [] if ids[: len(before)] == before else before
    after = [] if after and ids[-len(after) :] == after else after
    learned = [*[text.spans is None] * len(before), *row.learned, *[True] * len(after)]
    return TokenRow([*before, *ids, *after], learned)


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and after a text."""
    found = tokenizer("a", return_special_tokens_mask=True)
    special = list(found["special_tokens_mask"])
    if 0 not in special:
        return [], []
    first, last = special.index(0), len(special) - special[::-1].index(0)
    return list(found["input_ids"][:first]), list(found["input_ids"][last:])


def _tokenized(tokenizer: Any, part: Sequence[Named]) -> Iterator[TokenRow]:
    """Yield the tokens of each text without those around it."""
    borders = [sorted({place for span in text.spans or () for place in span}) for _, text in part]
    whole = _encoded(tokenizer, [text.text for _, text in part])
    pieces = [text.text[:place] for (_, text), places in zip(part, borders, strict=True) for place in places]
    alone = iter(_encoded(tokenizer, pieces)["input_ids"] if pieces else ())
    offsets = whole.get("offset_mapping") or [None] * len(part)
    for (name, text), places, ids, where in zip(part, borders, whole["input_ids"], offsets, strict=True):
        if text.spans is None:
            yield TokenRow(ids, [True] * len(ids))
            continue
        beginnings, split = {place: next(alone) for place in places}, _Split(name, text.text, ids, where)
        learned = [False] * len(ids)
        for start, end in text.spans:
            first = split.border(start, beginnings[start], ends=False)
            last = split.border(end, beginnings[end], ends=True) if end > start else first
            learned[first:last] = [True] * (last - first)
        yield TokenRow(ids, learned)


def _encoded(tokenizer: Any, texts: list[str]) -> Any:
    """Return the tokens of texts without special tokens around them, and their places in the text where it has them."""
    settings = {"return_offsets_mapping": True} if getattr(tokenizer, "is_fast", False) else {}
    return tokenizer(texts, add_special_tokens=False, verbose=False, **settings)


@dataclass(frozen=True)
class _Split:
    """A text and its tokens.

    Attributes:
        row: what errors call the row.
        text: the text.
        ids: its tokens.
        offsets: the characters of each token; None where they are not known.
    """

    row: str
    text: str
    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]] | None

    def border(self, place: int, alone: Sequence[int], *, ends: bool) -> int:
        """Return the number of the first token that belongs to what begins at a character, or follows what ends there.

        Args:
            place: the number of the character.
            alone: the tokens of the text before the character.
            ends: whether a completion ends at the character, and does not begin there.

        Raises:
            DistillError: a token has more than white space on both sides of the border.
        """
        text, offsets, count = self.text, self.offsets or (), len(alone)
        reach = (
            offsets[count - 1][1] if 0 < count <= len(offsets) else place
        )  # a special token may take the space behind it
        if list(self.ids[:count]) == list(alone) and not text[place:reach].strip():
            return count
        if place >= len(text):
            return len(self.ids)
        for number, (first, last) in enumerate(offsets):
            if last <= place:
                continue
            if not text[first:place].strip():
                return number
            if ends and not text[place:last].strip():
                return number + 1
            break
        raise DistillError(
            f"{self.row}: a completion begins or ends at {shown(text[max(0, place - 8) : place + 8])}, within a token, "
            "so which token is its first or last is not known; put the border where a token ends, e.g. the space at "
            "the beginning of the completion: {'prompt': 'Answer:', 'completion': ' yes'}."
        )
