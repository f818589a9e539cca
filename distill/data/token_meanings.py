"""The tokens of two vocabularies that mean the same text.

Each token is described by the text that it stands for and by whether it begins a word; tokens with equal descriptions
mean the same.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from distill.errors import DistillError

Key = tuple[Any, ...] | None


@dataclass(frozen=True, eq=False)
class Shared:
    """The meanings that the tokens of two vocabularies share.

    Attributes:
        student, teacher: `[vocabulary]`: the number of the meaning of each token; `count` for a meaning that the other
            vocabulary lacks.
        count: the number of shared meanings. One may have several tokens, as "The" and "the" if the other tokenizer
            has no capitals.
    """

    student: Int[Tensor, " student_vocabulary"]
    teacher: Int[Tensor, " teacher_vocabulary"]
    count: int


def shared_meanings(student: Any, teacher: Any) -> Shared:
    """Return which tokens of two fast Hugging Face tokenizers mean the same.

    Tokenizers of one kind are compared token by token. Tokenizers of two kinds are compared by the text of a token
    after the normalizations of both, and by whether it begins a word (Ġ, ▁, or no ##); bytes that are no whole letter
    are compared as bytes. If a tokenizer drops spaces, signs that are no letters mean the same with and without a
    space. Of the special tokens of tokenizers of two kinds only the end of the text means the same.

    Raises:
        DistillError: vocabularies that have nothing in common, or a tokenizer that does not mark where words begin.
    """
    student_keys, teacher_keys = _keys(student, teacher)
    known = set(teacher_keys)
    common = [key for key in dict.fromkeys(student_keys) if key is not None and key in known]
    if not common:
        raise DistillError(
            "no token of the student's vocabulary means the same as one of the teacher's, so their answers cannot be "
            "compared; distil features instead, or take models that share a script."
        )
    numbers: dict[Key, int] = {key: number for number, key in enumerate(common)}
    bins = [torch.tensor([numbers.get(key, len(common)) for key in keys]) for keys in (student_keys, teacher_keys)]
    return Shared(bins[0], bins[1], len(common))


def _keys(student: Any, teacher: Any) -> tuple[list[Key], list[Key]]:
    """Return the meaning of each token of both, as keys that are equal for equal meanings; None for no meaning."""
    kinds = _kind(student), _kind(teacher)
    if kinds[0] == kinds[1]:
        same = [[("token", text) for text in _tokens(tokenizer)] for tokenizer in (student, teacher)]
        return _with_ends(student, same[0]), _with_ends(teacher, same[1])
    readers = _Reader.of(student, "student"), _Reader.of(teacher, "teacher")
    drops = any(reader.drops_spaces for reader in readers)
    made = []
    for tokenizer, reader in zip((student, teacher), readers, strict=True):
        special, keys = set(tokenizer.all_special_ids), list[Key]()
        for number, token in enumerate(_tokens(tokenizer)):
            meaning = None if number in special or token is None else reader.read(token)
            keys.append(None if meaning is None else _key(*meaning, readers, drops))
        made.append(_with_ends(tokenizer, keys))
    return made[0], made[1]


def _key(text: str | bytes, begins: bool, readers: "tuple[_Reader, _Reader]", drops: bool) -> Key:
    if isinstance(text, str) and text.strip():
        for reader in readers:
            text = reader.normalize(text)
        if not text:
            return None
        if drops and not _is_spaced(text[0]):
            return ("text", text)
    return ("text", text, begins)


def _is_spaced(letter: str) -> bool:
    """Return whether a word that begins with this letter has a space in front: no signs, no CJK writing."""
    return letter.isalnum() and not "\u2e80" <= letter <= "\ud7ff"


def _tokens(tokenizer: Any) -> list[str | None]:
    """Return the tokens by number; None for an unused number."""
    vocabulary = tokenizer.get_vocab()
    tokens: list[str | None] = [None] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        tokens[number] = token
    return tokens


def _with_ends(tokenizer: Any, keys: Sequence[Key]) -> list[Key]:
    """Return the keys with one meaning for the token that ends a text, whatever its name is."""
    end = tokenizer.eos_token_id
    return [("end",) if number == end else None if key == ("token", None) else key for number, key in enumerate(keys)]


def _settings(tokenizer: Any) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _kind(tokenizer: Any) -> Any:
    """Return all settings except the vocabulary that decide what a token means."""
    settings = _settings(tokenizer)
    model = {
        name: settings["model"].get(name)
        for name in ("type", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    }
    return [settings["normalizer"], settings["pre_tokenizer"], settings["decoder"], model]


@dataclass(frozen=True, eq=False)
class _Reader:
    """A reader of the tokens of one tokenizer.

    Attributes:
        way: "bytes" (GPT-2's letters for bytes), "space" (▁ for a space), "pieces" (a prefix such as ## inside words),
            or "words" (only whole words).
        normalizer: the normalizer of the tokenizer, None if it has none.
        prefix: the prefix of tokens inside words.
    """

    way: str
    normalizer: Any
    prefix: str = ""

    @classmethod
    def of(cls, tokenizer: Any, side: str) -> "_Reader":
        """Return the reader of a tokenizer, by the way in which it marks the beginnings of words."""
        settings = _settings(tokenizer)
        parts = [part["type"] for name in ("pre_tokenizer", "decoder") for part in _parts(settings[name])]
        model, normalizer = settings["model"], tokenizer.backend_tokenizer.normalizer
        marks = json.dumps([settings["normalizer"], settings["decoder"]], ensure_ascii=False)
        if "ByteLevel" in parts:
            return cls("bytes", normalizer)
        if "Metaspace" in parts or "▁" in marks:
            return cls("space", normalizer)
        prefix = model.get("continuing_subword_prefix")
        if prefix and not model.get("end_of_word_suffix"):
            return cls("pieces", normalizer, prefix)
        if model["type"] == "WordLevel":
            return cls("words", normalizer)
        raise DistillError(
            f"the tokenizer of the {side} ({type(tokenizer).__name__}, {model['type']}) does not mark where a "
            "word begins, so its tokens cannot be compared with those of another kind; use one that does (Ġ, ▁ or "
            "##), or two of one kind."
        )

    @property
    def drops_spaces(self) -> bool:
        """True if tokens do not include the space before a word."""
        return self.way in ("pieces", "words")

    def read(self, token: str) -> tuple[str | bytes, bool]:
        """Return the text of a token without the space in front (or bytes), and whether it begins a word."""
        if self.drops_spaces:
            inside = bool(self.prefix) and token.startswith(self.prefix) and token != self.prefix
            return (token.removeprefix(self.prefix), False) if inside else (token, True)
        if self.way == "bytes":
            numbers = [_BYTES.get(letter) for letter in token]
            raw = token.encode() if None in numbers else bytes(n for n in numbers if n is not None)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            raw = bytes.fromhex(token[3:5])
        else:
            raw = token.replace("▁", " ").encode()
        begins = raw.startswith(b" ") and len(raw) > 1
        raw = raw[1:] if begins else raw
        try:
            return raw.decode(), begins
        except UnicodeDecodeError:
            return raw, begins

    def normalize(self, text: str) -> str:
        """Return a text as the tokenizer normalizes it before it looks for tokens."""
        if self.normalizer is None:
            return text
        return self.normalizer.normalize_str(text).replace("▁", " ").strip(" ")


def _parts(settings: Any) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer or decoder, with nested sequences flattened."""
    if settings is None:
        return []
    inner = settings.get("pretokenizers") or settings.get("decoders")
    return [part for each in inner for part in _parts(each)] if inner else [settings]


def _letters_of_bytes() -> dict[str, int]:
    """Return the byte of each of GPT-2's letters: printable bytes are their own letter, others one from 256 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTES = _letters_of_bytes()
