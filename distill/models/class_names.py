"""The names that a classifier gives to its classes, in the order of its outputs."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from distill.data.classes import are_names, folded, listed
from distill.errors import DistillError
from distill.models.inputs import Combined, innermost


def class_names(model: Any) -> tuple[str, ...] | None:
    """Return the names of a classifier's classes, in the order of its outputs; None without a configuration of them.

    Raises:
        DistillError: a configuration that does not number them from 0, or numbers them in two ways.
    """
    inner = _network(model)
    config: Any = getattr(inner, "config", None)
    id2label = getattr(config, "id2label", None)
    if not isinstance(id2label, Mapping) or not id2label or not _is_classifier(inner):
        return None
    names = _in_order(id2label, type(inner).__name__)
    label2id = getattr(config, "label2id", None)
    if not isinstance(label2id, Mapping) or sorted(map(str, label2id.values())) != sorted(map(str, range(len(names)))):
        return names
    inverse = _in_order({number: name for name, number in label2id.items()}, type(inner).__name__)
    if are_names(names) and are_names(inverse) and inverse != names:
        raise DistillError(
            f"the configuration of {type(inner).__name__} numbers its classes in two ways: id2label {listed(names)} "
            f"and label2id {listed(inverse)}; correct one: model.config.label2id = {{name: i for i, name in "
            "model.config.id2label.items()}."
        )
    return names if are_names(names) else inverse


def real_names(model: Any) -> tuple[str, ...] | None:
    """Return `class_names` if they are more than numbers: None for LABEL_0, LABEL_1, …, and for bare numbers."""
    names = class_names(model)
    return names if names is not None and are_names(names) else None


def check_alike(one: Any, other: Any, whose: tuple[str, str] = ("the teacher", "the student")) -> None:
    """Raise DistillError if two classifiers have as many classes, and different names or orders of them.

    Args:
        one, other: the classifiers; those without names pass.
        whose: how an error names the two.
    """
    names, others = real_names(one), real_names(other)
    if names is None or others is None or len(names) != len(others):
        return
    if list(map(folded, names)) != list(map(folded, others)):
        kind = "order" if sorted(map(folded, names)) == sorted(map(folded, others)) else "names"
        raise DistillError(
            f"the classes of {whose[0]} are {listed(names)} and those of {whose[1]} {listed(others)}: other {kind}, "
            "and their answers are compared output by output; build one from the other, distill.from_layers(teacher, "
            "3), or, if the second is not trained yet, give it the same: student.config.id2label, "
            "student.config.label2id = teacher.config.id2label, teacher.config.label2id."
        )


def name_classes(model: Any, names: Sequence[str] | None) -> None:
    """Write the names of classes into the configuration of a transformers classifier, if it has no names yet."""
    inner, before = _network(model), class_names(model)
    if names is None or before is None or are_names(before) or not are_names(names) or len(before) != len(names):
        return
    config: Any = inner.config
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}


def _network(model: Any) -> nn.Module:
    """Return the model with the configuration: the innermost, not compiled; a model that combines others is itself."""
    if isinstance(model, Combined):
        return model  # type: ignore[return-value]
    inner: Any = innermost(model)
    return getattr(inner, "_orig_mod", inner)


def _is_classifier(inner: nn.Module) -> bool:
    """Return whether a model is a classifier: all transformers models have names of classes in their configuration."""
    kinds = [kind for kind in type(inner).__mro__ if kind.__module__.startswith("transformers.models.")]
    return not kinds or any("Classification" in kind.__name__ for kind in kinds)


def _in_order(id2label: Mapping[Any, Any], model: str) -> tuple[str, ...]:
    """Return the names in the order of their numbers, which files may keep as text."""
    try:
        named = {int(number): str(name) for number, name in id2label.items()}
    except (TypeError, ValueError):
        named = {}
    if sorted(named) != list(range(len(id2label))):
        raise DistillError(
            f"the configuration of {model} numbers its classes {', '.join(map(repr, id2label))}; number them from 0: "
            "model.config.id2label = dict(enumerate(names))."
        )
    return tuple(named[number] for number in range(len(named)))
