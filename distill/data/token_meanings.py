"""What the tokens of two tokenizers mean, so that those that mean the same are found."""

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
    """Which tokens of two vocabularies mean the same text.

    Attributes:
        student, teacher: `[vocabulary]`: the number of the meaning of each token; `count` for one that the other
            vocabulary lacks.
        count: how many meanings both have. One may have several tokens, as "The" and "the" for a tokenizer that knows
            no capitals.
    """

    student: Int[Tensor, " student_vocabulary"]
    teacher: Int[Tensor, " teacher_vocabulary"]
    count: int


def shared_meanings(student: Any, teacher: Any) -> Shared:
    """Which tokens of two fast Hugging Face tokenizers mean the same.

    Tokenizers of one kind are compared token by token. Others by the text that a token stands for, whether it begins a
    word (Ġ, ▁, or no ##) and what the normalisations of both make of it; bytes that are no whole letter by themselves.
    Where a tokenizer drops spaces, signs that are no letters mean the same with and without one. Of the special tokens
    of tokenizers of two kinds the end of the text alone means the same.

    Raises:
        DistillError: vocabularies that have nothing in common, or a tokenizer that does not mark where words begin.
    """
    ours, theirs = _keys(student, teacher)
    known = set(theirs)
    common = [key for key in dict.fromkeys(ours) if key is not None and key in known]
    if not common:
        raise DistillError(
            "no token of the student's vocabulary means the same as one of the teacher's, so their answers cannot be "
            "compared; distil features instead, or take models that share a script."
        )
    numbers: dict[Key, int] = {key: number for number, key in enumerate(common)}
    bins, others = (torch.tensor([numbers.get(key, len(common)) for key in side]) for side in (ours, theirs))
    return Shared(bins, others, len(common))


def _keys(student: Any, teacher: Any) -> tuple[list[Key], list[Key]]:
    """What each token of both means, in a form that is equal where the meaning is; None for nothing to compare."""
    kinds = _kind(student), _kind(teacher)
    if kinds[0] == kinds[1]:
        ours, theirs = ([("token", text) for text in _tokens(each)] for each in (student, teacher))
        return _with_ends(student, ours), _with_ends(teacher, theirs)
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
            text = reader.normalised(text)
        if not text:
            return None
        if drops and not _is_spaced(text[0]):
            return ("text", text)
    return ("text", text, begins)


def _is_spaced(letter: str) -> bool:
    """Whether words that begin with it have a space in front: not signs, nor Chinese, Japanese and Korean writing."""
    return letter.isalnum() and not "\u2e80" <= letter <= "\ud7ff"


def _tokens(tokenizer: Any) -> list[str | None]:
    """The tokens by number; None where a number is not taken."""
    vocabulary = tokenizer.get_vocab()
    tokens: list[str | None] = [None] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        tokens[number] = token
    return tokens


def _with_ends(tokenizer: Any, keys: Sequence[Key]) -> list[Key]:
    """With one meaning for what ends a text, whatever it is called."""
    end = tokenizer.eos_token_id
    return [("end",) if number == end else None if key == ("token", None) else key for number, key in enumerate(keys)]


def _settings(tokenizer: Any) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _kind(tokenizer: Any) -> Any:
    """All that decides what a token means but the vocabulary."""
    settings = _settings(tokenizer)
    model = {
        name: settings["model"].get(name)
        for name in ("type", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    }
    return [settings["normalizer"], settings["pre_tokenizer"], settings["decoder"], model]


@dataclass(frozen=True, eq=False)
class _Reader:
    """What the tokens of a tokenizer stand for.

    Attributes:
        way: "bytes" (GPT-2's letters for bytes), "space" (▁ for a space), "pieces" (a prefix such as ## inside words),
            or "words" (whole words alone).
        prefix: inside words.
    """

    way: str
    normalizer: Any
    prefix: str = ""

    @classmethod
    def of(cls, tokenizer: Any, side: str) -> "_Reader":
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
        return self.way in ("pieces", "words")

    def read(self, token: str) -> tuple[str | bytes, bool]:
        """The text of a token without the space in front, or bytes that are no text; whether it begins a word."""
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

    def normalised(self, text: str) -> str:
        """What the tokenizer makes of a text before it looks for tokens."""
        if self.normalizer is None:
            return text
        return self.normalizer.normalize_str(text).replace("▁", " ").strip(" ")


def _parts(settings: Any) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer or decoder, those of sequences one by one."""
    if settings is None:
        return []
    inner = settings.get("pretokenizers") or settings.get("decoders")
    return [part for each in inner for part in _parts(each)] if inner else [settings]


def _letters_of_bytes() -> dict[str, int]:
    """GPT-2's letter for each byte: its own where it can be printed, else one from 256 on, in order."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTES = _letters_of_bytes()
