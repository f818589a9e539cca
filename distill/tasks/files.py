import csv
import gzip
import json
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch

from distill.errors import DistillError
from distill.tasks.task import Task, share
from distill.tasks.text import need_tokenizer, text_task

SUFFIXES = (".csv", ".tsv", ".jsonl")
Quoting = Literal[0, 3]  # csv.QUOTE_MINIMAL and csv.QUOTE_NONE
TEXT_COLUMNS, LABEL_COLUMNS = ("text", "sentence"), ("label", "labels")


def task(
    data: str | Path,
    tokenizer: Any,
    *,
    eval_data: str | Path | None = None,
    fraction: float = 1.0,
    seed: int = 0,
    text: str | None = None,
    label: str | None = None,
    test_share: float = 0.2,
) -> Task:
    """Text classification from a .csv, .tsv or .jsonl file (also .gz), utf-8, with a header.

    Tested on `eval_data`, or on a share of each class that is held out. `text` and `label` name the columns; left out,
    they are "text" or "sentence", and "label" or "labels". Classes are sorted, whole numbers by value. `test_share` is
    held out of each class, drawn by `seed`.

    Raises DistillError without a tokenizer, for a file that is missing, empty, of another kind, or not parsable, a
    column that does not exist, an empty text or label, rows of a single class, and labels of `eval_data` that the
    training file lacks.
    """
    name = Path(data).name.split(".")[0]
    need_tokenizer(name, tokenizer)
    texts, names = labelled(data, text, label)
    classes = _classes(names, data)
    labels = [classes.index(found) for found in names]
    if eval_data is None:
        train, test = held_out(labels, test_share, seed)
        test_texts, test_labels = [texts[i] for i in test], [labels[i] for i in test]
    else:
        train = list(range(len(texts)))
        test_texts, test_names = labelled(eval_data, text, label)
        if unknown := sorted(set(test_names) - set(classes)):
            raise DistillError(
                f"{eval_data} has labels that {data} lacks: {', '.join(unknown)}; known are {', '.join(classes)}"
            )
        test_labels = [classes.index(found) for found in test_names]
    chosen = [train[i] for i in share(len(train), fraction, seed).tolist()]
    return text_task(
        name,
        ([texts[i] for i in chosen], [labels[i] for i in chosen]),
        (test_texts, test_labels),
        classes,
        tokenizer,
        description=f"Text classification, {len(classes)} classes, from {Path(data).name}.",
    )


def read(path: str | Path, *, quoting: Quoting = csv.QUOTE_MINIMAL) -> list[dict[str, Any]]:
    """The rows of a table as dicts; the file's ending says how it is written.

    A .tsv that is not well-formed under `quoting` is read again with quotation marks as plain characters, as GLUE's
    files need.

    Raises DistillError for a file that is missing, of another kind, malformed or without rows.
    """
    path = Path(path)
    kind = next((suffix for suffix in SUFFIXES if path.name.removesuffix(".gz").endswith(suffix)), None)
    if path.is_dir():
        raise DistillError(
            f"{path} is a folder; give a file, or name the task that it belongs to: --task sst2 --data {path}"
        )
    if kind is None:
        raise DistillError(
            f"{path} is not a kind of file that can be read; "
            f"give a {', '.join(SUFFIXES)} file, or one of these with .gz"
        )
    if not path.is_file():
        raise DistillError(f"{path} does not exist; give the path of a {kind} file, as --data FILE")
    content = _content(path)
    try:
        if kind == ".jsonl":
            rows = [json.loads(line) for line in content.split("\n") if line.strip()]
        else:
            rows = _table(content, "," if kind == ".csv" else "\t", quoting)
    except (csv.Error, json.JSONDecodeError) as error:
        if kind == ".tsv" and quoting != csv.QUOTE_NONE:
            return read(path, quoting=csv.QUOTE_NONE)
        raise DistillError(
            f"{path} is not well-formed {kind[1:]}: {error}; correct that row, or save the file again"
        ) from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DistillError(
            f"{path} has no rows{'' if not rows else ' of named columns'}; "
            "give at least two, with a text and a label each"
        )
    return rows


