"""Minimal pairs: a grammatical sentence and an ungrammatical one, which a language model should find less probable.

Marvin, Linzen 2018 (arXiv:1808.09031); Warstadt et al. 2020 (BLiMP, arXiv:1912.00582).
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from distill.data.rows import Rows
from distill.data.text import need_tokenizer, tokenize_texts
from distill.errors import DistillError, checked

SENTENCES = (("good", "bad"), ("sentence_good", "sentence_bad"))
GROUPS = ("test", "UID")


@checked
@dataclass(frozen=True, eq=False)
class MinimalPairs:
    """Pairs of a grammatical and an ungrammatical sentence.

    `distill.metrics.preferences(model, pairs)` measures how often a language model prefers the grammatical one.

    Attributes:
        good, bad: the grammatical and the ungrammatical sentences, in the same order.
        groups: the name of the phenomenon that each pair tests.
    """

    good: Rows
    bad: Rows
    groups: tuple[str, ...]

    def __post_init__(self) -> None:
        counts = len(self.good), len(self.bad), len(self.groups)
        if len(set(counts)) > 1:
            raise DistillError(
                f"minimal pairs need a bad sentence and a group for each good one, and have {counts[0]} good, "
                f"{counts[1]} bad and {counts[2]} groups; give as many of each."
            )

    def __len__(self) -> int:
        return len(self.groups)


@checked
def minimal_pairs(
    path: str | Path, tokenizer: Any, *, by: str | None = None, limit: int | None = None, seed: int = 0
) -> MinimalPairs:
    """Return the pairs of a file, tokenized.

    Each line is a JSON object with `good` and `bad`, or `sentence_good` and `sentence_bad`, the format of Marvin,
    Linzen 2018 (arXiv:1808.09031) and BLiMP (Warstadt et al. 2020, arXiv:1912.00582).

    Args:
        path: a .jsonl or .jsonl.gz file.
        tokenizer: the tokenizer of the language model.
        by: the field by which results are grouped; by default "test" or "UID", whichever the file has.
        limit: the most pairs of each group, drawn by `seed`; None is all.
        seed: seeds the draw.

    Raises:
        DistillError: no file, a line that is no such object, or a pair with equal tokens.
    """
    need_tokenizer(Path(path).name, tokenizer)
    lines = _lines(Path(path))
    names = next((names for names in SENTENCES if set(names) <= lines[0].keys()), None)
    group = by or next((name for name in GROUPS if name in lines[0]), "")
    if names is None or (by is not None and by not in lines[0]):
        wanted = "'good' and 'bad'" if names is None else repr(by)
        raise DistillError(
            f"{path} has {', '.join(lines[0])} and not {wanted}; rename the fields, or choose another by=…."
        )
    chosen = _draw([str(line.get(group, "all")) for line in lines], limit, seed)
    try:
        good, bad = ([str(lines[i][name]) for i in chosen] for name in names)
    except KeyError as error:
        raise DistillError(f"{path} has a line without {error}; give every line the same fields.") from None
    groups = tuple(str(lines[i].get(group, "all")) for i in chosen)
    pairs = MinimalPairs(_rows(tokenizer, good), _rows(tokenizer, bad), groups)
    for one, other, text in zip(pairs.good.table["input_ids"], pairs.bad.table["input_ids"], good, strict=True):
        if one.tolist() == other.tolist():
            raise DistillError(
                f"the tokens of {text!r} and of its counterpart are the same; use the model's tokenizer."
            )
    return pairs


def _lines(path: Path) -> list[Mapping[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            found = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).split("\n")[0]
        raise DistillError(f"{path} cannot be read: {reason}; give a file of one JSON object a line.") from error
    if not found or not all(isinstance(line, dict) for line in found):
        raise DistillError(f"{path} holds no JSON objects, one a line; give a file of pairs, as BLiMP's.")
    return found


def _draw(groups: Sequence[str], limit: int | None, seed: int) -> list[int]:
    """Draw the numbers of the pairs to keep, in order."""
    if limit is None:
        return list(range(len(groups)))
    if limit < 1:
        raise DistillError(f"limit={limit} keeps no pair; use 1 or more.")
    members = defaultdict[str, list[int]](list)
    for i, group in enumerate(groups):
        members[group].append(i)
    draws = Random(seed)
    return sorted(i for each in members.values() for i in draws.sample(each, min(limit, len(each))))


def _rows(tokenizer: Any, texts: list[str]) -> Rows:
    rows = tokenize_texts(tokenizer, texts, [0] * len(texts))
    return Rows(
        {name: column for name, column in rows.table.items() if name != "labels"}, rows.pad_id, rows.padding_side
    )
