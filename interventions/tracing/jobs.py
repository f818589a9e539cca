"""Several runs of a traced model in one go: where it is, one after the other, so that activations stay there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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
        args, kwargs: what the model is called with.
        finish: what is kept of its output; None ends the run after the last of the reads.
        reads: what is kept of its activations.
        output: what `finish` kept.
    """

    args: tuple
    kwargs: dict[str, Any]
    finish: Callable[[Any], Any] | None
    reads: list[Read] = field(default_factory=list)
    output: Any = None

    @property
    def is_complete(self) -> bool:
        """Whether all that is to be read was read."""
        return all(read.source.states for read in self.reads)


@dataclass(eq=False)
class Read:
    """A tap function that keeps what is at a place.

    Attributes:
        shapes_only: what is kept are the shapes.
        source: what was kept, call by call, and which of its tokens are real.
        is_wanted: whether it is part of the answer.
    """

    location: Location
    place: Place
    detach: bool = False
    is_wanted: bool = True
    shapes_only: bool = False
    source: Source = field(default_factory=lambda: Source([]))

    def __call__(self, state: Tensor, moment: CallContext) -> Tensor | None:
        part = part_of(state, self.location, self.place)
        kept = part.to("meta") if self.shapes_only else part
        self.source.states.append(kept.detach() if self.detach else kept)
        going_on = moment.call or moment.generation
        mask = None if going_on is None else going_on.arguments.get(self.place.mask)
        self.source.mask = mask if isinstance(mask, Tensor) else None
        # The model goes on with a copy, which it may change in place; what is kept stays on the way to the output.
        return state.clone() if part is state else None


@dataclass(eq=False)
class Job:
    """The runs that one verb asks for.

    Attributes:
        task: the one that is going on.
        writes: of all its runs.
        generator: of the operators; it is as far on here, afterwards, as it is where they drew.
    """

    tasks: Sequence[Task]
    writes: Sequence[Write] = ()
    generator: torch.Generator | None = None
    task: Task | None = None

    def begin(self, number: int) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a run that begins now."""
        self.task = self.tasks[number]
        return self.task.args, self.task.kwargs

    def finish(self, tracer: Any) -> None:
        """Wait for the end of a run, unless it is stopped before, and keep what is asked for."""
        from nnsight.intervention.interleaver import OutOfOrderError

        task = self.task
        assert task is not None
        try:
            output = tracer.result
        except OutOfOrderError:  # stopped
            return
        if task.finish is not None:
            task.output = task.finish(output)

    def answer(self, *, away: bool) -> dict[str, Any]:
        """What was kept; without its graph, where it goes to another machine."""
        answer = {
            "outputs": [task.output for task in self.tasks],
            "reads": [[read.source.states for read in task.reads if read.is_wanted] for task in self.tasks],
            "writes": [(write.firings, write.calls, write.changed, write.norm) for write in self.writes],
            "generator": None if self.generator is None else self.generator.get_state(),
        }
        return map_tensors(_alone, answer) if away else answer

    def take(self, answer: dict[str, Any]) -> None:
        """Keep here what was kept where the model is."""
        self.task = None
        for task, output, states in zip(self.tasks, answer["outputs"], answer["reads"], strict=True):
            task.output = output
            for read, kept in zip((read for read in task.reads if read.is_wanted), states, strict=True):
                read.source.states = kept
        for write, counts in zip(self.writes, answer["writes"], strict=True):
            write.firings, write.calls, write.changed, write.norm = counts
        if self.generator is not None:
            self.generator.set_state(answer["generator"])


@dataclass(frozen=True, eq=False)
class During:
    """A tap function that acts while its job runs one task, and else is not there."""

    function: Callable[..., Any]
    job: Job
    task: Task

    def __call__(self, state: Tensor, moment: CallContext) -> Tensor | None:
        return self.function(state, moment)

    @property
    def acts(self) -> bool:
        """Whether its task is going on."""
        return self.job.task is self.task


@dataclass(frozen=True, eq=False)
class Stop:
    """A tap function that ends a run when all that is to be read was read."""

    task: Task

    def __call__(self, state: Tensor, moment: CallContext) -> Tensor | None:
        from nnsight.intervention.interleaver import EarlyStopException

        if self.task.is_complete:
            raise EarlyStopException
        return None


def _alone(tensor: Tensor) -> Tensor:
    """A tensor without its graph, and without what it is a view of, which would be sent with it."""
    alone = tensor.detach()
    return alone.clone() if alone.untyped_storage().nbytes() > alone.nbytes and not alone.is_meta else alone
