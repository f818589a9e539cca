"""Turn the arguments of a user into writes: an operator at a place, its tokens, and the source it takes from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from inspect import signature
from itertools import repeat
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from interventions.errors import InterventionError
from interventions.execution.measures import Change
from interventions.execution.origins import Origin, Stored
from interventions.execution.run import Activations, Inputs, Run, locations_of
from interventions.execution.writes import Source, Write, check_sources
from interventions.locations import Location, as_location
from interventions.models.architectures import Architecture
from interventions.models.calls import arguments_of, signature_of
from interventions.models.places import Place
from interventions.models.wrappers import Model
from interventions.names import printed
from interventions.operators import Operator, Swap
from interventions.positions import Positions
from interventions.steps import steps_text


@dataclass(eq=False, repr=False)
class Handle:
    """A report on an open `intervene` block: how often each location was written, and how much it changed.

    Attributes:
        writes: the writes of the block.
        is_elsewhere: returns whether all runs in the block were made on another machine. There an intervention that
            never ran raises, and nothing is counted here.
    """

    writes: tuple[Write, ...]
    is_elsewhere: Callable[[], bool] = lambda: False

    @property
    def firings(self) -> dict[Location, int]:
        """The number of times that each location was written.

        Raises:
            InterventionError: the runs were made on another machine.
        """
        self._check_here()
        return {write.location: write.firings for write in self.writes}

    @property
    def change(self) -> dict[Location, float]:
        """The root mean square of the change at each location, divided by that of the activation before it.

        Raises:
            InterventionError: the runs were made on another machine.
        """
        self._check_here()
        return {write.location: _share(write) for write in self.writes}

    def _check_here(self) -> None:
        if self.is_elsewhere():
            raise InterventionError(
                "what this block did was done on another machine, which raises where nothing is written, and counts "
                "nothing here; for counts open a trace on this machine: with model.trace(…)."
            )

    @printed
    def __repr__(self) -> str:
        if self.is_elsewhere():
            return f"Handle({', '.join(str(write.location) for write in self.writes)}: written on another machine)"
        done = (f"{write.location}: written {write.firings} times, change {_share(write):.3g}" for write in self.writes)
        return f"Handle({'; '.join(done)})"


def measured(writes: Sequence[Write]) -> tuple[Write, ...]:
    """Return writes that measure what they change, for a Handle to tell."""
    for write in writes:
        write.change = Change()
    return tuple(writes)


def _share(write: Write) -> float:
    """Return the share of an activation that a write changed; 0 if it did not measure it."""
    return 0.0 if write.change is None else write.change.share


def pairs_of(at: Any, op: Operator | None, source: object, fields: dict) -> dict[Location, Operator]:
    """Return the operator of each location, from `at` or from the fields of one location.

    Raises:
        InterventionError: no place, no operator, or either of them given twice.
    """
    if (at is None) == (not fields):
        raise InterventionError(
            "give one place: intervene(model, Location(3), op=Zero()) or intervene(model, layer=3, op=Zero())"
            + ("." if at is None else f"; both at={at!r} and {fields} were given.")
        )
    if isinstance(at, Mapping):
        if op is not None:
            raise InterventionError(f"op={op!r} and {{location: operator}} were both given; leave op out.")
        return _check_pairs({as_location(place): operator for place, operator in at.items()})
    if op is None and source is None:
        raise InterventionError("no operator was given; write op=Zero(), or source=… to swap.")
    locations = [_from_fields(fields)] if at is None else locations_of(at)
    return _check_pairs(dict.fromkeys(locations, Swap() if op is None else op))


def _from_fields(fields: dict) -> Location:
    """Return the location with these fields."""
    try:
        return Location(**fields)
    except TypeError as error:
        raise InterventionError(
            f"{error}; the keywords of a location are layer, site, heads, dims, subspace, stack, module, io and "
            "operation."
        ) from error


def _check_pairs(pairs: dict[Location, Operator]) -> dict[Location, Operator]:
    """Return the pairs; raise InterventionError where there are none, or an operator cannot be called."""
    if not pairs:
        raise InterventionError("no location was given; write at=Location(3).")
    before = None
    for location, operator in pairs.items():
        if operator is before and before is not None:  # most often one for all
            continue
        before = operator
        if not callable(operator) or isinstance(operator, type):
            raise InterventionError(
                f"{operator!r} at {location} is not an operator; write Swap(), Zero(), or a function (base, source, "
                "generator)."
            )
        _check_signature(operator, location)
    return pairs


def _check_signature(operator: Operator, location: Location) -> None:
    """Raise InterventionError for an operator that does not take base, source and generator."""
    method: Any = type(operator).__call__
    if isinstance(method, FunctionType) and _fits(method):
        return
    try:
        takes = signature_of(MethodType(method, operator)) if isinstance(method, FunctionType) else signature(operator)
    except (TypeError, ValueError):
        return  # built-in functions need not have a signature
    try:
        takes.bind(None, None, None)
    except TypeError:
        raise InterventionError(
            f"the operator at {location} takes {takes} and is called with (base, source, generator); write e.g. "
            "lambda base, source, generator: -base."
        ) from None


@lru_cache(maxsize=256)
def _fits(method: FunctionType) -> bool:
    """Return whether a method without a signature of its own takes base, source and generator."""
    try:
        signature(method).bind(None, None, None, None)
    except (TypeError, ValueError):
        return False
    return not vars(method)


Listen = Callable[[Inputs | Run, dict[Location, Place]], dict[Location, Source]]
"""From inputs or a Run and the places to read to the activations of the run there."""


def writes_of(
    found: Architecture,
    pairs: dict[Location, Operator],
    source: object,
    where: tuple[object, object, slice | frozenset[int] | None],
    generator: torch.Generator | None,
    *,
    listen: Listen,
    origin: Origin | None = None,
) -> list[Write]:
    """Return the writes at the locations of `pairs`.

    Args:
        found: the model that is written.
        pairs: the operator of each location.
        source: the sources that the user gives.
        where: positions, source positions and steps.
        generator: the generator of the operators.
        listen: reads the sources, in the model of `origin` if there is one.
        origin: where sources are read; None is where they are written.
    """
    positions, source_positions, steps = where
    places = {location: found.place(location) for location in pairs}
    chosen: Iterable[tuple[Any, Any]] = repeat((positions, source_positions), len(pairs))
    if isinstance(positions, Mapping) or isinstance(source_positions, Mapping):
        chosen = zip(_positions_of(positions, pairs), _positions_of(source_positions, pairs), strict=True)
    sources = _sources(pairs, places, source, listen, origin)
    return [
        Write(at, places[at], op, positions, sources.get(at), source_positions, generator, steps)
        for (at, op), (positions, source_positions) in zip(pairs.items(), chosen, strict=True)
    ]


def _positions_of(choice: Any, pairs: Mapping[Location, Operator]) -> list[Positions]:
    """Return the positions of each location, from {Location: positions} or one choice for all."""
    if not isinstance(choice, Mapping):
        return [choice] * len(pairs)
    if not choice:
        raise InterventionError("positions={} names no location; write {Location(3): positions}, or leave it out.")
    named = {as_location(place): positions for place, positions in choice.items()}
    unused = [location for location in named if location not in pairs]
    if unused:
        raise InterventionError(f"positions for {unused[0]} were given and nothing is written there; add it to at.")
    return [named.get(location) for location in pairs]


def _sources(
    pairs: dict[Location, Operator], places: dict[Location, Place], source: Any, listen: Listen, origin: Origin | None
) -> dict[Location, Source]:
    """Return the activations that the operators take from, with one forward for each distinct source."""
    # An operator that does not say whether it needs a source takes one that is given.
    if not _is_by_location(source):
        needing = [at for at, op in pairs.items() if getattr(op, "needs_source", source is not None)]
        _check_sources(source, needing, needing if source is None else [], pairs)
        sharing = places if len(needing) == len(places) else {at: places[at] for at in needing}
        return _read_source(source, sharing, listen, origin) if sharing else {}
    given_at = {as_location(place): value for place, value in source.items()}
    needing = [at for at, op in pairs.items() if getattr(op, "needs_source", given_at.get(at) is not None)]
    _check_sources(source, needing, [at for at in needing if given_at.get(at) is None], pairs)
    unused = [location for location in given_at if location not in pairs]
    if unused:
        raise InterventionError(f"a source for {unused[0]} was given and nothing is written there; add it to at.")
    result: dict[Location, Source] = {}
    for given in {id(given_at[location]): given_at[location] for location in needing}.values():
        sharing = {at: places[at] for at in needing if given_at[at] is given}
        result |= _read_source(given, sharing, listen, origin)
    return result


def _check_sources(
    source: object, needing: Sequence[Location], absent: Sequence[Location], pairs: Mapping[Location, Operator]
) -> None:
    """Raise InterventionError where a source is absent, or given and of no use."""
    if absent:
        raise InterventionError(
            f"{type(pairs[absent[0]]).__name__} at {absent[0]} takes from a source and none was given; pass "
            "source=inputs or a Run."
        )
    if source is not None and not needing:
        names = ", ".join(dict.fromkeys(type(op).__name__ for op in pairs.values()))
        raise InterventionError(f"a source was given and {names} takes none; leave it out: source=None.")


def _read_source(
    given: Any, places: dict[Location, Place], listen: Listen, origin: Origin | None
) -> dict[Location, Source]:
    """Return the activations of one source for each of the written locations."""
    reads = {at: at if origin is None else origin.location(at) for at in places}
    there = places if origin is None else {at: origin.place(at) for at in places}
    wanted = {read.whole: there[at] for at, read in reads.items()}
    held = given.held(wanted) if isinstance(given, Stored) else listen(given, wanted)
    if origin is None:
        return {at: held[read.whole] for at, read in reads.items()}
    return {at: replace(held[read.whole], location=read, place=there[at]) for at, read in reads.items()}


def _is_by_location(source: object) -> bool:
    """Return whether sources are given as {location: source}."""
    return isinstance(source, Mapping) and any(isinstance(key, Location) for key in source)


def sources_of_run(given: Run, model: Model, places: Mapping[Location, Place]) -> dict[Location, Source]:
    """Return the activations of a run of `model` at the places, as sources.

    Raises:
        InterventionError: a run of another model, or older than its weights.
    """
    if given.model is not model:
        raise InterventionError(
            f"the source is a run of another model ({type(given.model).__name__}); run it on this one: run(model, "
            "inputs), or say that activations are taken from that one: source_model=other."
        )
    given.check_fresh()
    return sources_in(given.activations, arguments_of(model, given.inputs), places)


def sources_in(
    states: Mapping, arguments: Mapping[str, object], places: Mapping[Location, Place]
) -> dict[Location, Source]:
    """Return activations at the places as sources, with the padding mask among the arguments of their run."""
    result = {}
    for location, place in places.items():
        mask = arguments.get(place.side.mask)
        kept = states.calls(location) if isinstance(states, Activations) else [states[location]]
        result[location] = Source(list(kept), mask if isinstance(mask, Tensor) else None)
    return result


def check_fired(writes: Sequence[Write], where: str) -> None:
    """Raise InterventionError for a write that never ran, never found a token, or took NaN on another device."""
    check_sources(writes)
    for write in writes:
        if write.firings == 0 and write.calls:
            raise InterventionError(
                f"{write.location} ran {write.calls} time{'s' * (write.calls > 1)} and nothing was written there: no "
                f"call read the tokens of steps={steps_text(write.steps)} and positions={write.positions!r}; generate "
                "as far as that, or name others."
            )
        if write.firings == 0:
            raise InterventionError(f"{write.location} never ran inside {where}; describe(model) lists what runs.")
