"""Text classification from a file of the user: its texts, labels, classes, and the split into training and test."""

import csv
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from distill.data.classes import folded, matched, ranked, stated, whole_numbers
from distill.data.missing import IGNORED, are_all_missing, missing_rows, warn_of_missing, warn_of_no_labels
from distill.data.rows import Rows
from distill.data.tables import SUFFIXES, Quoting, kind_of, read
from distill.data.task import Task, share
from distill.data.text import Text, need_tokenizer, text_task, tokenize_texts
from distill.errors import DistillError
from interventions import printable, shown

__all__ = ["SUFFIXES", "held_out", "labelled", "read", "rows_of", "task"]

TEXT_COLUMNS, LABEL_COLUMNS = ("text", "sentence"), ("label", "labels")
PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"))
"""The usual columns of pairs of texts, which are looked for where there is no column of texts."""
Labels = list[str | None] | None
"""The labels of rows, None for a row without one; None where no row has one."""
Numbers = Sequence[int] | Sequence[float] | None
Columns = str | Sequence[str] | None
"""The column of texts, or two of pairs of texts."""
REAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
NAME_THEM = "name the column of classes with label=..."


def task(
    data: str | Path,
    tokenizer: Any,
    *,
    eval_data: str | Path | None = None,
    fraction: float = 1.0,
    seed: int = 0,
    text: Columns = None,
    label: str | None = None,
    classes: Sequence[str] | None = None,
    max_length: int | None = None,
    test_share: float = 0.2,
    split_seed: int = 0,
    clusters: str | None = None,
) -> Task:
    """Return a task of text classification from a .csv, .tsv or .jsonl file (also .gz), utf-8, with a header.

    Classes are sorted, whole numbers by value, until a model numbers them (`numbered_as`). A file without a column of
    labels, and a .txt file, which has a text a line, gives a task without classes, for objectives that need no labels.

    Args:
        data: the file.
        tokenizer: reads the texts.
        eval_data: a file of rows to test on; without it, a share of each class is held out.
        fraction: the share of the training rows to keep, drawn by `seed`.
        seed: seeds that draw.
        text: the column of texts, "text" or "sentence" by default, or two columns of pairs, as ("premise",
            "hypothesis"), which is found where there is no column of texts.
        label: the column of labels, "label" or "labels" by default.
        classes: the labels in the order of the model's outputs.
        max_length: texts are cut at this number of tokens, 128 by default.
        test_share: the share of each class to hold out, drawn by `split_seed`.
        split_seed: seeds that draw.
        clusters: the column of what rows share, e.g. a template or a speaker; rows with one value are related.

    Raises:
        DistillError: no tokenizer; a file that is missing, empty, of another kind, or not parsable; a column that does
            not exist or exists twice; an empty text or label; rows of a single class; labels of `eval_data` that the
            training file lacks; one file given as both.
    """
    name = _check_readable(data, tokenizer)
    texts, labels = labelled(data, text, label)
    tests = None if eval_data is None else _read_tests(eval_data, data, texts, text, label)
    values = None if classes is not None else values_of(labels)
    names = () if values is not None else _names(labels, data, classes, tests, eval_data)
    numbers: Numbers = values or _numbers(labels, names)
    if tests is None:
        parted = _numbers(labels, names) if names else None
        train, test = held_out(parted or [0] * len(texts), test_share, split_seed)
        held = ([texts[i] for i in test], _at(numbers, test))
    else:
        train, test = (list(range(len(each))) for each in (texts, tests[0]))
        held = (tests[0], _numbers(tests[1], names) if values is None else _reals(tests[1], eval_data))
    chosen = [train[i] for i in share(len(train), fraction, seed).tolist()]
    kind = f"Text classification, {len(names)} classes" if names else "Texts without labels"
    kind = kind if values is None else "Texts with a real value each"
    task = text_task(
        name,
        ([texts[i] for i in chosen], _at(numbers, chosen)),
        held,
        names,
        tokenizer,
        description=f"{kind}, from {Path(data).name}.",
        max_length=max_length,
    )
    if clusters is None:
        return task
    of_train, of_test = clusters_in(data, clusters), clusters_in(data if eval_data is None else eval_data, clusters)
    rows = Rows.of(task.train, clusters=of_train[chosen]), Rows.of(task.test, clusters=of_test[test])
    return replace(task, train=rows[0], test=rows[1], clusters=clusters)


