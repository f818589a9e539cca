"""`run`, `run_to`, `record`, `intervene` and `interchange` on a model of nnsight."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from interventions.errors import InterventionError
from interventions.execution.parts import part_of
from interventions.execution.requests import Handle, Listen, check_fired, measured, sources_of_run, writes_of
from interventions.execution.run import (
    Activations,
    Inputs,
    Keep,
    Run,
    check_fresh,
    check_ran,
    check_repeatable,
    without_past,
)
from interventions.execution.stamps import Stamp
from interventions.execution.writes import Source
from interventions.locations import Location
from interventions.models.architectures import architecture
from interventions.models.places import Place
from interventions.operators import Operator
from interventions.steps import parse_steps
from interventions.tracing import vllm
from interventions.tracing.edits import Block, attached, ran_here, surroundings, tap_at
from interventions.tracing.inputs import to_tensors
from interventions.tracing.jobs import Read, Task
from interventions.tracing.plans import Plan
from interventions.tracing.sessions import Remote, restored_errors


def run(
    model: Any,
    inputs: Inputs,
    at: Sequence[Location] = (),
    *,
    detach: bool = False,
    device: torch.device | str | None = None,
    keep: Keep | None = None,
    remote: Remote = False,
) -> Run:
    """Run a traced model in one trace, as `interventions.run` does: output without cache, and requested activations."""
    if vllm.is_engine(model):
        return vllm.run(model, inputs, at, detach=detach, device=device, keep=keep, remote=remote)
    inputs = to_tensors(model, inputs)
    plan = Plan.of(model)
    task = plan.task(inputs, without_past if keep is None else keep)
    shapes_only = device is not None and torch.device(device).type == "meta"
    plan.reads(task, at, detach=detach, shapes_only=shapes_only)
    plan.run(remote)
    activations = _activations(task, device)
    check_ran(activations, "this run")
    activations.fetch_with(_fetcher(model, inputs, remote))
    return Run(model, inputs, task.output, activations)


def run_to(model: Any, inputs: Inputs, at: Sequence[Location], *, remote: Remote = False) -> Run:
    """Run a traced model in one trace that stops after the last location, as `interventions.run_to` does."""
    if vllm.is_engine(model):
        return vllm.run(model, inputs, at, remote=remote)
    inputs, found = to_tensors(model, inputs), architecture(model)
    activations = read(model, inputs, list(dict.fromkeys(location.whole for location in at)), remote=remote)
    activations.fetch_with(lambda location, kept: part_of(kept[location.whole], location, found.place(location)))
    return Run(model, inputs, None, activations)


def read(model: Any, inputs: Inputs, at: Sequence[Location], *, remote: Remote = False) -> Activations:
    """Return the activations at the locations, from a run that stops after the last of them."""
    plan = Plan.of(model)
    task = plan.task(to_tensors(model, inputs), None)
    plan.reads(task, at)
    plan.run(remote)
    activations = _activations(task, None)
    check_ran(activations, "the source run")
    return activations


@contextmanager
def record(
    model: Any, at: Sequence[Location], *, detach: bool = False, device: torch.device | str | None = None
) -> Iterator[Activations]:
    """Record the user's own traces inside the block on this machine, as `interventions.record` does."""
    vllm.refuse(model, "record")
    found, activations = architecture(model), Activations(at)
    reads = [Read(location, found.place(location), detach) for location in at]
    for each in reads:
        activations.put(each.location, each.source.states)
    taps = [(each.location, each.place, tap_at(each.place, each, writes=False)) for each in reads]
    stays = (
        "a trace that runs elsewhere leaves the activations of a record block there; write run(model, inputs, "
        "at=[…], remote=…), or .save() them in the trace."
    )
    with attached(model, Block(taps, stays=stays)):
        yield activations
    if device is not None:
        for each in reads:
            each.source.states[:] = [state.to(device) for state in each.source.states]
    check_ran(activations, "this record block")


