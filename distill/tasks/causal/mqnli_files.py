"""The files of the quantified sentences (MQNLI): which words stand in each slot, and the checks of their rows.

A row is `{"sentence1": premise, "sentence2": hypothesis, "gold_label": label, "nodes": {node: relation}}`, and a
sentence is nine words, one a slot, "emptystring" where a modifier or the negation is absent.
Geiger, Cases, Karttunen, Potts 2019 (arXiv:1911.00811).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from distill.data.files import read
from distill.errors import DistillError

SPLITS = ("train", "dev", "test")
SPECIAL, ABSENT, NEGATION = ("[PAD]", "[CLS]", "[SEP]"), "emptystring", "doesnot"
DETERMINERS = ("some", "every", "no", "notevery")
"""The last two are the first two, negated."""
KNOWN = (*SPECIAL, ABSENT, NEGATION, *DETERMINERS)
"""The words 0 to 8 of every vocabulary."""
SLOTS = (
    *("subject_determiner", "subject_adjective", "subject_noun"),
    *("negation", "adverb", "verb"),
    *("object_determiner", "object_adjective", "object_noun"),
)
"""The nine words of a sentence."""
FIXED = {"subject_determiner": DETERMINERS, "negation": (ABSENT, NEGATION), "object_determiner": DETERMINERS}
"""The slots whose words are the same in every file."""
MODIFIERS = ("subject_adjective", "adverb", "object_adjective")
EXAMPLE = "every sad actor doesnot emptystring eat some emptystring cake"
SENTENCES = ("sentence1", "sentence2")
INPUTS = tuple(f"{side}_{slot}" for side in ("premise", "hypothesis") for slot in SLOTS)


def slot_of(name: str) -> str:
    """Return the slot of an input: "verb" for "premise_verb"."""
    return name.split("_", 1)[1]


def words_of_slots(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return the words that stand in each slot of the training file.

    Raises:
        DistillError: no such folder or file, a row without nine words a sentence, an unknown determiner, no modifiers.
    """
    path, table = read_split(folder, "train")
    columns, words = columns_of(path, table), dict(FIXED)
    for slot in SLOTS:
        found = {*columns[f"premise_{slot}"], *columns[f"hypothesis_{slot}"]} - {ABSENT}
        if slot in MODIFIERS and not found:
            raise DistillError(f"{path} has no {slot} but {ABSENT!r}; add a row with one, as {EXAMPLE!r}.")
        words.setdefault(slot, (*[ABSENT][: slot in MODIFIERS], *sorted(found)))
    for name, column in columns.items():
        places_of(path, name, column, words[slot_of(name)])
    return words


def number_words(words: dict[str, tuple[str, ...]]) -> dict[str, int]:
    """Return the number of each word in the vocabulary."""
    others = {word for found in words.values() for word in found} - set(KNOWN)
    return {word: number for number, word in enumerate((*KNOWN, *sorted(others)))}


def domains_of(words: dict[str, tuple[str, ...]]) -> dict[str, list[int]]:
    """Return the numbers of the words that may stand in each slot."""
    numbers = number_words(words)
    return {slot: [numbers[word] for word in found] for slot, found in words.items()}


def read_split(folder: Path, split: str) -> tuple[Path, list[dict[str, Any]]]:
    """Return the file of a split, "train", "dev" or "test", and its rows.

    Raises:
        DistillError: an unknown split, no such folder or file, or one that is no JSON.
    """
    if split not in SPLITS:
        raise DistillError(f"there is no split {split!r}; give one of {', '.join(map(repr, SPLITS))}.")
    if not folder.is_dir():
        raise DistillError(f"{folder} is not a folder; give that of mqnli_train.jsonl.gz, as 'data/mqnli'.")
    path = next((path for end in ("", ".gz") if (path := folder / f"mqnli_{split}.jsonl{end}").exists()), None)
    if path is None:
        raise DistillError(
            f"{folder} has no mqnli_{split}.jsonl or mqnli_{split}.jsonl.gz; put it there, or name another folder."
        )
    return path, read(path)


def columns_of(path: Path, table: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the word of each row for each input.

    Raises:
        DistillError: a row without nine words a sentence.
    """
    found = []
    for number, row in enumerate(table, 1):
        sentences = [given.split() if isinstance(given := row.get(key), str) else [] for key in SENTENCES]
        for key, words in zip(SENTENCES, sentences, strict=True):
            if len(words) != len(SLOTS):
                raise DistillError(
                    f"row {number} of {path} has {len(words)} words as {key}, not {len(SLOTS)}: {row.get(key)!r}; "
                    f"write {EXAMPLE!r}, with {ABSENT!r} for what is absent."
                )
        found.append(sentences[0] + sentences[1])
    return dict(zip(INPUTS, map(list, zip(*found, strict=True)), strict=True))


def places_of(path: Path, name: str, column: Sequence[Any], known: tuple[str, ...]) -> Int[Tensor, " rows"]:
    """Return the place of each value of a column among the known ones.

    Raises:
        DistillError: a value that is not among them, with its row.
    """
    places = {word: place for place, word in enumerate(known)}
    for number, given in enumerate(column, 1):
        if not isinstance(given, str) or given not in places:
            listed = ", ".join(map(repr, known[:7])) + (", …" if len(known) > 7 else "")
            raise DistillError(
                f"row {number} of {path} has an unknown {name}: {given!r}; correct it, to one of {listed}."
            )
    return torch.tensor([places[given] for given in column])
