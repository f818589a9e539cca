"""A network as a function of one floating tensor: its input, or for tokens the input of its first block."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.errors import DistillError
from distill.models.inputs import in_dtype_of, inputs_of, students, teachers
from distill.objectives.step import Step
from distill.teachers.verbs import refuse_elsewhere
from interventions import Location, Run, interchange, run, run_to

Places = Location | tuple[Location, Location]
"""One location for both models, or a pair: that of the teacher, that of the student."""


@dataclass(frozen=True, eq=False)
class Function:
    """A network as a function from points `[batch, ...]` to logits.

    Attributes:
        model: the network.
        inputs: the inputs that the network is called with.
        at: the column of the inputs that the points replace, or the location whose activation they replace.
        token: for a model that answers at every token, the position `[batch]` whose logits are returned.
    """

    model: nn.Module
    inputs: Any
    at: str | int | Location
    token: Int[Tensor, " batch"] | None = None

    @property
    def points(self) -> Float[Tensor, "batch ..."]:
        """The point of each example: the value that the network itself has there, without a graph."""
        if not isinstance(self.at, Location):
            return self.inputs[self.at].detach()
        with torch.no_grad():
            return run_to(self.model, self.inputs, [self.at]).vectors(self.at)

    def reads_what(self, other: "Function") -> bool:
        """Return whether the points of another network are the same column of its inputs."""
        if isinstance(self.at, Location) or isinstance(other.at, Location):
            return False
        return bool(self.inputs[self.at] is other.inputs[other.at])

    def take(self, rows: Int[Tensor, " chosen"]) -> "Function":
        """Return the same function for some of the examples."""
        token = None if self.token is None else self.token[rows]
        if isinstance(self.inputs, Mapping):
            return replace(self, inputs={name: column[rows] for name, column in self.inputs.items()}, token=token)
        return replace(self, inputs=tuple(column[rows] for column in self.inputs), token=token)

    def derivable_run(
        self, record: Sequence[Location] = (), *, resumable: bool = False
    ) -> tuple[Run, Float[Tensor, "batch ..."]]:
        """Return the run of the network on its inputs, with a graph down to a copy of the points, and this copy."""
        if not isinstance(self.at, Location):
            columns: Any = self.inputs
            points = columns[self.at].detach().clone().requires_grad_()
            inputs = {**columns, self.at: points} if isinstance(columns, Mapping) else (points,)
            return run(self.model, inputs, record, resumable=resumable), points
        copies: list[Tensor] = []

        def copy(base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
            copies.append(base.detach().clone().requires_grad_())
            return copies[-1].clone()  # the model may continue in place

        done = interchange(self.model, self.inputs, None, {self.at: copy}, record=record)
        return replace(done, is_counterfactual=False), copies[-1]

    def __call__(self, points: Float[Tensor, "batch ..."]) -> Tensor:
        return self.answers(self._logits(points))

    def answers(self, logits: Tensor) -> Tensor:
        """Return the logits of the token, where one is chosen of each example."""
        return logits if self.token is None else logits[torch.arange(len(logits), device=logits.device), self.token]

    def _logits(self, points: Float[Tensor, "batch ..."]) -> Tensor:
        """Return the logits for the points, at all tokens."""

        def write_points(base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
            return points.to(base.dtype, copy=True)  # the model may continue in place

        with _differentiable(self.model):
            if isinstance(self.at, Location):
                return interchange(self.model, self.inputs, None, {self.at: write_points}).logits
            inputs = {**self.inputs, self.at: points} if isinstance(self.inputs, Mapping) else (points,)
            return run(self.model, in_dtype_of(self.model, inputs), resumable=False).logits


def functions(step: Step, at: Places | None, caller: str) -> tuple[Function, Function]:
    """Return teacher and student as functions of points.

    Args:
        step: holds both models and the batch.
        at: where the points are; None is the floating column of the data, for tokens the embedding.
        caller: names the objective in errors.
    """
    refuse_elsewhere(step.taught, caller, "leave it out")
    return functions_of(step.taught.model, step.network, step.batch, at, caller)


def functions_of(
    teacher: nn.Module, student: nn.Module, batch: Mapping[str, Tensor], at: Places | None, caller: str
) -> tuple[Function, Function]:
    """Return teacher and student as functions of points, as `functions` does, without a step."""
    above, below = of_both(at) if at is not None else (None, None)
    taught = _function(teacher, teachers(batch), above, caller)
    return taught, _function(student, students(batch), below, caller)


def check_points(teacher: Function, student: Function, caller: str) -> None:
    """Raise DistillError if the points of teacher and student are of different shapes."""
    teacher_shape, student_shape = (tuple(each.points.shape) for each in (teacher, student))
    if teacher_shape != student_shape:
        raise DistillError(
            f"{caller} takes student and teacher as functions of the same points, but those of the teacher are "
            f"{teacher_shape} and those of the student {student_shape}, [batch, ...]; give the student an embedding of "
            f"that width (as distill.from_layers does), or say where both have one: {caller.removesuffix('()')}"
            "(at=Location(…))."
        )


def of_both(at: Places) -> tuple[Location, Location]:
    """Return the location of the teacher and that of the student."""
    return (at, at) if isinstance(at, Location) else at


def _function(model: nn.Module, batch: Mapping[str, Tensor], at: Location | None, caller: str) -> Function:
    """Return a model as a function of the points at a location; by default of its floating input or its embedding."""
    inputs = inputs_of(model, batch)
    if at is not None:
        return Function(model, inputs, at)
    columns: Mapping[Any, Tensor] = inputs if isinstance(inputs, Mapping) else dict(enumerate(inputs))
    floating = [name for name, x in columns.items() if x.is_floating_point() and "mask" not in str(name)]
    if not floating or "input_ids" in columns:
        return Function(model, inputs, Location(site="embedding"))
    if len(floating) > 1:
        raise DistillError(
            f"{caller} differentiates by one input, and {type(model).__name__} is called with "
            f"{' and '.join(floating)}; say where: {caller.removesuffix('()')}(at=Location(module='…', io='input'))."
        )
    return Function(model, inputs, floating[0])


def _differentiable(model: nn.Module) -> AbstractContextManager[object]:
    """Turn cuDNN off for recurrent modules: its kernels have no second derivative, and in eval mode none at all."""
    return torch.backends.cudnn.flags(enabled=False) if is_recurrent(model) else nullcontext()


def is_recurrent(model: nn.Module) -> bool:
    """Return whether a model has recurrent modules of torch."""
    return any(isinstance(module, nn.RNNBase) for module in model.modules())