def clusters_in(path: str | Path, column: str) -> Int[Tensor, " rows"]:
    """Return the number of the cluster of each row of a file: rows with one value of a column are of one.

    Raises:
        DistillError: a column that does not exist, or an empty value.
    """
    rows = read(path)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    values = _read_column(path, rows, "cluster", find_column(path, columns, "clusters", column, ()))
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return torch.tensor([numbers[value] for value in values])


def rows_of(
    data: str | Path,
    tokenizer: Any,
    max_length: int | None = None,
    *,
    text: Columns = None,
    label: str | None = None,
) -> Rows:
    """Return all rows of a file, its classes in sorted order until a model numbers them."""
    _check_readable(data, tokenizer)
    texts, labels = labelled(data, text, label)
    values = values_of(labels)
    names = None if labels is None or values is not None else ranked(_known(labels))
    numbers: Numbers = values if names is None else _numbers(labels, names)
    rows = tokenize_texts(tokenizer, texts, numbers, max_length)
    return Rows(rows.table, rows.pad_id, rows.padding_side, rows.pads, names)


def _check_readable(data: str | Path, tokenizer: Any) -> str:
    """Return the name of the task of a file, after a check that the file exists and a tokenizer is given."""
    kind_of(data)
    name = Path(data).name.split(".")[0]
    need_tokenizer(name, tokenizer)
    return name


def labelled(
    path: str | Path, text: Columns = None, label: str | None = None, *, quoting: Quoting = csv.QUOTE_MINIMAL
) -> tuple[list[Text], Labels]:
    """Return the texts (or pairs) and labels of a file as strings; None for the labels if it has no column of them.

    Raises:
        DistillError: a column that was named and is missing, or an empty text or label.
    """
    rows = read(path, quoting=quoting)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    sides = columns_of_texts(path, columns, text)
    if label is None and not set(columns) & set(LABEL_COLUMNS):
        others = [name for name in columns if name not in (*sides, "")]
        if others:
            warnings.warn(
                f"{printable(str(path))} has no label column 'label' or 'labels' (beside "
                f"{' and '.join(map(repr, sides))} it has {', '.join(map(repr, others))}), so its texts are used "
                "without labels; name one with label=..., or --label on the command line",
                stacklevel=4,
            )
        return _read_texts(path, rows, sides), None
    label = find_column(path, columns, "label", label, LABEL_COLUMNS)
    return _read_texts(path, rows, sides), _read_labels(path, rows, label)


def _read_labels(path: str | Path, rows: list[dict[str, Any]], name: str) -> Labels:
    """Return the labels of a column as texts; a warning names the first row that lacks one."""
    values = [row.get(name) for row in rows]
    missing = set(range(len(rows)) if are_all_missing(values) else missing_rows(values))
    if len(missing) == len(rows):
        warn_of_no_labels(len(rows), printable(str(path)))
        return None
    if several := next((n for n, value in enumerate(values, 1) if isinstance(value, list)), None):
        raise DistillError(
            f"row {several} of {path} has {shown(values[several - 1])} as label (column {name!r}), which are "
            f"several; give the file in a list, which reads them as such: data=[{str(path)!r}]."
        )
    kept = [number for number in range(len(rows)) if number not in missing]
    texts = [each.strip() for each in _read_column(path, rows, "label", name, kept)]
    known = dict(zip(kept, _unify_numbers(texts), strict=True))
    if not missing:
        return list(known.values())
    first = f"row {min(missing) + 1} of {printable(str(path))}"
    if all(map(REAL.fullmatch, texts)) and whole_numbers(texts) is None:
        raise DistillError(f"{first} has no label (column {name!r}), and others are real values; leave the row out.")
    warn_of_missing(len(missing), len(rows), first)
    return [known.get(number) for number in range(len(rows))]


