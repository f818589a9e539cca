"""Runs with some of their internals replaced: around ordinary calls, or as the counterfactual of two runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from interventions.architectures import Architecture, Place, architecture
from interventions.calls import arguments_of, call, signature_of
from interventions.errors import InterventionError
from interventions.hooks import Scope, Tap, acting, opened
from interventions.locations import Location, as_location
from interventions.operators import Operator, Swap
from interventions.positions import Positions
from interventions.recordings import Recording, Replay, drawing
from interventions.runs import (
    Activations,
    Inputs,
    Run,
    Where,
    check_inputs,
    check_ran,
    fetcher,
    locations_of,
    read,
    reading,
    recorded,
    without_cache,
    without_past,
)
from interventions.steps import Steps, parse_steps, steps_text
from interventions.writes import Source, Write


@dataclass(eq=False, repr=False)
class Handle:
    """What an open `intervene` block did so far."""

    writes: tuple[Write, ...]

    @property
    def firings(self) -> dict[Location, int]:
        """How often each location was written."""
        return {write.location: write.firings for write in self.writes}

    @property
    def change(self) -> dict[Location, float]:
        """Root mean square of what was changed at each location, relative to that of what was there."""
        return {write.location: write.change for write in self.writes}

    def __repr__(self) -> str:
        done = (f"{write.location}: written {write.firings} times, change {write.change:.3g}" for write in self.writes)
        return f"Handle({'; '.join(done)})"


@contextmanager
def intervene(
    model: nn.Module,
    at: Where | None = None,
    *,
    op: Operator | None = None,
    source: Inputs | Run | Mapping[Location, Inputs | Run] | None = None,
    positions: Positions | Mapping[Location, Positions] = None,
    source_positions: Positions | Mapping[Location, Positions] = None,
    steps: Steps | object = None,
    generator: torch.Generator | None = None,
    **location: object,
) -> Iterator[Handle]:
    """Replace internals of `model` in every ordinary call inside the block: `model(...)`, a pipeline, a Trainer.

    Args:
        at: a Location, or {Location: operator}; or give the fields of one location as keywords: `layer=3`.
        op: the operator, where `at` does not hold it. `Swap()` if a source is given.
        source: inputs or a Run that operators such as Swap take from, or {Location: inputs or Run}.
        positions: which tokens to write, counted over real tokens (see `interventions.positions`); None is all of
            them. Or {Location: positions}.
        source_positions: which tokens of the source to take, as many; None is those of `positions`.
        steps: which steps of a generation: 0 is the prompt, k the k-th generated token; a number, several, or a slice.
            None is all of them. Positions then count over the sequence so far: −1 is each new token.
        generator: for operators that draw; None is torch's default generator, as dropout uses.

    Yields:
        A handle that counts firings and the size of the change.

    Raises:
        InterventionError: a place that does not exist, never ran, or does not fit its source.

    Blocks nest: of two that write one place, the outer one writes first.
    """
    found = architecture(model)
    pairs, where = _pairs(at, op, source, location), (positions, source_positions, parse_steps(steps))
    writes = _writes(found, pairs, source, where, generator)
    scope = Scope(model, [_tap(write, write) for write in writes], generator=generator)
    with opened(scope):
        yield Handle(tuple(writes))
    _check_fired(writes, "this intervene block; call the model inside the block")


def interchange(
    model: nn.Module,
    base: Inputs | Run,
    source: Inputs | Run | Mapping[Location, Inputs | Run] | None,
    at: Where,
    *,
    op: Operator | None = None,
    positions: Positions | Mapping[Location, Positions] = None,
    source_positions: Positions | Mapping[Location, Positions] = None,
    generator: torch.Generator | None = None,
    record: Where = (),
    resume: bool = True,
) -> Run:
    """The counterfactual run: `model` on the base, with the activations `at` the locations taken from the source.

    Args:
        base: inputs, or a Run, from which the counterfactual then resumes at the first location written: blocks before
            it return what the base run recorded.
        source: inputs, a Run, or {Location: inputs or Run}; None for operators that need none. One forward for
            each distinct source, which stops after the last location read.
        at: a Location, several, or {Location: operator}.
        op: the operator, `Swap()` by default.
        positions, source_positions, generator: as in `intervene`.
        record: locations to keep of the counterfactual run, after the writes.
        resume: False runs every block again. So does a base run that cannot be taken up: made under other hooks or
            other open blocks, or changed in place since.

    Raises:
        InterventionError: as `intervene`; or a base run older than the model's weights.

    Source: Geiger et al. 2021 (arXiv:2106.02997), section 2.
    """
    found = architecture(model)
    writes = _writes(found, _pairs(at, op, source, {}), source, (positions, source_positions, None), generator)
    recording = None
    if isinstance(base, Run):
        _check_base(base, model)
        recording = _resumable(base) if resume else None
    inputs = base.inputs if isinstance(base, Run) else base
    check_inputs(inputs)
    kept = locations_of(record)
    activations, reads = reading(found, kept)
    count = 0 if recording is None else recording.reusable([w.place for w in writes], [found.place(at) for at in kept])
    replay = Replay(recording, count) if recording is not None and count else None
    taps = [_tap(write, write if replay is None else _drawing(write)) for write in writes]
    if replay is not None:
        places = [*(write.place for write in writes), *(found.place(at) for at in kept)]
        shifted = [_shifted(tap, place, replay) for tap, place in zip([*taps, *reads], places, strict=True)]
        taps, reads = shifted[: len(taps)], shifted[len(taps) :]
    again = Recording.begin(found) if found.stacks else None
    scope = recorded(model, [*taps, *reads], again)
    scope.generator, scope.stores = generator, bool(arguments_of(model, inputs).get("use_cache"))
    inputs = without_cache(found, inputs)
    with ExitStack() as stack:
        if replay is not None:
            _check_complete(model, inputs)
            scope.replay, scope.replayed = replay, replay.blocks
            stack.enter_context(replay.surrounding(scope))
        stack.enter_context(opened(scope))
        output = call(model, inputs)
    _check_fired(writes, "the counterfactual run")
    check_ran(activations, "the counterfactual run")
    activations._fetch = fetcher(model, inputs, again, is_counterfactual=True)
    output = output if scope.stores else without_past(output)
    return Run(model, inputs, output, activations, again, is_counterfactual=True)


def _pairs(at: Any, op: Operator | None, source: object, fields: dict) -> dict[Location, Operator]:
    if (at is None) == (not fields):
        raise InterventionError(
            "give one place: intervene(model, Location(3), op=Zero()) or intervene(model, layer=3, op=Zero())"
            + ("." if at is None else f"; both at={at!r} and {fields} were given.")
        )
    if isinstance(at, Mapping):
        if op is not None:
            raise InterventionError(f"op={op!r} and {{location: operator}} were both given; leave op out.")
        return _checked({as_location(place): operator for place, operator in at.items()})
    if op is None and source is None:
        raise InterventionError("no operator was given; write op=Zero(), or source=… to swap.")
    locations = [_from_fields(fields)] if at is None else locations_of(at)
    return _checked(dict.fromkeys(locations, Swap() if op is None else op))


def _from_fields(fields: dict) -> Location:
    try:
        return Location(**fields)
    except TypeError as error:
        raise InterventionError(
            f"{error}; the keywords of a location are layer, site, heads, dims, subspace, stack, module and io."
        ) from error


def _checked(pairs: dict[Location, Operator]) -> dict[Location, Operator]:
    if not pairs:
        raise InterventionError("no location was given; write at=Location(3).")
    for location, operator in pairs.items():
        if not callable(operator) or isinstance(operator, type):
            raise InterventionError(
                f"{operator!r} at {location} is not an operator; write Swap(), Zero(), or a function (base, source, "
                "generator)."
            )
        _check_signature(operator, location)
    return pairs


def _check_signature(operator: Operator, location: Location) -> None:
    try:
        method: Any = type(operator).__call__
        takes = signature_of(MethodType(method, operator)) if isinstance(method, FunctionType) else signature(operator)
    except (TypeError, ValueError):
        return  # built-in functions need not tell
    try:
        takes.bind(None, None, None)
    except TypeError:
        raise InterventionError(
            f"the operator at {location} takes {takes} and is called with (base, source, generator); write e.g. "
            "lambda base, source, generator: -base."
        ) from None


def _writes(
    found: Architecture,
    pairs: dict[Location, Operator],
    source: object,
    where: tuple[object, object, slice | frozenset[int] | None],
    generator: torch.Generator | None,
) -> list[Write]:
    """The writes at the locations of `pairs`; `where` holds positions, source positions and steps."""
    positions, source_positions, steps = where
    places = {location: found.place(location) for location in pairs}
    chosen, source_chosen = _of(positions, pairs), _of(source_positions, pairs)
    sources = _sources(found, pairs, places, source)
    return [
        Write(at, places[at], op, chosen[at], sources.get(at), source_chosen[at], generator, steps)
        for at, op in pairs.items()
    ]


def _of(choice: Any, pairs: Mapping[Location, Operator]) -> dict[Location, Positions]:
    """The positions of each location, from {Location: positions} or one choice for all."""
    if not isinstance(choice, Mapping):
        return dict.fromkeys(pairs, choice)
    named = {as_location(place): positions for place, positions in choice.items()}
    unused = [location for location in named if location not in pairs]
    if unused:
        raise InterventionError(f"positions for {unused[0]} were given and nothing is written there; add it to at.")
    return {location: named.get(location) for location in pairs}


def _sources(
    found: Architecture, pairs: dict[Location, Operator], places: dict[Location, Place], source: Any
) -> dict[Location, Source]:
    """The states that the operators take from, one forward for each distinct source."""
    by_location = source if _is_by_location(source) else dict.fromkeys(pairs, source)
    by_location = {as_location(place): value for place, value in by_location.items()}
    # An operator that does not say whether it needs a source takes one that is given.
    needing = [at for at, op in pairs.items() if getattr(op, "needs_source", by_location.get(at) is not None)]
    absent = [location for location in needing if by_location.get(location) is None]
    if absent:
        raise InterventionError(
            f"{type(pairs[absent[0]]).__name__} at {absent[0]} takes from a source and none was given; pass "
            "source=inputs or a Run."
        )
    unused = [location for location in by_location if location not in pairs]
    if unused:
        raise InterventionError(f"a source for {unused[0]} was given and nothing is written there; add it to at.")
    if source is not None and not needing:
        names = ", ".join(dict.fromkeys(type(op).__name__ for op in pairs.values()))
        raise InterventionError(f"a source was given and {names} takes none; leave it out: source=None.")
    result: dict[Location, Source] = {}
    for given in {id(by_location[location]): by_location[location] for location in needing}.values():
        mine = [location for location in needing if by_location[location] is given]
        wholes = {location: location.whole for location in mine}
        if isinstance(given, Run):
            _check_same_model(given, found.model)
            states, inputs = given.activations, given.inputs
        else:
            check_inputs(given)
            states, inputs = read(found.model, given, list(dict.fromkeys(wholes.values()))), given
        arguments = arguments_of(found.model, inputs)
        for location in mine:
            mask = arguments.get(places[location].mask)
            held = states.calls(wholes[location]) if isinstance(states, Activations) else [states[wholes[location]]]
            result[location] = Source(tuple(held), mask if isinstance(mask, Tensor) else None)
    return result


def _is_by_location(source: object) -> bool:
    return isinstance(source, Mapping) and any(isinstance(key, Location) for key in source)


def _tap(write: Write, function: Callable[[Tensor, Scope], Tensor | None]) -> Tap:
    place = write.place
    return Tap(place.module, place.io, function, place.heads, place.kind, turn=place.turn, unflattens=place.unflattens)


def _shifted(tap: Tap, place: Place, replay: Replay) -> Tap:
    """The same tap where the first calls of its block do not run: inside, they are not there to be counted."""
    if tap.turn is None or place.module is place.block:
        return tap
    return replace(tap, turn=tap.turn - replay.blocks_called.count(place.block))


def _drawing(write: Write) -> Callable[[Tensor, Scope], Tensor | None]:
    def written(state: Tensor, scope: Scope) -> Tensor | None:
        with drawing(scope):
            return write(state, scope)

    return written


def _resumable(base: Run) -> Recording | None:
    base.check_fresh()
    return base.recording


def _check_base(base: Run, model: nn.Module) -> None:
    """Raise for a run whose inputs alone do not say what it was."""
    if base.model is not model:
        raise InterventionError(
            f"the base is a run of another model ({type(base.model).__name__}); run it on this one: run(model, inputs)."
        )
    if base.is_counterfactual:
        raise InterventionError(
            "the base is itself a counterfactual run; pass its base and all locations in one call: "
            "at={location: operator}, source={location: source}; or base.inputs inside a `with intervene(...)` block."
        )
    if base.recording is not None and set(base.recording.scopes) - set(acting()):
        raise InterventionError(
            "the base is a run made inside a block of interventions that is closed, so it cannot be run again; open "
            "the block around this call too, and make the base inside it."
        )


def _check_same_model(given: Run, model: nn.Module) -> None:
    if given.model is not model:
        raise InterventionError(
            f"the source is a run of another model ({type(given.model).__name__}); run it on this one: run(model, "
            "inputs)."
        )
    given.check_fresh()


def _check_fired(writes: list[Write], where: str) -> None:
    for write in writes:
        if write.firings == 0 and write.calls:
            raise InterventionError(
                f"{write.location} ran {write.calls} time{'s' * (write.calls > 1)} and nothing was written there: no "
                f"call read the tokens of steps={steps_text(write.steps)} and positions={write.positions!r}; generate "
                "as far as that, or name others."
            )
        if write.firings == 0:
            raise InterventionError(f"{write.location} never ran inside {where}; describe(model) lists what runs.")


def _check_complete(model: nn.Module, inputs: Inputs) -> None:
    """Raise for outputs that skipped blocks leave incomplete."""
    given = arguments_of(model, inputs)
    config = getattr(model, "config", None)
    if given.get("output_attentions", getattr(config, "output_attentions", False)):
        raise InterventionError("output_attentions=True is incomplete where blocks are skipped; pass resume=False.")
    if given.get("use_cache"):
        raise InterventionError("use_cache=True leaves the cache of skipped blocks empty; pass resume=False.")
