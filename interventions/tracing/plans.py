"""A job that is being put together: which runs, with what read and what written in each."""

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
from interventions.tracing.edits import Block, tapped
from interventions.tracing.inputs import called_with
from interventions.tracing.jobs import During, Job, Read, Stop, Task
from interventions.tracing.operations import runs_once
from interventions.tracing.sessions import Remote, perform

Taps = list[tuple[Location, Place, Tap]]


@dataclass(eq=False)
class Plan:
    """A job that is being put together: its tasks, and the taps of each."""

    model: Any
    found: Architecture
    tasks: list[Task]
    taps: Taps
    job: Job

    @classmethod
    def of(cls, model: Any, generator: torch.Generator | None = None) -> "Plan":
        """An empty one."""
        tasks: list[Task] = []
        return cls(model, architecture(model), tasks, [], Job(tasks, [], generator))

    def task(self, inputs: Inputs, finish: Callable[[Any], Any] | None) -> Task:
        """One more run, of inputs as `prepared` gives them."""
        args, kwargs = called_with(without_cache(self.found, inputs))
        self.tasks.append(Task(args, kwargs, finish))
        return self.tasks[-1]

    def reads(self, task: Task, locations: Iterable[Location], **how: Any) -> None:
        """Keep what is at the locations in a run; one that keeps no output ends after the last.

        Args:
            how: as `Read` takes it.
        """
        places = {location: self.found.place(location) for location in locations}
        for location, place in places.items():
            task.reads.append(Read(location, place, **how))
            self._add(location, place, task.reads[-1], task, writes=False)
        if task.finish is None and not self.model._edits:  # edits of the user may wait for what comes later
            for end in dict.fromkeys(self._end_of(place) for place in places.values()):
                self._add(next(iter(places)), end, Stop(task), task, writes=False)

    def _end_of(self, place: Place) -> Place:
        """Where nothing more comes of a place: inside a block, whose parts may run more than once, the block's end."""
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
        """Make the writes in a run."""
        for write in writes:
            self._add(write.location, write.place, write, task)
            self.job.writes = [*self.job.writes, write]

    def _add(self, location: Location, place: Place, function: Any, task: Task, *, writes: bool = True) -> None:
        self.taps.append((location, place, tapped(place, During(function, self.job, task), writes=writes)))

    def run(self, remote: Remote) -> None:
        """Run all of it."""
        perform(self.model, Block(self.taps, job=self.job), remote)