def labelled(
    path: str | Path, text: str | None = None, label: str | None = None, *, quoting: Quoting = csv.QUOTE_MINIMAL
) -> tuple[list[str], list[str]]:
    """The texts and labels of a file, both as strings.

    Raises DistillError for a missing column and for an empty text or label.
    """
    rows = read(path, quoting=quoting)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = _found(path, columns, "text", text, TEXT_COLUMNS)
    label = _found(path, columns, "label", label, LABEL_COLUMNS)
    for number, row in enumerate(rows, 1):
        for what, name in (("text", text), ("label", label)):
            if row.get(name) is None or not str(row[name]).strip():
                raise DistillError(
                    f"row {number} of {path} has an empty {what} (column {name!r}); fill it in, or remove the row"
                )
    return [str(row[text]) for row in rows], _labels([str(row[label]).strip() for row in rows])


def held_out(labels: Sequence[int], test_share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices, ascending, of training and test rows: about `test_share` of each class, and at least one, tests.

    At least one is left for training, so a class with one row stays in training. Raises DistillError if no class has
    two.
    """
    classes = torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test: list[int] = []
    for name in classes.unique():
        members = order[classes[order] == name].tolist()
        test += members[: min(max(1, round(len(members) * test_share)), len(members) - 1)]
    if not test:
        raise DistillError(
            f"no class has two rows ({len(labels)} rows in all), so none can be held out for testing; "
            "give eval_data=FILE or more rows"
        )
    return sorted(set(range(len(labels))) - set(test)), sorted(test)


def _content(path: Path) -> str:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DistillError(f"{path} is not utf-8 ({error.reason} at byte {error.start}); save it as utf-8") from None
    except (OSError, EOFError) as error:
        raise DistillError(f"{path} cannot be read: {error}; check the file") from None


def _table(content: str, delimiter: str, quoting: Quoting) -> list[dict[str, Any]]:
    # newline="" leaves line ends inside quoted fields to the csv module.
    lines = csv.reader(StringIO(content, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    header = [name.strip() for name in next(lines, [])]
    rows = []
    for row in lines:
        if len(row) > len(header):
            raise csv.Error(f"line {lines.line_num} has {len(row)} fields and the header {len(header)}")
        if row:
            rows.append(dict(zip(header, row, strict=False)))
    return rows


def _found(path: str | Path, columns: list[str], what: str, asked: str | None, usual: tuple[str, ...]) -> str:
    for name in (asked,) if asked else usual:
        if name in columns:
            return name
    named = repr(asked) if asked else " or ".join(map(repr, usual))
    raise DistillError(
        f"{path} has no {what} column {named}: its columns are {', '.join(map(repr, columns))}; "
        f"name one with {what}=..., or --{what} on the command line"
    )


def _labels(names: list[str]) -> list[str]:
    """Whole numbers in one spelling, so that "01" and "1" are one class."""
    if all(re.fullmatch(r"[+-]?\d+", name) for name in names):
        return [str(int(name)) for name in names]
    return names


def _classes(names: list[str], path: str | Path) -> tuple[str, ...]:
    found = set(names)
    if len(found) == 1:
        raise DistillError(
            f"all {len(names)} rows of {path} have the label {names[0]!r}; a classifier needs at least two classes"
        )
    if len(found) > max(2, len(names) // 2):
        raise DistillError(
            f"{path} has {len(found)} different labels in {len(names)} rows, e.g. {names[0]!r}; "
            "name the column of classes with label=..."
        )
    numbers = all(re.fullmatch(r"-?\d+", name) for name in found)
    return tuple(sorted(found, key=int) if numbers else sorted(found))
