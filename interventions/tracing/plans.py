"""Plans: jobs that are being put together, run by run, with the reads and writes of each."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from interventions.execution.run import Inputs, without_cache
from interventions.execution.writes import Write
from interventions.hooks.taps import Tap
from interventions.locations import Location
from interventions.models.architectures import Architecture, architecture
from interventions.models.places import Place
from interventions.tracing.edits import Block, tap_at
from interventions.tracing.inputs import called_with
from interventions.tracing.jobs import During, Job, Read, Stop, Task
from interventions.tracing.operations import runs_once
from interventions.tracing.sessions import Remote, perform

Taps = list[tuple[Location, Place, Tap]]


@dataclass(eq=False)
class Plan:
    """A job that is being put together.

    Attributes:
        model: the traced model.
        found: its architecture.
        tasks: the runs.
        taps: the taps of all runs, each with its location and place.
        job: the job of the tasks.
    """

    model: Any
    found: Architecture
    tasks: list[Task]
    taps: Taps
    job: Job

    @classmethod
    def of(cls, model: Any, generator: torch.Generator | None = None) -> "Plan":
        """Return an empty plan for a model."""
        tasks: list[Task] = []
        return cls(model, architecture(model), tasks, [], Job(tasks, [], generator))

    def task(self, inputs: Inputs, finish: Callable[[Any], Any] | None) -> Task:
        """Add a run of inputs that `to_tensors` returned, and return it."""
        args, kwargs = called_with(without_cache(self.found, inputs))
        self.tasks.append(Task(args, kwargs, finish))
        return self.tasks[-1]

    def reads(self, task: Task, locations: Iterable[Location], **how: Any) -> None:
        """Add reads of the locations to a run; a run that keeps no output ends after the last of them.

        Args:
            task: the run.
            locations: what to read.
            how: arguments of `Read`.
        """
        places = {location: self.found.place(location) for location in locations}
        for location, place in places.items():
            task.reads.append(Read(location, place, **how))
            self._add(location, place, task.reads[-1], task, writes=False)
        if task.finish is None and not self.model._edits:  # edits of the user may need what comes later in the run
            for end in dict.fromkeys(self._end_of(place) for place in places.values()):
                self._add(next(iter(places)), end, Stop(task), task, writes=False)

    def _end_of(self, place: Place) -> Place:
        """Return the place after which a location runs no more: the end of its block, if its part may run again."""
        simple = place.io in ("input", "output") and not place.operations
        if simple and place.block in (None, place.module):
            return place
        if place.block is None:
            return Place(place.module, place.path, "output", None)
        inside = place.path.removeprefix(self.found.paths[place.block]).lstrip(".")
        if inside and runs_once(place.block, inside):
            return place if simple else Place(place.module, place.path, "output", place.block)
        return Place(place.block, self.found.paths[place.block], "output", place.block)

    def write(self, task: Task, writes: Iterable[Write]) -> None:
        """Add writes to a run."""
        for write in writes:
            self._add(write.location, write.place, write, task)
            self.job.writes = [*self.job.writes, write]

    def _add(self, location: Location, place: Place, function: Any, task: Task, *, writes: bool = True) -> None:
        self.taps.append((location, place, tap_at(place, During(function, self.job, task), writes=writes)))

    def run(self, remote: Remote) -> None:
        """Run the job."""
        perform(self.model, Block(self.taps, job=self.job), remote)
