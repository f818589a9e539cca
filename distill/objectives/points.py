"""A network as a function of one floating tensor: its input, or for tokens what its first block is given."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.errors import DistillError
from distill.models.inputs import in_dtype_of, inputs_of, students, teachers
from distill.objectives.objective import Step
from distill.teachers.verbs import refuse_elsewhere
from interventions import Location, interchange, run, run_to

Places = Location | tuple[Location, Location]
"""A location of both models, or one of the teacher and one of the student."""


@dataclass(frozen=True, eq=False)
class Function:
    """From points `[batch, ...]` to the logits that the network gives in place of those that it computes itself.

    Args:
        inputs: what the network is called with.
        at: the column of them that the points replace, or the location whose activation they replace.
        token: of a model that answers at every token, the position `[batch]` whose answer is meant.
    """

    model: nn.Module
    inputs: Any
    at: str | int | Location
    token: Int[Tensor, " batch"] | None = None

    @property
    def points(self) -> Float[Tensor, "batch ..."]:
        """The point of each example: what is there without a write, cut off from the graph."""
        if not isinstance(self.at, Location):
            return self.inputs[self.at].detach()
        with torch.no_grad():
            return run_to(self.model, self.inputs, [self.at]).vectors(self.at)

    def take(self, rows: Int[Tensor, " chosen"]) -> "Function":
        """The same function for some of the examples."""
        token = None if self.token is None else self.token[rows]
        if isinstance(self.inputs, Mapping):
            return replace(self, inputs={name: column[rows] for name, column in self.inputs.items()}, token=token)
        return replace(self, inputs=tuple(column[rows] for column in self.inputs), token=token)

    def __call__(self, points: Float[Tensor, "batch ..."]) -> Tensor:
        logits = self._logits(points)
        return logits if self.token is None else logits[torch.arange(len(logits), device=logits.device), self.token]

    def _logits(self, points: Float[Tensor, "batch ..."]) -> Tensor:
        def given(base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
            return points.to(base.dtype, copy=True)  # the model may go on in place

        with _differentiable(self.model):
            if isinstance(self.at, Location):
                return interchange(self.model, self.inputs, None, {self.at: given}).logits
            inputs = {**self.inputs, self.at: points} if isinstance(self.inputs, Mapping) else (points,)
            return run(self.model, in_dtype_of(self.model, inputs), resumable=False).logits


def functions(step: Step, at: Places | None, asked: str) -> tuple[Function, Function]:
    """Teacher and student as functions of the same points, which are the teacher's.

    Args:
        at: where the points are; None is the floating column of the data, for tokens the embedding.
        asked: who asks, for errors.
    """
    refuse_elsewhere(step.taught, asked, "leave it out")
    where = of_both(at) if at is not None else (None, None)
    sides = ((step.taught.model, teachers(step.batch)), (step.network, students(step.batch)))
    teacher, student = (_function(*side, place, asked) for side, place in zip(sides, where, strict=True))
    return teacher, student


def check_points(teacher: Function, student: Function, asked: str) -> None:
    """Raise where the points of the two are of different shapes."""
    theirs, ours = (tuple(each.points.shape) for each in (teacher, student))
    if theirs != ours:
        raise DistillError(
            f"{asked} takes student and teacher as functions of the same points, but those of the teacher are "
            f"{theirs} and those of the student {ours}, [batch, ...]; give the student an embedding of that width (as "
            f"distill.from_layers does), or say where both have one: {asked.removesuffix('()')}(at=Location(…))."
        )


def of_both(at: Places) -> tuple[Location, Location]:
    """The location of the teacher and that of the student."""
    return (at, at) if isinstance(at, Location) else at


def _function(model: nn.Module, batch: Mapping[str, Tensor], at: Location | None, asked: str) -> Function:
    inputs = inputs_of(model, batch)
    if at is not None:
        return Function(model, inputs, at)
    columns: Mapping[Any, Tensor] = inputs if isinstance(inputs, Mapping) else dict(enumerate(inputs))
    floating = [name for name, x in columns.items() if x.is_floating_point() and "mask" not in str(name)]
    if not floating or "input_ids" in columns:
        return Function(model, inputs, Location(site="embedding"))
    if len(floating) > 1:
        raise DistillError(
            f"{asked} differentiates by one input, and {type(model).__name__} is called with {' and '.join(floating)}; "
            f"say where: {asked.removesuffix('()')}(at=Location(module='…', io='input'))."
        )
    return Function(model, inputs, floating[0])


def _differentiable(model: nn.Module) -> AbstractContextManager[object]:
    """Without cuDNN for recurrent modules: its have no second derivative, and in eval mode none at all."""
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return torch.backends.cudnn.flags(enabled=False)
    return nullcontext()
