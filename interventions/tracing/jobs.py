"""Jobs: several runs of a traced model, one after the other on its machine, so that activations stay there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interventions.execution.measures import Change, Missing
from interventions.execution.parts import part_of
from interventions.execution.recordings import map_tensors
from interventions.execution.writes import Source, Write
from interventions.locations import Location
from interventions.models.calls import CallContext
from interventions.models.places import Place


@dataclass(eq=False)
class Task:
    """One run of a job.

    Attributes:
        args: the positional arguments of the model.
        kwargs: its named arguments.
        finish: returns what to keep of the output; None ends the run after the last of the reads.
        reads: the activations to keep.
        output: what `finish` returned.
    """

    args: tuple
    kwargs: dict[str, Any]
    finish: Callable[[Any], Any] | None
    reads: list[Read] = field(default_factory=list)
    output: Any = None

    @property
    def is_complete(self) -> bool:
        """True once all reads have happened."""
        return all(read.source.states for read in self.reads)


@dataclass(eq=False)
class Read:
    """A tap function that keeps the activation at a place.

    Attributes:
        location: the location that was requested.
        place: where it is in the model.
        detach: True cuts the activation off from the graph.
        is_wanted: True if it is part of the answer, False if other runs of the job alone need it.
        shapes_only: True keeps its shape alone, as a tensor on the meta device.
        source: the activations, call by call, with the mask of their tokens.
    """

    location: Location
    place: Place
    detach: bool = False
    is_wanted: bool = True
    shapes_only: bool = False
    source: Source = field(default_factory=lambda: Source([]))

    def __call__(self, state: Tensor, context: CallContext) -> Tensor | None:
        part = part_of(state, self.location, self.place)
        kept = part.to("meta") if self.shapes_only else part
        self.source.states.append(kept.detach() if self.detach else kept)
        call = context.call or context.generation
        mask = None if call is None else call.arguments.get(self.place.mask)
        self.source.mask = mask if isinstance(mask, Tensor) else None
        # The model continues with a copy, which it may change in place, while gradients still flow to the kept tensor.
        return state.clone() if part is state else None


@dataclass(eq=False)
class Job:
    """The runs of one `run`, `interchange` or `sweep`.

    Attributes:
        tasks: the runs.
        writes: the writes of all runs.
        generator: of the operators; afterwards it has the state that it reached on the machine of the model.
        task: the run in progress.
    """

    tasks: Sequence[Task]
    writes: Sequence[Write] = ()
    generator: torch.Generator | None = None
    task: Task | None = None

    def begin(self, number: int) -> tuple[tuple, dict[str, Any]]:
        """Begin a run, and return its arguments."""
        self.task = self.tasks[number]
        return self.task.args, self.task.kwargs

    def finish(self, tracer: Any) -> None:
        """Wait for the end of the run in progress, unless it is stopped before, and keep its output."""
        from nnsight.intervention.interleaver import OutOfOrderError

        task = self.task
        assert task is not None
        try:
            output = tracer.result
        except OutOfOrderError:  # the run was stopped early
            return
        if task.finish is not None:
            task.output = task.finish(output)

    def answer(self, *, away: bool) -> dict[str, Any]:
        """Return everything that was kept, detached and copied if it is sent to another machine."""
        answer = {
            "outputs": [task.output for task in self.tasks],
            "reads": [[read.source.states for read in task.reads if read.is_wanted] for task in self.tasks],
            "writes": [_counts(write) for write in self.writes],
            "generator": None if self.generator is None else self.generator.get_state(),
        }
        return map_tensors(_detach, answer) if away else answer

    def take(self, answer: dict[str, Any]) -> None:
        """Take over the answer of the copy of this job on the machine of the model."""
        self.task = None
        for task, output, states in zip(self.tasks, answer["outputs"], answer["reads"], strict=True):
            task.output = output
            for read, kept in zip((read for read in task.reads if read.is_wanted), states, strict=True):
                read.source.states = kept
        for write, counts in zip(self.writes, answer["writes"], strict=True):
            write.firings, write.calls, change, missing = counts
            write.change, write.missing = None if change is None else Change(*change), Missing(*missing)
        if self.generator is not None:
            self.generator.set_state(answer["generator"])


@dataclass(frozen=True, eq=False)
class During:
    """A tap function that acts in one task of a job only."""

    function: Callable[..., Any]
    job: Job
    task: Task

    def __call__(self, state: Tensor, context: CallContext) -> Tensor | None:
        return self.function(state, context)

    @property
    def acts(self) -> bool:
        """True while its task is in progress."""
        return self.job.task is self.task


@dataclass(frozen=True, eq=False)
class Stop:
    """A tap function that ends a run once all its reads have happened."""

    task: Task

    def __call__(self, state: Tensor, context: CallContext) -> Tensor | None:
        from nnsight.intervention.interleaver import EarlyStopException

        if self.task.is_complete:
            raise EarlyStopException
        return None


def _counts(write: Write) -> tuple[int, int, tuple[Tensor | None, Tensor | None] | None, tuple[Tensor | None, int]]:
    """Return what a write counted, in tuples."""
    change = None if write.change is None else (write.change.difference, write.change.before)
    return write.firings, write.calls, change, (write.missing.count, write.missing.entries)


def _detach(tensor: Tensor) -> Tensor:
    """Return a tensor without its graph, copied if it is a view, as all of its storage would be sent along."""
    detached = tensor.detach()
    is_view = detached.untyped_storage().nbytes() > detached.nbytes and not detached.is_meta
    return detached.clone() if is_view else detached
