"""The verbs of `interventions` for teachers of either kind: a network, or a served teacher that is sent requests."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

import interventions
from distill.errors import DistillError
from distill.losses.chunked import LazyLogits
from distill.models.head import lazy_logits
from distill.teachers.served import Masks, Places, Served, ServedRun
from distill.teachers.top_k import Kept, dense
from interventions import Location, Run


def refuse_elsewhere(run: Run, caller: str, way_out: str) -> None:
    """Raise DistillError for a run of a teacher on another machine, where `caller` needs the network itself."""
    teacher = answering(run)
    if isinstance(teacher, Served) and teacher.remote:
        raise DistillError(
            f"{caller} runs the teacher on inputs of its own, and {teacher} gives only answers and activations; "
            f"{way_out}, or give the model itself as teacher."
        )


def answering(run: Run) -> Any:
    """Return what makes other runs of the model of a run: its served teacher, or the model itself."""
    return run.teacher if isinstance(run, ServedRun) else run.model


def largest_of(run: Run) -> Kept | None:
    """Return the largest logits of a teacher's run, without putting all together; None where it has all of them.

    Losses that take them as they are need no `[..., classes]` of the teacher, which `run.logits` makes when it is read.

    Returns:
        `values` and `indices` `[..., k]` of the k largest logits, the largest first; the `level` `[..., 1]` that each
        other class has; and the number of `classes`, a scalar on the host. All are 0 at padding. With logits z and R
        the classes that are not among the k largest, logsumexp z = logsumexp(values, level + log |R|).
    """
    output: Any = run.output if isinstance(run, ServedRun) else None
    return output if isinstance(output, dict) and "values" in output else None


def lazy_answers(run: Run) -> LazyLogits | None:
    """Return the logits of a teacher's run, without a graph, to be made in parts; None if they are whole.

    They are made of the hidden states, where the run ended before the head, or of the largest logits that were kept.
    """
    if run.deferred is not None and not run.deferred.graded:
        return lazy_logits(run)
    kept = largest_of(run)
    if kept is None or kept["values"].ndim != 3:
        return None
    names, classes = ("values", "indices", "level"), kept["classes"]

    def make(rows: Sequence[Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        return dense({**dict(zip(names, rows, strict=True)), "classes": classes})

    return LazyLogits(tuple(kept[name] for name in names), make, {}, int(classes))


def run_of(model: Any, inputs: Any, at: Sequence[Location] = (), *, resumable: bool = True) -> Run:
    """Return the run of a network or served teacher on a batch, as `interventions.run`."""
    if isinstance(model, Served):
        return model.run(inputs, at)
    return interventions.run(model, inputs, at, resumable=resumable)


def run_to(model: Any, inputs: Any, at: Sequence[Location]) -> Run:
    """Return a run up to the last of some locations, as `interventions.run_to`; a served teacher delays it."""
    return model.run_to(inputs, at) if isinstance(model, Served) else interventions.run_to(model, inputs, at)


def shape_of(run: Run, at: Location) -> tuple[int, ...]:
    """Return the shape of the vectors at a location; a served teacher finds it without sending the vectors."""
    if isinstance(run, ServedRun) and run.teacher is not None:
        return run.teacher.shape(at, run)
    return tuple(run.vectors(at).shape)


def grid_of(run: Run, at: Location) -> tuple[int, ...]:
    """Return `(batch, positions)` of a location, `(batch,)` if it has no positions."""
    shape = shape_of(run, at)
    return shape[:2] if len(shape) > 2 else shape[:1]


def unit_of(run: Run, at: Location) -> tuple[int, ...]:
    """Return the shape at one position of a location: `(dims,)`, or `(heads, dims)` at the sites with heads."""
    return shape_of(run, at)[len(grid_of(run, at)) :]


def interchanged(
    base: Run, source: Run | None, at: Places, positions: Masks = (None, None), record: Sequence[Location] = ()
) -> Run:
    """Return the counterfactual run from two runs of one network or served teacher, as `interventions.interchange`."""
    teacher = answering(base)
    if isinstance(teacher, Served):
        return teacher.interchange(base, source, at, positions, record)
    written, read = positions
    return interventions.interchange(
        base.model, base, source, at, positions=written, source_positions=read, record=record
    )