@contextmanager
def intervene(
    model: Any,
    pairs: dict[Location, Operator],
    source: object,
    where: tuple[object, object, Any],
    generator: torch.Generator | None,
    *,
    remote: Remote = False,
) -> Iterator[Handle]:
    """Intervene in the user's own traces inside the block, wherever they run, as `interventions.intervene` does.

    Sources passed as inputs run first, as one job.
    """
    if vllm.is_engine(model):
        with vllm.intervene(model, pairs, source, where, generator, remote=remote) as handle:
            yield handle
        return
    plan = Plan.of(model)
    writes = measured(writes_of(plan.found, pairs, source, where, generator, listen=_listening(plan, True)))
    if plan.tasks:
        plan.run(remote)
    block = Block([(write.location, write.place, tap_at(write.place, write)) for write in writes], writes)
    with restored_errors(), attached(model, block):
        yield Handle(writes, lambda: block.sent and not ran_here(model, block))
    if ran_here(model, block) or not block.sent:  # on another machine `Visits.watch` checks it
        check_fired(writes, "this intervene block; open a trace of the model inside the block")


def interchange(
    model: Any,
    base: Inputs | Run,
    source: object,
    pairs: dict[Location, Operator],
    where: tuple[object, object],
    *,
    generator: torch.Generator | None = None,
    record: Sequence[Location] = (),
    keep: Keep | None = None,
    remote: Remote = False,
) -> Run:
    """Run sources and counterfactual as one job, as `interventions.interchange` does; the counterfactual comes back."""
    vllm.refuse(model, "interchange")
    plan = Plan.of(model, generator)
    inputs = base.inputs if isinstance(base, Run) else to_tensors(model, base)
    listen = _listening(plan, False)
    writes = writes_of(plan.found, pairs, source, (*where, parse_steps(None)), generator, listen=listen)
    task = plan.task(inputs, without_past if keep is None else keep)
    plan.write(task, writes)
    plan.reads(task, record)
    plan.run(remote)
    check_fired(writes, "the counterfactual run")
    activations = _activations(task, None)
    check_ran(activations, "the counterfactual run")
    activations.fetch_with(_fetcher(model, inputs, remote, is_counterfactual=True))
    return Run(model, inputs, task.output, activations, is_counterfactual=True)


def _listening(plan: Plan, is_wanted: bool) -> Listen:
    """Return a listener that adds sources as runs to the plan; their activations are there once the plan has run."""

    def listen(given: Inputs | Run, places: dict[Location, Place]) -> dict[Location, Source]:
        if isinstance(given, Run):
            return sources_of_run(given, plan.model, places)
        task = plan.task(to_tensors(plan.model, given), None)
        plan.reads(task, places, is_wanted=is_wanted)
        return {read.location: read.source for read in task.reads}

    return listen


def _activations(task: Task, device: torch.device | str | None) -> Activations:
    """Return the activations that a task has read, on a device."""
    activations = Activations(read.location for read in task.reads)
    for read in task.reads:
        states = read.source.states
        activations.put(read.location, states if device is None else [state.to(device) for state in states])
    return activations


def _fetcher(model: Any, inputs: Inputs, remote: Remote, *, is_counterfactual: bool = False) -> Any:
    """Return the function that computes activations of a run that were not recorded, by another run of its inputs."""
    found, made, around = architecture(model), Stamp.of(model), surroundings(model)

    def fetch(location: Location, kept: Mapping[Location, Tensor]) -> Tensor:
        whole_one = location.whole
        if whole_one is location or whole_one not in kept:
            training = found.model.training and not remote  # hosts hold their models in eval mode
            check_repeatable(location, is_counterfactual=is_counterfactual, training=training)
            check_fresh(model, made)
            if surroundings(model) != around:
                raise InterventionError(
                    f"{location} was not recorded, and the run was made inside other blocks of interventions, or under "
                    f"other edits of the model, than there are now; ask for it there: run(model, inputs, "
                    f"at=[{location!r}])."
                )
            return read(model, inputs, [location], remote=remote)[location]
        return part_of(kept[whole_one], location, found.place(location))

    return fetch
