"""The verbs of `interventions`, of a served teacher too."""

from collections.abc import Sequence
from typing import Any

import interventions
from distill.errors import DistillError
from distill.teachers.served import Masks, Places, Served, ServedRun
from interventions import Location, Run


def refuse_elsewhere(run: Run, asked: str, way_out: str) -> None:
    """Refuse a run of a teacher that is elsewhere, for what runs it in ways of its own."""
    teacher = answering(run)
    if isinstance(teacher, Served) and teacher.remote:
        raise DistillError(
            f"{asked} runs the teacher on inputs of its own, and {teacher} is asked for answers and activations; "
            f"{way_out}, or give the model itself as teacher."
        )


def answering(run: Run) -> Any:
    """Who makes other runs of the model of a run: the served teacher, or that model."""
    return run.teacher if isinstance(run, ServedRun) else run.model


def run_of(model: Any, inputs: Any, at: Sequence[Location] = (), *, resumable: bool = True) -> Run:
    """`interventions.run`, of a served teacher too."""
    if isinstance(model, Served):
        return model.run(inputs, at)
    return interventions.run(model, inputs, at, resumable=resumable)


def run_to(model: Any, inputs: Any, at: Sequence[Location]) -> Run:
    """`interventions.run_to`, of a served teacher too."""
    return model.run_to(inputs, at) if isinstance(model, Served) else interventions.run_to(model, inputs, at)


def shape_of(run: Run, at: Location) -> tuple[int, ...]:
    """The shape of the vectors at a place, which a served teacher need not send for that."""
    if isinstance(run, ServedRun) and run.teacher is not None:
        return run.teacher.shape(at, run)
    return tuple(run.vectors(at).shape)


def grid_of(run: Run, at: Location) -> tuple[int, ...]:
    """`(batch, positions)` of a place, `(batch,)` where it has no positions."""
    shape = shape_of(run, at)
    return shape[:2] if len(shape) > 2 else shape[:1]


def unit_of(run: Run, at: Location) -> tuple[int, ...]:
    """What one position of a place holds: `(dims,)`, or `(heads, dims)` at the sites with heads."""
    return shape_of(run, at)[len(grid_of(run, at)) :]


def interchanged(
    base: Run, source: Run | None, at: Places, positions: Masks = (None, None), record: Sequence[Location] = ()
) -> Run:
    """`interventions.interchange` of two runs of one model, of a served teacher too."""
    teacher = answering(base)
    if isinstance(teacher, Served):
        return teacher.interchange(base, source, at, positions, record)
    written, read = positions
    return interventions.interchange(
        base.model, base, source, at, positions=written, source_positions=read, record=record
    )
