"""Pairs of layers that are compared, and the regressors from the student's features to the teacher's."""

from collections.abc import Mapping

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from distill.errors import DistillError
from distill.objectives.objective import linear
from distill.objectives.step import Step
from interventions import Location, Run

Layers = Mapping[Location, Location]
"""The layers that are compared: {teacher location: student location}."""


def match_features(
    student_run: Run, below: Location, teacher_run: Run, above: Location, caller: str
) -> tuple[Tensor, Tensor]:
    """Return the features of student and teacher, `[batch, width]` or `[batch, position, width]`, at equal positions.

    Of feature maps of different sizes the larger is averaged down to the smaller.

    Raises:
        DistillError: features that are not feature maps, and of different positions.
    """
    maps = student_run.activations[below], teacher_run.activations[above]
    if all(each.ndim == 4 for each in maps) and below.module is not None:
        height, width = (min(each.shape[axis] for each in maps) for axis in (2, 3))
        pooled = (functional.adaptive_avg_pool2d(each, (height, width)) for each in maps)
        student, teacher = (rearrange(each, "b c h w -> b (h w) c") for each in pooled)
        return student, teacher
    student, teacher = student_run.vectors(below), teacher_run.vectors(above)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise DistillError(
            f"{caller} compares {below} of the student, {list(student.shape)}, with {above} of the teacher, "
            f"{list(teacher.shape)}, position by position; choose places of the same positions."
        )
    return student, teacher


def regressors_for(
    step: Step, layers: Layers, caller: str, given: Mapping[Location, nn.Module] | None = None
) -> nn.ModuleDict:
    """Return for each teacher location a map from the student's width to the teacher's: a given or a linear one.

    Where the widths are equal and none is given it is the identity.
    """
    made = {}
    for above, below in layers.items():
        student, teacher = match_features(step.student, below, step.taught, above, caller)
        widths = student.shape[-1], teacher.shape[-1]
        new = nn.Identity() if widths[0] == widths[1] else linear(*widths, like=student)
        made[key_of(above)] = (given or {}).get(above, new)
    return nn.ModuleDict(made)


def regress(regressors: nn.ModuleDict, at: Location, student: Tensor) -> Tensor:
    """Return the student's features behind the regressor of a teacher location, in the precision of the regressor.

    Raises:
        DistillError: the regressors were not made yet.
    """
    if key_of(at) not in regressors:
        raise DistillError(
            f"the regressor to {at} was not made yet; call objective.prepare(step, rows) first, as distill.fit does."
        )
    module = regressors[key_of(at)]
    parameter = next(module.parameters(), None)
    return module(student if parameter is None else student.to(parameter.dtype))


def refuse_no_layers(layers: Layers | None, caller: str) -> None:
    """Raise DistillError if the layers to compare are given and empty."""
    if layers is not None and not layers:
        raise DistillError(f"{caller}(layers={{}}) compares nothing; give {caller}({{Location(1): Location(0)}}).")


def format_layers(layers: Layers) -> str:
    """Return the layers as text for printing."""
    return "{" + ", ".join(f"{str(above)!r}: {str(below)!r}" for above, below in layers.items()) + "}"


def key_of(at: Location) -> str:
    """Return the name under which the regressor of a teacher location is kept."""
    return str(at).replace(".", "_")
