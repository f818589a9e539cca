"""Runs of a model: with its activations kept, with some of them replaced, or both."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.execution.hooked import fetcher, read, reading, recorded, storing
from interventions.execution.parts import part_of
from interventions.execution.recordings import Recording
from interventions.execution.run import (
    Activations,
    Inputs,
    Keep,
    Run,
    Where,
    check_inputs,
    check_ran,
    locations_of,
    without_cache,
)
from interventions.execution.stamps import Stamp
from interventions.hooks.hooks import Scope, opened
from interventions.locations import Location
from interventions.models.answers import Answers, rule_in
from interventions.models.architectures import architecture
from interventions.models.calls import call
from interventions.models.wrappers import Model, is_traced, module_of
from interventions.names import shown


@checked
def run(
    model: Model,
    inputs: Inputs,
    at: Where = (),
    *,
    resumable: bool = True,
    detach: bool = False,
    device: torch.device | str | int | None = None,
    keep: Keep | None = None,
    answers: Answers | None = None,
    remote: bool | str = False,
) -> Run:
    """Run `model` on `inputs`, unmodified, and keep its activations `at` the locations.

    Models that can return a cache are run without, unless the inputs say `use_cache=True`.

    Args:
        inputs: a mapping (keywords), a tuple (positional arguments) or a tensor.
        at: locations to keep. Others are fetched when they are asked for.
        resumable: also keep what every block returns (references, no copies), so that interchanges can resume from
            there and block outputs need no second run.
        detach: cut the kept activations off from the graph.
        device: where to store the kept activations; None is where they are.
        keep: a function of the output that gives what is kept of it, e.g. a metric: nothing else comes back from a
            remote model.
        answers: what of the output is the answer, `run(…).logits`: a name, an index or a function of the output. None
            is `output.logits`, the output itself if it is a tensor, or the only tensor in it that is no scalar.
        remote: of a model of nnsight, where it runs: True is the host that nnsight is configured for, else its address,
            or "local" to try that out here.

    Raises:
        InterventionError: a location that does not exist, or never ran.
    """
    answers = None if answers is None else rule_in(answers)
    if (elsewhere := traced(model, remote)) is not None:
        there = elsewhere.run(model, inputs, locations_of(at), detach=detach, device=device, keep=keep, remote=remote)
        return there if answers is None else replace(there, answers=answers)
    check_inputs(inputs)
    model, found = module_of(model), architecture(model)
    inputs = without_cache(found, inputs)
    recording = Recording.begin(found) if resumable and found.stacks else None
    check_device(device)
    activations, taps = reading(found, locations_of(at), detach=detach, device=device)
    scope = recorded(model, taps, recording)
    with opened(scope):
        output = call(model, inputs)
    output = output if keep is None else keep(output)
    if recording is not None:
        recording.close()
    check_ran(activations, "this run")
    made = Stamp.of(model)
    activations.fetch_with(fetcher(model, inputs, recording, made=made, store=storing(detach, device)))
    return Run(model, inputs, output, activations, recording, answers=answers, _stamp=made)


@checked
def run_to(model: Model, inputs: Inputs, at: Where, *, remote: bool | str = False) -> Run:
    """A run that stops after the last of the locations `at`: a source for interchanges. Its output is None.

    Raises:
        InterventionError: as `run`.
    """
    locations, found = locations_of(at), architecture(model)
    if not locations:
        raise InterventionError("at= names no location to stop at; write at=[Location(3)], or run(model, inputs).")
    if (elsewhere := traced(model, remote)) is not None:
        return elsewhere.run_to(model, inputs, locations, remote=remote)
    check_inputs(inputs)
    activations = read(module_of(model), inputs, list(dict.fromkeys(location.whole for location in locations)))
    activations.fetch_with(lambda location, kept: part_of(kept[location.whole], location, found.place(location)))
    return Run(model, inputs, None, activations)


def traced(model: Model, remote: bool | str = False) -> Any:
    """`interventions.tracing` for a model of nnsight, else None.

    Raises:
        InterventionError: `remote` for another model.
    """
    if is_traced(model):
        from interventions import tracing  # the one that comes later: it imports nnsight, which changes torch

        return tracing
    if remote or remote == "":
        raise InterventionError(
            f"remote={shown(remote)} asks another machine for the model, and this {type(model).__name__} is here; pass "
            "a model of nnsight: TransformersModel(name)."
        )
    return None


def as_run(
    model: Model, given: Inputs | Run, at: Where = (), *, resumable: bool = True, remote: bool | str = False
) -> Run:
    """A run that has the activations `at`: of the inputs given, or the Run given, which runs again for what it lacks.

    Raises:
        InterventionError: as `run`; or a Run of another model, or older than its weights.
    """
    if not isinstance(given, Run):
        return run(model, given, at, resumable=resumable, remote=remote)
    if given.model is not model:
        raise InterventionError(
            f"a run of another model ({type(given.model).__name__}) was given; run it on this one: run(model, inputs), "
            "or where it is a source, say that activations are taken from that one: source_model=other."
        )
    given.check_fresh()
    found, states, wanted = architecture(model), given.recording, locations_of(at)
    absent = [location for location in wanted if location not in given.activations]
    missing = [location for location in absent if states is None or states.state(found.place(location)) is None]
    again: Mapping[Location, Tensor] = {}
    if missing and not given.is_counterfactual:
        again = run(model, given.inputs, missing, resumable=False, remote=remote).activations
    kept = {location: again[location] if location in again else given.activations[location] for location in wanted}
    return replace(given, activations=kept)


def check_device(device: torch.device | str | int | None) -> None:
    """Raise for a device that torch does not know, or that is not there."""
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InterventionError(f"device={device!r} cannot be used here: {reason}; write device='cpu'.") from error


def check_eval(model: Model, remote: bool | str = False) -> None:
    """Raise in train mode, where dropout would differ between runs that are compared; what is elsewhere is a host's."""
    architecture(model)
    if (elsewhere := traced(model, remote)) is not None and not remote:
        elsewhere.load(model)
    if not remote and any(module.training for module in module_of(model).modules()):
        raise InterventionError(
            "the model is in train mode, where dropout differs from run to run; call model.eval() first."
        )


@checked
@contextmanager
def record(
    model: Model, at: Where, *, detach: bool = False, device: torch.device | str | int | None = None
) -> Iterator[Activations]:
    """Keep the activations `at` the locations of the ordinary calls inside the block.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    >>> with record(net, Location(module="0")) as activations:
    ...     _ = net(torch.zeros(4, 2))
    >>> activations[Location(module="0")].shape
    torch.Size([4, 3])
    """
    if (elsewhere := traced(model)) is not None:
        with elsewhere.record(model, locations_of(at), detach=detach, device=device) as activations:
            yield activations
        return
    check_device(device)
    activations, taps = reading(architecture(model), locations_of(at), detach=detach, device=device)
    with opened(Scope(module_of(model), taps)):
        yield activations
    check_ran(activations, "this record block")
