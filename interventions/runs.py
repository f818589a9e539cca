"""Runs of a model that keep activations: `run`, `run_to` and `record`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from interventions.arguments import checked
from interventions.errors import InterventionError
from interventions.execution.deferring import call_deferring, calls_made
from interventions.execution.hooked import fetcher, make_store, prepare_reads, read, recording_scope
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
from interventions.hooks.installation import opened
from interventions.hooks.scopes import Scope
from interventions.locations import Location
from interventions.models.answers import Answers, rule_in
from interventions.models.architectures import architecture
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
    """Run `model` on `inputs`, unmodified, and return the output with the activations `at` the locations.

    Models that can return a cache run without one, unless the inputs hold `use_cache=True`.

    Args:
        model: a torch model, or one of nnsight.
        inputs: a mapping (keywords), a tuple (positional arguments) or a tensor.
        at: a Location or several, whose activations to keep. Others are computed by another run when they are read.
        resumable: also keep what every block returns (references, no copies), so that interchanges can resume from
            there and block outputs need no second run.
        detach: cut the kept activations off from the graph.
        device: where to store the kept activations; None leaves them where they are.
        keep: a function of the output that returns what to keep of it, e.g. a metric. From a remote model nothing else
            is sent back.
        answers: the part of the output that is the answer, `run(…).logits`: a name, an index or a function of the
            output. None is `output.logits`, the output itself if it is a tensor, or its only tensor that is no scalar.
        remote: for a model of nnsight, where it runs: True is the host that nnsight is configured for, a text the
            address of a host, and "local" this process, by the same way as on a host.

    Returns:
        A Run: `output`, `logits`, `inputs`, and `activations[location]`.

    Raises:
        InterventionError: a location that does not exist, or never ran.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    >>> done = run(net, torch.ones(4, 2), Location(module="0"))
    >>> done.output.shape, done.activations[Location(module="0")].shape
    (torch.Size([4, 3]), torch.Size([4, 3]))
    """
    answers = None if answers is None else rule_in(answers)
    if (tracing := traced(model, remote)) is not None:
        done = tracing.run(model, inputs, locations_of(at), detach=detach, device=device, keep=keep, remote=remote)
        return done if answers is None else replace(done, answers=answers)
    check_inputs(inputs)
    model, found = module_of(model), architecture(model)
    inputs = without_cache(found, inputs)
    recording = Recording.begin(found) if resumable and found.stacks else None
    check_device(device)
    places = {location: found.place(location) for location in locations_of(at)}
    activations, taps = prepare_reads(places, detach=detach, device=device)
    scope = recording_scope(model, taps, recording)
    whole, is_done = keep is not None or answers is not None, partial(calls_made, list(places), activations)
    output = call_deferring(model, inputs, scope, is_done, whole=whole)
    output = output if keep is None else keep(output)
    if recording is not None:
        recording.close()
    check_ran(activations, "this run")
    made = Stamp.of(model)
    activations.fetch_with(fetcher(model, inputs, recording, made=made, store=make_store(detach, device)))
    return Run(model, inputs, output, activations, recording, answers=answers, _stamp=made)


@checked
def run_to(model: Model, inputs: Inputs, at: Where, *, resumable: bool = False, remote: bool | str = False) -> Run:
    """Run `model` until the last of the locations `at`, and return a Run with output None: a source for interchanges.

    Args:
        model: a torch model, or one of nnsight.
        inputs: as in `run`.
        at: a Location or several, at least one.
        resumable: also keep what every block returns that runs, so that it is a base too: interchanges at these
            locations resume from there, and no block of the base runs in vain.
        remote: as in `run`.

    Raises:
        InterventionError: as `run`; or no location is named.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    >>> run_to(net, torch.ones(4, 2), Location(module="0")).output is None
    True
    """
    locations, found = locations_of(at), architecture(model)
    if not locations:
        raise InterventionError("at= names no location to stop at; write at=[Location(3)], or run(model, inputs).")
    if (tracing := traced(model, remote)) is not None:
        return tracing.run_to(model, inputs, locations, remote=remote)
    check_inputs(inputs)
    recording = Recording.begin(found) if resumable and found.stacks else None
    whole = list(dict.fromkeys(location.whole for location in locations))
    places = {location: found.place(location) for location in whole}
    activations = read(module_of(model), inputs, places, recording=recording)

    def fetch(location: Location, kept: Activations) -> Tensor:
        place = found.place(location)
        state = kept[location.whole] if location.whole in kept and location.whole != location else None
        state = recording.state(place) if state is None and recording is not None else state
        if state is None:
            raise InterventionError(
                f"{location} was not read in this run, which stops after {', '.join(map(str, whole))}; name it there: "
                f"run_to(model, inputs, at=[{location!r}])."
            )
        return part_of(state, location, place)

    activations.fetch_with(fetch)
    return Run(model, inputs, None, activations, recording)


def traced(model: Model, remote: bool | str = False) -> Any:
    """Return the module `interventions.tracing` for a model of nnsight, and None for any other.

    Raises:
        InterventionError: `remote` is set for a model that is not of nnsight.
    """
    if is_traced(model):
        from interventions import tracing  # not before it is needed: nnsight changes torch on import

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
    """Return a Run with the activations `at` the locations: a new one of inputs, or a given one, completed.

    What a given Run lacks is computed by running its inputs again.

    Raises:
        InterventionError: as `run`; or a Run of another model, or older than its weights.
    """
    if not isinstance(given, Run):
        return run(model, given, at, resumable=resumable, remote=remote)
    if given.model is not model:
        raise InterventionError(
            f"a run of another model ({type(given.model).__name__}) was given; run it on this one: run(model, inputs), "
            "or, to take a source from that model, write source_model=other."
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
    """Raise InterventionError for a device that torch does not know, or that this machine lacks."""
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InterventionError(f"device={device!r} cannot be used here: {reason}; write device='cpu'.") from error


def check_eval(model: Model, remote: bool | str = False) -> None:
    """Raise InterventionError for a model in train mode, where dropout differs between the runs that are compared.

    A remote model is not checked: hosts hold their models in eval mode.
    """
    architecture(model)
    if (tracing := traced(model, remote)) is not None and not remote:
        tracing.load(model)
    modules = () if remote else module_of(model).named_modules()
    training = next((path for path, module in modules if module.training), None)
    if training is not None:
        what = f"module {training!r} of the model" if training else "the model"
        raise InterventionError(
            f"{what} is in train mode, where dropout differs from run to run; call model.eval() first."
        )


@checked
@contextmanager
def record(
    model: Model, at: Where, *, detach: bool = False, device: torch.device | str | int | None = None
) -> Iterator[Activations]:
    """Record the activations `at` the locations in the ordinary calls inside the block.

    Args:
        model: a torch model, or one of nnsight.
        at: a Location or several.
        detach: cut the activations off from the graph.
        device: where to store the activations; None leaves them where they are.

    Yields:
        Activations, a mapping that fills up as the calls run: `activations[location]`.

    Raises:
        InterventionError: a location that does not exist, or never ran inside the block.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    >>> with record(net, Location(module="0")) as activations:
    ...     _ = net(torch.zeros(4, 2))
    >>> activations[Location(module="0")].shape
    torch.Size([4, 3])
    """
    if (tracing := traced(model)) is not None:
        with tracing.record(model, locations_of(at), detach=detach, device=device) as activations:
            yield activations
        return
    check_device(device)
    found = architecture(model)
    places = {location: found.place(location) for location in locations_of(at)}
    activations, taps = prepare_reads(places, detach=detach, device=device)
    with opened(Scope(module_of(model), taps)):
        yield activations
    check_ran(activations, "this record block")
