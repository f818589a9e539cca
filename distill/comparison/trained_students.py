"""The students of a comparison, each with one or several runs, as the caller names them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from distill.data.seen_rows import SeenRows
from distill.errors import DistillError
from distill.interchange.kinds import Kind
from distill.models.inputs import uncompiled
from distill.results import FitResult
from distill.teachers.without_adapters import apart
from interventions import Model, shown

FORM = '{"KD": kd, "KD + DIITO": diito}'


@dataclass(frozen=True, eq=False)
class TrainedStudent:
    """One run of a student.

    Attributes:
        model: the network.
        result: what `fit` returned; None where only the network was given.
    """

    model: Any
    result: FitResult | None = None

    @property
    def seen(self) -> SeenRows | None:
        """The rows that it was trained on, where they are known."""
        return None if self.result is None else self.result.seen

    def was_trained_on(self, kind: Kind) -> bool | None:
        """Return whether it was trained on interchanges of a kind; None where that is not known."""
        trained = None if self.result is None else self.result.settings.get("kinds")
        return None if trained is None else repr(kind) in trained


def teacher_and_runs(teacher: Any, students: Any) -> tuple[Any, dict[str, tuple[TrainedStudent, ...]]]:
    """Return the teacher, and the runs of each student; of models with adapters on one base that base without them.

    Raises:
        DistillError: as `students_of`; models whose adapters cannot be distinguished.
    """
    runs = students_of(students)
    named = [(name, each) for name, of in runs.items() for each in of]
    names = ["the teacher", *(f"student {name!r}" for name, _ in named)]
    teacher, *models = apart([teacher, *(each.model for _, each in named)], names)
    found = iter(models)
    return teacher, {name: tuple(replace(each, model=next(found)) for each in of) for name, of in runs.items()}


def students_of(students: Any) -> dict[str, tuple[TrainedStudent, ...]]:
    """Return the runs of each student by its name.

    Args:
        students: {name: a network, what `fit` returned, or several of them, as trained with other seeds}.

    Raises:
        DistillError: fewer than two students, a name that is no text, or what is neither a network nor a result.
    """
    if not isinstance(students, Mapping) or not all(isinstance(name, str) and name.strip() for name in students):
        raise DistillError(f"compare(students={shown(students)}) has no names for its table; write students={FORM}.")
    if len(students) < 2:
        raise DistillError(
            f"compare(students={shown(list(students))}) has {len(students)} to compare; give at least two: "
            f"students={FORM}."
        )
    return {name: _runs(name, given) for name, given in students.items()}


def _runs(name: str, given: Any) -> tuple[TrainedStudent, ...]:
    """Return the runs of one student.

    Raises:
        DistillError: none, or what is neither a network nor a result.
    """
    several = isinstance(given, Sequence) and not isinstance(given, str | nn.Module)
    found = tuple(_run(name, each) for each in (given if several else [given]))
    if not found:
        raise DistillError(f"student {name!r} has no run; give a network, or several: {{{name!r}: [seed_0, seed_1]}}.")
    return found


def _run(name: str, given: Any) -> TrainedStudent:
    model = uncompiled(given.student if isinstance(given, FitResult) else given)
    if not isinstance(model, Model):
        raise DistillError(
            f"student {name!r} is neither a network nor what fit returned: {shown(given)}; write students={FORM}."
        )
    return TrainedStudent(model, given if isinstance(given, FitResult) else None)


def mappings_of(mapping: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return the mapping of each student: one for all, or {name of a student: its mapping}."""
    of_each = isinstance(mapping, Mapping) and bool(mapping) and set(mapping) <= set(names)
    if not of_each:
        return dict.fromkeys(names, mapping)
    missing = [name for name in names if name not in mapping]
    if missing:
        raise DistillError(
            f"mapping names {', '.join(map(repr, mapping))} and not student {missing[0]!r}; give one for each student, "
            "or one for all: mapping='full'."
        )
    return dict(mapping)
