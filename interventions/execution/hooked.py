"""Runs of a torch model under hooks: activations are read, written, recorded and fetched later."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from interventions.errors import InterventionError
from interventions.execution.origins import check_source_inputs
from interventions.execution.parts import part_of
from interventions.execution.recordings import Recording, Replay, drawing_outside
from interventions.execution.requests import sources_in, sources_of_run
from interventions.execution.run import (
    Activations,
    Fetch,
    Inputs,
    Run,
    check_fresh,
    check_inputs,
    check_ran,
    check_repeatable,
    without_cache,
)
from interventions.execution.stamps import Stamp
from interventions.execution.writes import Source, Write
from interventions.hooks.checkpointing import check_graded
from interventions.hooks.installation import is_hooked, opened, user_hooks
from interventions.hooks.scopes import Scope, Stopped, acting, open_scopes, under, until_stopped
from interventions.hooks.taps import Tap
from interventions.locations import Location
from interventions.models.architectures import architecture
from interventions.models.calls import CallContext, arguments_of, call
from interventions.models.places import Place
from interventions.models.wrappers import is_sharded


def make_store(detach: bool, device: torch.device | str | int | None) -> Callable[[Tensor], Tensor]:
    """Return a function that detaches an activation, or does not, and moves it to a device, if there is one."""

    def store(state: Tensor) -> Tensor:
        state = state.detach() if detach else state
        return state if device is None else state.to(device)

    return store


def prepare_reads(
    places: Mapping[Location, Place],
    *,
    detach: bool = False,
    device: torch.device | str | int | None = None,
) -> tuple[Activations, list[Tap]]:
    """Return empty activations and the taps that fill them in a run, one for each place."""
    activations, store = Activations(places), make_store(detach, device)
    stores = detach or device is not None

    def read(location: Location, place: Place) -> Tap:
        def keep(state: Tensor, context: CallContext) -> Tensor | None:
            if context.recomputing:
                return None
            if not detach:
                check_graded(place.module, context)
            part = part_of(state, location, place)
            activations.append(location, store(part) if stores else part)
            # The model continues with a copy, which it may change in place; the stored tensor stays in the graph.
            return state.clone() if part is state else None

        return Tap.at(place, keep, writes=False)

    return activations, [read(location, place) for location, place in places.items()]


def recording_scope(
    model: nn.Module, taps: list[Tap], recording: Recording | None, replay: Replay | None = None
) -> Scope:
    """Return a scope with these taps that also records the outputs of the blocks, if there is a recording.

    Args:
        model: the model.
        taps: reads and writes.
        recording: records what the blocks return.
        replay: answers for the blocks that are skipped.
    """
    scope = Scope(model, taps)
    if recording is not None:
        watched = recording.found.blocks
        if replay is not None and replay.takes_over:
            recording.begin_with(replay.recording.calls[: replay.count])
            skipped = replay.blocks
            watched = tuple(block for block in watched if block not in skipped)
        # A block without a hook besides needs none after it: its state is what it returns. Writes come before, so
        # that the recorded state of a block is the input of the next one.
        tapped = {tap.module for tap in taps}
        hooked = [block for block in watched if block in tapped or is_hooked(block)]
        scope.taps, scope.watched, scope.raw_outputs = [*taps, *recording.taps(hooked)], watched, recording.raw_output
    if replay is not None:
        scope.replay, scope.replayed = replay, replay.blocks
    return scope


def read(
    model: nn.Module,
    inputs: Inputs,
    places: Mapping[Location, Place],
    *,
    early: bool = True,
    recording: Recording | None = None,
) -> Activations:
    """Return activations of a run that stops after the last of them.

    Inside a block it stops when the block has returned, as its parts may run more than once.

    Args:
        model: the model.
        inputs: its inputs.
        places: where to read.
        early: whether to stop; False where a place may run again later.
        recording: records the outputs of the blocks that run.
    """
    found = architecture(model)
    activations, taps = prepare_reads(places)
    missing = set(places)
    early = early and not is_sharded(model)  # FSDP must see each block return

    def stop(state: Tensor, context: CallContext) -> None:
        if early and not missing:
            raise Stopped

    def let_stop(tap: Tap, location: Location, place: Place) -> None:
        read, is_inside = tap.function, place.block is not None and place.block is not place.module

        def keep(state: Tensor, context: CallContext) -> Tensor | None:
            new = read(state, context)
            missing.discard(location)
            if not (is_inside or missing):
                stop(state, context)
            return new

        tap.function = keep

    for tap, (location, place) in zip(taps, places.items(), strict=True):
        let_stop(tap, location, place)
    around = dict.fromkeys(place.block for place in places.values() if place.block not in (None, place.module))
    ends = [Tap(block, "output", stop, writes=False) for block in around if block is not None]
    with until_stopped(), opened(recording_scope(model, [*taps, *ends], recording)):
        call(model, without_cache(found, inputs))
    if recording is not None:
        recording.close()
        recording.stops = early
    check_ran(activations, "the source run")
    return activations


def fetcher(
    model: nn.Module,
    inputs: Inputs,
    recording: Recording | None,
    *,
    made: Stamp | None,
    store: Callable[[Tensor], Tensor] = lambda state: state,
) -> Fetch:
    """Return a function that fetches an activation that was not requested, from the recording or by another run.

    It refers to the parts of a run and not to the run, which refers to it: a cycle would keep activations until the
    next garbage collection.

    Args:
        model: the model of the run.
        inputs: the inputs of the run.
        recording: the outputs of the blocks, if they were recorded.
        made: the stamp of the model at the time of the run; None for a counterfactual run, which cannot run again.
        store: detaches or moves the activation.
    """
    found, scopes, hooks = architecture(model), open_scopes(model), user_hooks(model)

    def fetch(location: Location, kept: Activations) -> Tensor:
        place, whole = found.place(location), location.whole
        state = None if recording is None else recording.state(place)
        if state is None and whole is not location and whole in kept:
            state = kept[whole]
        if state is None:
            check_repeatable(location, is_counterfactual=made is None, training=model.training)
            if made is not None:
                check_fresh(model, made)
            if hooks != user_hooks(model):
                raise InterventionError(
                    f"{location} was not recorded, and the hooks on the model are not those of the run; ask for it: "
                    f"run(model, inputs, at=[{location!r}])."
                )
            if set(scopes) - set(acting()):
                raise InterventionError(
                    f"{location} was not recorded, and the run was made inside a block of interventions that is "
                    f"closed; ask for it there: run(model, inputs, at=[{location!r}])."
                )
            early = recording is not None and recording.runs_once(place)
            with under(scopes):
                state = read(model, inputs, {whole: found.place(whole)}, early=early)[whole]
        return store(part_of(state, location, place))

    return fetch


def read_source(model: nn.Module, given: Inputs | Run, places: dict[Location, Place]) -> dict[Location, Source]:
    """Return the activations of a source at the places: of a Run, or of a new run on inputs."""
    if isinstance(given, Run):
        return sources_of_run(given, model, places)
    check_inputs(given)
    with check_source_inputs(given, model):
        return sources_in(read(model, given, places), arguments_of(model, given), places)


def tap_of(write: Write, function: Callable[[Tensor, CallContext], Tensor | None]) -> Tap:
    """Return a tap at the place of a write."""
    return Tap.at(write.place, function)


def shift_tap(tap: Tap, place: Place, replay: Replay) -> Tap:
    """Return the tap for a resumed run, whose turn does not count the calls of its block that are skipped."""
    if tap.turn is None or place.module is place.block:
        return tap
    return replace(tap, turn=tap.turn - replay.blocks_called.count(place.block))


def resume_write(write: Write) -> Callable[[Tensor, CallContext], Tensor | None]:
    """Return a write for a resumed run, whose operator draws the numbers that it draws where every block runs."""

    def write_drawing(state: Tensor, context: CallContext) -> Tensor | None:
        assert isinstance(context, Scope)
        with drawing_outside(context):
            return write(state, context)

    return write_drawing


def recording_of(base: Run) -> Recording | None:
    """Return the recording of a base run; raise InterventionError if the model has changed since."""
    base.check_fresh()
    return base.recording


def check_complete(model: nn.Module, inputs: Inputs) -> None:
    """Raise InterventionError for outputs that are incomplete where blocks are skipped."""
    given = arguments_of(model, inputs)
    config = getattr(model, "config", None)
    if given.get("output_attentions", getattr(config, "output_attentions", False)):
        raise InterventionError("output_attentions=True is incomplete where blocks are skipped; pass resume=False.")
    if given.get("use_cache"):
        raise InterventionError("use_cache=True leaves the cache of skipped blocks empty; pass resume=False.")
