"""Renumbering the labels of data as a model numbers its classes."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from distill.data.classes import Ranked, Stated, are_names, check_stated, matched, placeholders
from distill.data.rows import Rows
from distill.data.task import Task
from distill.errors import DistillError, checked
from distill.models.class_names import class_names
from distill.models.inputs import device_of, evaluating, inputs_of, network_of, teachers, to_device
from interventions import InterventionError, printable, run

Data = TypeVar("Data", Rows, Task)


@checked
def numbered_as(data: Data, *models: Any, names: Sequence[str] | None = None) -> Data:
    """Return rows or a task with the labels numbered as the classes of the first model that names its classes.

    Labels are matched by name with `config.id2label` (see `distill.data.classes.matched`). If no model names its
    classes (LABEL_0, …), numbers stay, those in a file are indices, and names get numbers in sorted order, with a
    warning.

    Args:
        data: rows or a task; without names of classes it is returned as it is.
        models: the models that are trained or measured on it; None is left out.
        names: the names of other rows that were numbered for the model, used if the model has none.

    Raises:
        DistillError: a label that matches no class of the model, or several.
    """
    if not data.classes:
        return data
    rows = data.train if isinstance(data, Task) else data
    numbers, order = _find_numbers(data.classes, rows, [model for model in models if model is not None], names)
    return renumbered(data, numbers, order)


def renumbered(data: Data, numbers: Sequence[int], names: Sequence[str]) -> Data:
    """Return rows or a task with label i replaced by `numbers[i]`, and with these names of classes."""
    order = names if isinstance(names, tuple) else tuple(names)
    if type(order) is type(data.classes) and order == data.classes and list(numbers) == list(range(len(numbers))):
        return data
    if isinstance(data, Task):
        tests = {name: rows.renumbered(numbers, order) for name, rows in data.tests.items()}
        train, test = (rows.renumbered(numbers, order) for rows in (data.train, data.test))
        return replace(data, train=train, test=test, tests=tests, classes=order)
    return data.renumbered(numbers, order)


def _find_numbers(
    classes: tuple[str, ...], rows: Rows, models: Sequence[Any], names: Sequence[str] | None
) -> tuple[Sequence[int], tuple[str, ...]]:
    """Return the number of each class in the order of a model, and the names of all classes in that order."""
    found = [each for model in models if (each := class_names(model)) is not None]
    known: Sequence[str] | None = next((each for each in found if are_names(each)), names)
    same = range(len(classes))
    if isinstance(classes, Stated):
        if known or found:
            check_stated(classes, known or found[0])
        return same, classes
    if known is not None:
        return matched(classes, known), tuple(known)
    if found and set(classes) <= set(found[0]):  # as a pipeline writes them: LABEL_0
        return matched(classes, found[0]), found[0]
    if not isinstance(classes, Ranked):
        return same, classes
    count = len(found[0]) if found else _count_outputs(models[0], rows) if models else None
    return (same, classes) if count is None else _assume_order(classes, count)


def _assume_order(classes: tuple[str, ...], count: int) -> tuple[Sequence[int], tuple[str, ...]]:
    """Return numbers of labels for a model without names: their own, else, with a warning, those of sorted order."""
    if count == 1:
        raise DistillError(
            f"the model has one output, a real number, and the labels {', '.join(classes[:5])} are read as classes; "
            "give rows whose labels are numbers: data={'input_ids': …, 'attention_mask': …, 'labels': [0.5, …]}."
        )
    numbers = placeholders(classes)
    if numbers is not None and all(0 <= number < count for number in numbers):
        return numbers, tuple(map(str, range(count)))
    if len(classes) != count:
        raise DistillError(
            f"the labels of the data are {', '.join(classes)} and the model does not name its {count} classes, "
            "so their order is not known; name them: model.config.id2label = {0: …}, or name the labels "
            "in the order of the model's outputs: distill.tasks.load(…, classes=[…]), or --classes a,b."
        )
    numbered = printable(", ".join(f"{number} is {name}" for number, name in enumerate(classes)))
    warnings.warn(
        "the model does not name its classes, so the labels are taken in sorted order: "
        f"{numbered}; if it was trained in another, state it: distill.tasks.load(…, classes=[…]), or --classes a,b.",
        stacklevel=4,
    )
    return range(count), tuple(classes)


def _count_outputs(model: Any, rows: Rows) -> int | None:
    """Return the number of classes of a network without a configuration, by one forward; None for other networks."""
    network = network_of(model)
    if hasattr(network, "save_pretrained") or any(p.is_meta for p in network.parameters()):
        return None
    batch = to_device(teachers(rows.batch(range(min(2, len(rows))))), device_of(network))
    try:
        with evaluating(network), torch.no_grad():
            logits = run(network, inputs_of(network, batch), resumable=False).logits
    except (DistillError, InterventionError):
        return None
    return logits.shape[-1] if logits.ndim == 2 else None
