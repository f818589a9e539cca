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
    """Rows or a task whose labels are the numbers of the classes of a model: of the first that names its classes.

    Labels are matched by name with `config.id2label` (see `distill.data.classes.matched`). Where no model names its
    classes (LABEL_0, …), numbers stay what they are, those in a file are indices, and names are taken in sorted order,
    with a warning.

    Args:
        data: what knows no names of its classes is returned as it is.
        models: that are trained or measured on it; None is left out.
        names: those of other rows that were numbered for the model, used where the model has none.

    Raises:
        DistillError: labels that are no classes of the model, or may be several.
    """
    if not data.classes:
        return data
    rows = data.train if isinstance(data, Task) else data
    numbers, told = _numbers(data.classes, rows, [model for model in models if model is not None], names)
    return renumbered(data, numbers, told)


def renumbered(data: Data, numbers: Sequence[int], names: Sequence[str]) -> Data:
    """Rows or a task with class i called number `numbers[i]`, one of the classes `names`."""
    told = names if isinstance(names, tuple) else tuple(names)
    if type(told) is type(data.classes) and told == data.classes and list(numbers) == list(range(len(numbers))):
        return data
    if isinstance(data, Task):
        tests = {name: rows.renumbered(numbers, told) for name, rows in data.tests.items()}
        train, test = (rows.renumbered(numbers, told) for rows in (data.train, data.test))
        return replace(data, train=train, test=test, tests=tests, classes=told)
    return data.renumbered(numbers, told)


def _numbers(
    classes: tuple[str, ...], rows: Rows, models: Sequence[Any], names: Sequence[str] | None
) -> tuple[Sequence[int], tuple[str, ...]]:
    """The number of each class in the order of a model, and the names of all classes in that order."""
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
    count = len(found[0]) if found else _outputs(models[0], rows) if models else None
    return (same, classes) if count is None else _assumed(classes, count)


def _assumed(classes: tuple[str, ...], count: int) -> tuple[Sequence[int], tuple[str, ...]]:
    """The numbers of labels for a model that has no names: their own, else, with a warning, those of sorted order."""
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
            f"the labels of the data are {', '.join(classes)} and the model does not say what its {count} classes are "
            "called, so it is not known which is which; name them: model.config.id2label = {0: …}, or name the labels "
            "in the order of the model's outputs: distill.tasks.load(…, classes=[…]), or --classes a,b."
        )
    told = printable(", ".join(f"{number} is {name}" for number, name in enumerate(classes)))
    warnings.warn(
        "the model does not say what its classes are called, so the labels are taken in sorted order: "
        f"{told}; if it was trained in another, say so: distill.tasks.load(…, classes=[…]), or --classes a,b.",
        stacklevel=4,
    )
    return range(count), tuple(classes)


def _outputs(model: Any, rows: Rows) -> int | None:
    """How many classes a network without a configuration has, from one forward; None where it is no classifier."""
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