def columns_of_texts(path: str | Path, columns: list[str], text: Columns) -> tuple[str, ...]:
    """Return the columns of texts: one, or two of pairs.

    Raises:
        DistillError: a column that does not exist, or another number of them.
    """
    usual = next((pair for pair in PAIRS if set(pair) <= set(columns)), None)
    if text is None and usual is not None and not set(columns) & set(TEXT_COLUMNS):
        return usual
    if text is None or isinstance(text, str):
        return (find_column(path, columns, "text", text, TEXT_COLUMNS),)
    if len(text) != 2:
        raise DistillError(
            f"text={shown(text)} names {len(text)} columns; name one of texts, text='sentence', or two of pairs, "
            "text=('premise', 'hypothesis')."
        )
    return tuple(find_column(path, columns, "text", name, ()) for name in text)


def _read_texts(path: str | Path, rows: list[dict[str, Any]], sides: tuple[str, ...]) -> list[Text]:
    """Return the texts of a column, or the pairs of two."""
    read = [_read_column(path, rows, "text", name) for name in sides]
    return [*read[0]] if len(read) == 1 else list(zip(*read, strict=True))


def held_out(labels: Sequence[int], test_share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices, ascending, of training and test rows: about `test_share` of each class is for tests.

    Each class with two or more rows has at least one in each part; a class with one row has it in training.

    Raises:
        DistillError: no class has two rows.
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


def _read_tests(
    eval_data: str | Path, data: str | Path, texts: list[Text], text: Columns, label: str | None
) -> tuple[list[Text], Labels]:
    """Return the texts and labels to test on; warn about texts that are also trained on."""
    if is_same_file(eval_data, data):
        raise DistillError(
            f"eval_data is {eval_data}, the file that is trained on, so nothing would be held out; leave eval_data out "
            "(--eval-data), and a fifth is held out, or give another file"
        )
    found = labelled(eval_data, text, label)
    known = set(texts)
    if shared := sum(each in known for each in found[0]):
        warnings.warn(
            printable(
                f"{shared} of the {len(found[0])} texts of {eval_data} are also in {data}, so the network is tested "
                "on texts that it was trained on; remove them from one of the files"
            ),
            stacklevel=4,
        )
    return found


def is_same_file(one: Any, other: Any) -> bool:
    """Return whether two paths name one file."""
    both = isinstance(one, str | Path) and isinstance(other, str | Path)
    return both and Path(one).is_file() and Path(other).is_file() and Path(one).samefile(other)


def _names(
    labels: Labels, data: Any, classes: Sequence[str] | None, tests: tuple[list[Text], Labels] | None, eval_data: Any
) -> tuple[str, ...]:
    """Return the classes: as stated, else the sorted labels of the training file, else of the file to test on."""
    found = None if tests is None else tests[1]
    if classes is not None:
        return stated(classes)
    if labels is None:
        return () if found is None else classes_of(_known(found), eval_data)
    names = classes_of(_known(labels), data)
    known = set(map(folded, names))
    if unknown := sorted(each for each in set(_known(found or ())) if folded(each) not in known):
        raise DistillError(
            f"{eval_data} has labels that {data} lacks: {', '.join(unknown)}; known are {', '.join(names)}"
        )
    return names


def _numbers(labels: Labels, names: Sequence[str]) -> list[int] | None:
    if labels is None:
        return None
    found = list(dict.fromkeys(_known(labels)))
    number: dict[str | None, int] = dict(zip(found, matched(found, names, "the names given"), strict=True))
    return [number.get(each, IGNORED) for each in labels]


def values_of(labels: Labels) -> list[float] | None:
    """Return labels as real numbers if they are such and not classes: most of them differ, and not all are whole."""
    known = _known(labels or ())
    many = len(set(known)) > max(2, len(known) // 2)
    if labels is None or len(known) < len(labels) or not many or whole_numbers(known) is not None:
        return None
    return list(map(float, known)) if all(map(REAL.fullmatch, known)) else None


def _reals(labels: Labels, path: Any) -> list[float] | None:
    """Return the labels of a file to test on as real numbers.

    Raises:
        DistillError: one is none.
    """
    odd = next((each for each in labels or () if each is None or not REAL.fullmatch(each)), 0)
    if odd != 0:
        raise DistillError(
            f"{path} has the label {odd!r}, and those that are trained on are real values; write numbers, or name the "
            "classes: classes=[…], --classes a,b."
        )
    return None if labels is None else [float(each) for each in labels if each is not None]


def _known(labels: Iterable[str | None]) -> list[str]:
    """Return the labels that are not missing."""
    return [each for each in labels if each is not None]


def _at(numbers: Numbers, places: Sequence[int]) -> Numbers:
    return None if numbers is None else [numbers[i] for i in places]


def _read_column(
    path: str | Path, rows: list[dict[str, Any]], what: str, name: str, chosen: Iterable[int] | None = None
) -> list[str]:
    """Return a column as texts, of the rows that are chosen or of all, after a check that each of them has one."""
    kept = [(number + 1, rows[number]) for number in (range(len(rows)) if chosen is None else chosen)]
    for number, row in kept:
        if isinstance(value := row.get(name), list | dict) or (isinstance(value, str) and not _is_writable(value)):
            raise DistillError(
                f"row {number} of {path} has {shown(value)} as {what} (column {name!r}), which is no text; write it as "
                "one, in whole characters, or remove the row"
            )
        if value is None or value != value or not str(value).strip():
            raise DistillError(
                f"row {number} of {path} has an empty {what} (column {name!r}); fill it in, or remove the row"
            )
    return [str(row[name]) for _, row in kept]


def _is_writable(text: str) -> bool:
    """Return whether a text has only whole characters: JSON can hold half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def find_column(path: str | Path, columns: list[str], what: str, given: str | None, usual: tuple[str, ...]) -> str:
    """Return the name of the column of texts or labels: the given one, else a usual one."""
    for name in usual if given is None else (given,):
        if name in columns:
            return name
    named = repr(given) if given is not None else " or ".join(map(repr, usual))
    mark = next((mark for mark in (";", "\t", "|") if len(columns) == 1 and mark in columns[0]), None)
    if mark is not None:
        raise DistillError(
            f"{path} has one column, {columns[0]!r}: it seems to be separated by {mark!r}; save it with commas, or "
            "with tabs as .tsv"
        )
    raise DistillError(
        f"{path} has no {what} column {named}: its columns are {', '.join(map(repr, columns))}; "
        f"name one with {what}=..., or --{what} on the command line"
    )


def _unify_numbers(names: list[str]) -> list[str]:
    """Return whole numbers in one spelling, so that "01", "1" and "1.0" are one class; other labels unchanged."""
    numbers = whole_numbers(names)
    return names if numbers is None else list(map(str, numbers))


def classes_of(names: Sequence[str], path: str | Path) -> tuple[str, ...]:
    """Return the classes of the labels of a file or data set, in sorted order.

    Raises:
        DistillError: one class, or so many that they are none.
    """
    found = ranked(names)
    if len(found) == 1:
        raise DistillError(
            f"all {len(names)} rows of {path} have the label {names[0]!r}; a classifier needs at least two classes"
        )
    if len(found) > max(2, len(names) // 2):
        raise DistillError(
            f"{path} has {len(found)} different labels in {len(names)} rows, e.g. {names[0]!r}; {NAME_THEM}"
        )
    return found
