"""Labels that are missing: None, NaN, or a text without a character.

Rows of which none has a label are rows without labels. Where some lack a class, it becomes −100, which losses and
measurements leave out. A real value has no number that could say so, and a missing one is refused.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data.sources.lazy_columns import LazyColumn, is_floating, sampled
from distill.errors import DistillError
from interventions import shown

IGNORED = -100
LABELS = "labels"
WRITTEN = frozenset({"nan", "na", "n/a", "null", "none", "<na>"})
"""Words that programs write for a missing number, in small letters."""


def _row_of_data(number: int) -> str:
    return f"row {number} of the data"


def with_known_labels(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return columns whose missing labels are −100; without labels where all are missing. A warning says so.

    Raises:
        DistillError: a real value is missing.
    """
    found = dict(columns)
    labels = found.get(LABELS)
    if labels is None:
        return found
    if isinstance(labels, LazyColumn):
        _refuse_missing_in_sample(labels)
        return found
    if are_all_missing(labels):
        del found[LABELS]
        warn_of_no_labels(len(labels))
    elif missing := missing_rows(labels):
        found[LABELS] = filled(labels)
        warn_of_missing(len(missing), len(labels), _row_of_data(missing[0]))
    return found


def warn_of_no_labels(rows: int, of: str = "the data") -> None:
    """Warn that data has a column of labels, all of which are missing."""
    warnings.warn(f"all {rows} labels of {of} are missing, so its rows are used without labels.", stacklevel=5)


def warn_of_missing(count: int, rows: int, first: str) -> None:
    """Warn of labels that are missing; `first` names the first row that lacks one."""
    warnings.warn(
        f"{count} of {rows} rows lack a label (first: {first}); losses over labels and measurements leave out what is "
        "missing, and what compares with a teacher uses all rows.",
        stacklevel=5,
    )


def is_missing(label: Any) -> bool:
    """Return whether one label is missing: None, NaN or NA of pandas, or a text of spaces.

    >>> [is_missing(each) for each in (None, float("nan"), " ", "none", 0)]
    [True, True, True, False, False]
    """
    if label is None or isinstance(label, str):
        return label is None or not label.strip()
    if isinstance(label, Tensor | np.ndarray):
        return label.ndim == 0 and is_missing(label.item())
    if isinstance(label, float | np.floating):
        return isnan(label)
    return type(label).__name__ in ("NAType", "NaTType")


def missing_rows(labels: Any) -> list[int]:
    """Return the numbers of the rows that lack a label, or one of several."""
    if isinstance(labels, Tensor | np.ndarray) and not _holds_objects(labels):
        values = torch.as_tensor(labels)
        if not values.is_floating_point():
            return []
        return values.isnan().reshape(len(values), -1).any(1).nonzero()[:, 0].tolist()
    blank = _blank_of(labels)
    return [row for row, each in enumerate(labels) if any(map(blank, _parts(each)))]


def are_all_missing(labels: Any) -> bool:
    """Return whether no row of a column has a label."""
    if not len(labels) or isinstance(labels, LazyColumn):
        return False
    if isinstance(labels, Tensor | np.ndarray) and not _holds_objects(labels):
        values = torch.as_tensor(labels)
        return values.is_floating_point() and bool(values.isnan().all())
    return all(is_missing(each) or (_is_list(each) and len(each) > 0 and all(map(is_missing, _parts(each))))
               for each in labels)  # fmt: skip


