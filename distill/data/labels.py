"""Labels of a data set: text or numbers, and the names that the data set gives to its numbers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset

from distill.data.classes import matched
from distill.data.missing import IGNORED
from distill.data.sources.lazy_columns import LazyColumn, some_rows
from distill.errors import DistillError


def named_by(data: Any) -> tuple[str, ...] | None:
    """Return the names of the classes of a data set, in the order of its numbers; None if it has none.

    They are those of a Hugging Face `ClassLabel`, or of `class_to_idx` as in torchvision, also through a Subset, a
    ConcatDataset or a DataLoader.

    Raises:
        DistillError: the parts of a ConcatDataset number their classes differently.
    """
    if isinstance(data, DataLoader | Subset):
        return named_by(data.dataset)
    if isinstance(data, ConcatDataset):
        return _names_of_parts(data.datasets)
    features: Any = getattr(data, "features", None)
    if isinstance(features, Mapping):
        feature: Any = features.get("labels", features.get("label"))
        while not hasattr(feature, "names") and hasattr(
            feature, "feature"
        ):  # the type of a sequence of labels, one a token
            feature = feature.feature
        names = getattr(feature, "names", None)
        return None if not names else tuple(map(str, names))
    return _names_by_number(data)


def _names_of_parts(parts: Iterable[Any]) -> tuple[str, ...] | None:
    found = [named_by(part) for part in parts]
    if len(set(found)) > 1:
        one, other = list(dict.fromkeys(found))[:2]
        raise DistillError(
            f"the parts of a ConcatDataset number their classes as {_listed(one)} and as {_listed(other)}; give them "
            "one order first: data.cast_column('label', datasets.ClassLabel(names=[…])), or rename_column and map."
        )
    return found[0] if found else None


def _names_by_number(data: Any) -> tuple[str, ...] | None:
    """Return the names by `class_to_idx`, several of one number joined; None if a transform may renumber the labels."""
    numbers = getattr(data, "class_to_idx", None)
    if not isinstance(numbers, Mapping) or not numbers or getattr(data, "target_transform", None) is not None:
        return None
    names: dict[Any, list[str]] = {}
    for name, number in numbers.items():
        names.setdefault(number, []).append(str(name))
    if sorted(names, key=str) != sorted(range(len(names)), key=str):
        return None
    return tuple(", ".join(names[number]) for number in range(len(names)))


def are_text(column: Any) -> bool:
    """Return whether labels are text, one or several a row.

    Raises:
        DistillError: some are text and some are not.
    """
    if isinstance(column, Tensor | LazyColumn) or not len(column):
        return False
    odd = {isinstance(each, str): each for each in _flat(column) if each is not None}
    if len(odd) == 2 or any(isinstance(each, bytes) for each in odd.values()):
        shown = " and ".join(repr(each) for each in odd.values())
        raise DistillError(
            f"the labels are neither all text nor all numbers: {shown}; make them one kind, labels = [str(each) for "
            "each in labels] (of bytes each.decode()), and leave rows without a label out."
        )
    return True in odd


def texts_of(column: Any) -> set[str]:
    """Return the labels that are text, each once, without those that are missing."""
    return {each for each in _flat(column) if each is not None}


def check_shape(column: Any, ids: Any, names: Sequence[str]) -> None:
    """Raise DistillError unless labels with names are one a row or one a token.

    Several labels a row are read by a model of several labels as a 0 or 1 for each class.
    """
    if isinstance(column, Tensor) and column.ndim == 1:
        return
    column, ids = some_rows(column), None if ids is None else some_rows(ids)
    widths = [len(each) if _is_nested(each) else None for each in column]
    if all(width is None for width in widths):
        return
    tokens = None if ids is None else [len(each) for each in ids]
    if tokens != widths:
        row = next(i for i, width in enumerate(widths) if tokens is None or width != tokens[i])
        found = "" if tokens is None else f" and {tokens[row]} tokens"
        raise DistillError(
            f"row {row} of the data has {widths[row]} labels{found}, and labels with names ({_listed(names)}) are one "
            "a row or one a token; of several a row give a number for each class, in the order of the model's outputs: "
            "labels = "
            "[[float(name in row) for name in model.config.id2label.values()] for row in labels]."
        )


def numbered(column: Any, names: Sequence[str]) -> tuple[list[Any], dict[Any, int]]:
    """Return labels of text as the numbers of their names, and the number of each label."""
    texts = sorted(texts_of(column))
    number: dict[Any, int] = dict(zip(texts, matched(texts, names, "the names given"), strict=True))
    return [relabelled(each, number) for each in column], number


def relabelled(label: Any, numbers: Mapping[Any, int]) -> Any:
    """Return a label, or several, as numbers; negative ones, which losses ignore, stay, and a missing one is −100.

    Raises:
        DistillError: an unknown label.
    """
    if label is None or (isinstance(label, int) and label == IGNORED):
        return IGNORED
    if isinstance(label, str):
        if label not in numbers:
            raise DistillError(
                f"the label {label!r} was drawn, and at the first reading there were {_listed(list(numbers))}; name "
                "all classes: distill.Rows.of(data, classes=[…])."
            )
        return numbers[label]
    if isinstance(label, list | tuple | np.ndarray) and all(isinstance(each, str) for each in label):
        return [relabelled(each, numbers) for each in label]
    found = torch.as_tensor(label)
    last = max(map(int, numbers), default=0)
    lookup = torch.tensor([numbers.get(number, number) for number in range(last + 1)], device=found.device)
    return torch.where(found >= 0, lookup[found.long().clamp(0, last)], found)


def _flat(column: Any) -> Iterable[Any]:
    return (label for each in column for label in (each if _is_nested(each) else [each]))


def _is_nested(each: Any) -> bool:
    return isinstance(each, list | tuple) or (isinstance(each, Tensor | np.ndarray) and each.ndim > 0)


def _listed(names: Sequence[str] | None) -> str:
    return "no names" if names is None else ", ".join(map(str, names[:30]))
