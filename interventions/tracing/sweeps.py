"""The counterfactuals of a sweep over a traced model: one job, from which the metric alone comes back."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from interventions.execution.cells import Cell
from interventions.execution.examples import examples_in
from interventions.execution.requests import Listen, sources_of_run, writes_of
from interventions.execution.run import Run, rows_of
from interventions.execution.stacking import (
    Each,
    OneByOne,
    Stacked,
    chunks_of,
    positions_of,
    tokens_taken,
    tokens_written,
)
from interventions.execution.writes import Source
from interventions.locations import Location
from interventions.models.architectures import architecture
from interventions.models.places import Place
from interventions.tracing import vllm
from interventions.tracing.jobs import Task
from interventions.tracing.plans import Plan
from interventions.tracing.sessions import Remote


def measured(
    stacked: Stacked, remote: Remote, rows: Sequence[tuple[Location, ...]], cells: Sequence[Sequence[Cell]]
) -> Iterator[tuple[int, Cell, Any]]:
    """Run all counterfactuals as one job, and yield each cell with the number of its row and its metric.

    Raises:
        InterventionError: the model is a vLLM engine.
    """
    vllm.refuse(stacked.base.model, "sweep")
    model, examples = stacked.base.model, examples_in(stacked.base.inputs)
    plan, sources = Plan.of(model, stacked.generator), dict[int, Task]()
    passes: list[tuple[int, Sequence[Cell], Task]] = []
    for row, locations, chunk in chunks_of(rows, cells, stacked.most):
        pairs = {location: OneByOne.of(stacked.ops[location], chunk, location) for location in locations}
        to = {location: positions_of(tokens_written(chunk, location)) for location in locations}
        of = {location: positions_of(tokens_taken(chunk, location)) for location in locations}
        listen = _listening(plan, sources, len(chunk))
        where = (to, of, None)
        writes = writes_of(architecture(model), pairs, stacked.source, where, stacked.generator, listen=listen)
        inputs = rows_of(stacked.base.inputs, torch.arange(examples).repeat(len(chunk)))
        task = plan.task(inputs, Each(stacked.measure, len(chunk), examples))
        plan.write(task, writes)
        passes.append((row, chunk, task))
    plan.run(remote)
    for row, chunk, task in passes:
        for cell, value in zip(chunk, task.output, strict=True):
            yield row, cell, value


def _listening(plan: Plan, sources: dict[int, Task], times: int) -> Listen:
    """Return a listener that repeats the examples of the source, and runs it in the job if its activations are there.

    Such a source runs once for each number of times that its examples are repeated.
    """

    def listen(given: Any, places: dict[Location, Place]) -> dict[Location, Source]:
        again = torch.arange(examples_in(given.inputs)).repeat(times)
        if not _is_summary(given):
            return sources_of_run(given if times == 1 else given.take(again), plan.model, places)
        if times not in sources:
            sources[times] = plan.task(rows_of(given.inputs, again), None)
        task = sources[times]
        known = {read.location for read in task.reads}
        plan.reads(task, [location for location in places if location not in known], is_wanted=False)
        return {read.location: read.source for read in task.reads if read.location in places}

    return listen


def _is_summary(given: Run) -> bool:
    """Return whether a run holds the shapes of its activations alone."""
    return all(state.is_meta for location in given.activations for state in _calls(given, location))


def _calls(given: Run, location: Location) -> list[Any]:
    """Return the activations at a location, call by call."""
    kept: Any = given.activations
    return kept.calls(location) if hasattr(kept, "calls") else [kept[location]]