def filled(labels: Any, row: Callable[[int], str] = _row_of_data, *, are_values: bool = False) -> Any:
    """Return labels with −100 for each that is missing, and None for texts, which get their numbers later.

    Args:
        labels: a column, or the labels of some rows.
        row: the name of a row in errors, by its place.
        are_values: whether the column that they are from has real values.

    Raises:
        DistillError: a real value is missing, or the labels of a row of which the others have different numbers of
            them.
    """
    missing = missing_rows(labels)
    if not missing:
        return labels
    rows = list(labels)
    blank = _blank_of(rows)
    known = [each for label in rows for each in _parts(label) if not blank(each)]
    several = [label for label in rows if _is_list(label)]
    if are_values or not _are_classes(known, several):
        real = next((each for each in known if not isinstance(each, str) and not float(each).is_integer()), None)
        other = "" if real is None else f" and others are real values, as {shown(_plain(real))}, of which"
        raise DistillError(
            f"{row(missing[0])} has no label{other or ', and'} no number says that it is missing; leave the row out "
            "(frame.dropna(subset='label'), dataset.filter(lambda row: row['label'] is not None)), or all labels, "
            "which KD() does not need."
        )
    if not several:
        if known and all(isinstance(each, str) for each in known):
            return [None if blank(each) else each for each in rows]
        return [IGNORED if blank(each) else _whole(each) for each in rows]
    return _filled_lists(rows, several, row)


def _filled_lists(rows: list[Any], several: list[Any], row: Callable[[int], str]) -> list[Any]:
    """Return rows of several labels with −100 for each that is missing."""
    widths = {len(each) for each in several}
    found = []
    for number, label in enumerate(rows):
        if not _is_list(label) and len(widths) > 1:
            raise DistillError(
                f"{row(number)} has no labels, and rows of other lengths have one for each token; leave the row out, "
                "or give it a list of −100, one a token."
            )
        values = _parts(label) if _is_list(label) else [None] * next(iter(widths))
        kept = [IGNORED if is_missing(each) else _plain(each) for each in values]
        found.append(torch.tensor(kept, dtype=torch.float32 if any(map(_is_real, _parts(several[0]))) else torch.int64))
    return found


def _are_classes(known: Sequence[Any], several: Sequence[Any]) -> bool:
    """Return whether labels are classes, or a yes or no for each: all texts, or whole numbers."""
    if all(isinstance(each, str) for each in known):
        return not several
    numbers = [_plain(each) for each in known]
    if not all(isinstance(each, int | float) and float(each).is_integer() for each in numbers):
        return False
    if several and any(isinstance(each, float) for each in numbers):
        return all(each in (0, 1, IGNORED) for each in numbers)
    return all(each >= 0 or each == IGNORED for each in numbers)


def _blank_of(labels: Any) -> Callable[[Any], bool]:
    """Return the function that says whether a label is missing: of texts that are numbers, also "nan" and the like."""
    texts = {each for each in labels if isinstance(each, str)}
    words = {each for each in texts if each.strip().lower() in WRITTEN}
    if not words or not all(_is_number(each) for each in texts - words if each.strip()) or words == texts:
        return is_missing
    return lambda label: is_missing(label) or (isinstance(label, str) and label in words)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _refuse_missing_in_sample(labels: LazyColumn) -> None:
    """Raise DistillError where one of the rows by which a column on disk is checked lacks a real value."""
    if not len(labels) or not is_floating(labels):
        return
    numbers = sampled(len(labels))
    rows = [torch.as_tensor(each) for each in labels.read(numbers)]
    odd = next((n for n, each in zip(numbers.tolist(), rows, strict=True) if bool(each.isnan().any())), None)
    if odd is not None:
        raise DistillError(
            f"{_row_of_data(odd)} has no label (NaN); leave the row out, or give −100 in place of a missing class, as "
            "a whole number."
        )


def _holds_objects(labels: Any) -> bool:
    return isinstance(labels, np.ndarray) and labels.dtype.kind not in "biuf"


def _is_list(label: Any) -> bool:
    return isinstance(label, list | tuple) or (isinstance(label, Tensor | np.ndarray) and label.ndim > 0)


def _parts(label: Any) -> list[Any]:
    """Return the labels of a row as a list."""
    if isinstance(label, Tensor | np.ndarray):
        return label.reshape(-1).tolist()
    return list(label) if isinstance(label, list | tuple) else [label]


def _plain(label: Any) -> Any:
    """Return one label as a number of Python, or a text."""
    return label.item() if isinstance(label, Tensor | np.ndarray | np.generic) else label


def _is_real(label: Any) -> bool:
    return isinstance(_plain(label), float)


def _whole(label: Any) -> int:
    return int(_plain(label))
