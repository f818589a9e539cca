"""Runs of a model: with its activations kept, with some of them replaced, or both."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from interventions.architectures import Architecture, Place, architecture
from interventions.axes import axes_of, to_vectors
from interventions.errors import InterventionError
from interventions.hooks import Scope, Stopped, Tap, arguments_of, call, opened, until_stopped
from interventions.locations import Location, as_location
from interventions.operators import Operator, Swap
from interventions.positions import Positions
from interventions.recordings import Recording, Replay, detached, drawing, stamp
from interventions.writes import Source, Write, part_of

Inputs = (
    object  # a mapping (keywords), a tuple or list (positional arguments) or one tensor: what the model is called with
)
Fetch = Callable[[Location], Tensor]
Where = Location | str | Iterable[Location | str] | Mapping[Location | str, object]


class Activations(Mapping):
    """Location → activation, for the places that were asked for and, fetched on demand, for others of the same run."""

    def __init__(self, locations: Iterable[Location], fetch: Fetch | None = None) -> None:
        self._fetch = fetch
        self._states: dict[Location, list[Tensor]] = {location: [] for location in locations}

    def __getitem__(self, location: Location | str) -> Tensor:
        location = as_location(location)
        if location not in self._states:
            if self._fetch is None:
                raise InterventionError(f"{location} was not recorded; ask for it: record(model, [{location!r}]).")
            self._states[location] = [self._fetch(location)]
        states = self._states[location]
        if len(states) != 1:
            raise InterventionError(
                f"{location} ran {len(states)} times, so there is no one activation; take "
                f"activations.calls({location!r}), a list in the order of the calls."
            )
        return states[0]

    def __contains__(self, location: object) -> bool:
        return location in self._states  # Mapping's own would fetch

    def __iter__(self) -> Iterator[Location]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    def calls(self, location: Location | str) -> list[Tensor]:
        """Every activation at `location`, in the order of the calls."""
        return list(self._states[as_location(location)])

    def __repr__(self) -> str:
        shapes = (f"{key}: {[list(state.shape) for state in states]}" for key, states in self._states.items())
        return f"Activations({', '.join(shapes)})"


@dataclass(eq=False)
class Run:
    """One run of a model.

    Attributes:
        inputs: what the model was called with.
        output: what it returned.
        activations: Location → activation. One that was not asked for is fetched: from what the blocks returned if the
            run kept that, else by running again.
    """

    model: nn.Module
    inputs: Inputs
    output: object
    activations: Mapping[Location, Tensor] = field(repr=False)
    recording: Recording | None = field(default=None, repr=False)
    is_counterfactual: bool = False
    _stamp: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        self._stamp = self._stamp or stamp(self.model)

    def check_fresh(self) -> None:
        """Raise if the weights or the mode of the model changed since the run."""
        if self._stamp != stamp(self.model):
            raise InterventionError(
                "the run is older than the model: its weights or its train/eval mode changed since; run it again: "
                "run(model, inputs)."
            )

    @property
    def logits(self) -> Tensor:
        """`output.logits`, or the output itself where it is a tensor."""
        if isinstance(self.output, Tensor):
            return self.output
        logits = self.output.get("logits") if isinstance(self.output, Mapping) else getattr(self.output, "logits", None)
        if logits is None:
            raise InterventionError(
                f"the output ({type(self.output).__name__}) has no logits; use run.output, or a model with a head."
            )
        return logits

    def vectors(self, location: Location | str) -> Tensor:
        """The activation as `[batch, position, dims]`, or `[batch, dims]` where there are no positions."""
        location = as_location(location)
        state = self.activations[location]
        return to_vectors(state, axes_of(architecture(self.model).place(location).module, state))

    def __repr__(self) -> str:
        kind = ", counterfactual" if self.is_counterfactual else ""
        return f"Run({type(self.model).__name__}, {type(self.output).__name__}{kind}, {self.activations!r})"

    def take(self, rows: Tensor) -> "Run":
        """The same run for the examples `rows` `[k]`, in that order, e.g. as the source of a shuffled batch."""
        found = architecture(self.model)

        def of_rows(location: Location, state: Tensor) -> Tensor:
            axes = axes_of(found.place(location).module, state)
            return state.index_select(axes.split().index("b"), rows.to(state.device))

        taken, output = _Taken(self.activations, of_rows), _rows(_without_past(self.output), rows)
        return replace(self, inputs=_rows(self.inputs, rows), output=output, activations=taken, recording=None)

    def detach(self) -> "Run":
        """The same run, cut off from the graph."""
        cut = _Taken(self.activations, lambda location, state: state.detach())
        recording = None if self.recording is None else self.recording.detach()
        return replace(self, output=detached(self.output), activations=cut, recording=recording)


class _Taken(Activations):
    """The activations of another run, each put through a function of location and state when it is asked for."""

    def __init__(self, whole: Mapping[Location, Tensor], change: Callable[[Location, Tensor], Tensor]) -> None:
        super().__init__((), lambda location: change(location, whole[location]))


@dataclass(eq=False)
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


def run(
    model: nn.Module,
    inputs: Inputs,
    at: Where = (),
    *,
    resumable: bool = True,
    detach: bool = False,
    device: torch.device | str | None = None,
) -> Run:
    """Run `model` on `inputs`, unmodified, and keep its activations `at` the locations.

    Args:
        inputs: a mapping (keywords), a tuple (positional arguments) or a tensor.
        at: locations to keep. Others are fetched when they are asked for.
        resumable: also keep what every block returns (references, no copies), so that interchanges can resume from
            there and block outputs need no second run.
        detach: cut the kept activations off from the graph.
        device: where to store the kept activations; None is where they are.

    Raises:
        InterventionError: a location that does not exist, or never ran.
    """
    _check_inputs(inputs)
    found = architecture(model)
    recording = Recording.begin(found) if resumable and found.stacks else None
    activations, taps = _reading(found, _locations(at), detach, device)
    scope = _recorded(model, taps, recording)
    with opened(scope):
        output = call(model, inputs)
    if recording is not None:
        recording.close()
    _check_ran(activations, "this run")
    done = Run(model, inputs, output, activations, recording)
    activations._fetch = _fetcher(done, found, detach, device)
    return done


def run_to(model: nn.Module, inputs: Inputs, at: Where) -> Run:
    """A run that stops after the last of the locations `at`: a source for interchanges. Its output is None.

    Raises:
        InterventionError: as `run`.
    """
    _check_inputs(inputs)
    return Run(model, inputs, None, _read(model, inputs, _locations(at)))


@contextmanager
def record(
    model: nn.Module, at: Where, *, detach: bool = False, device: torch.device | str | None = None
) -> Iterator[Activations]:
    """Keep the activations `at` the locations of the ordinary calls inside the block.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    >>> with record(net, Location(module="0")) as activations:
    ...     _ = net(torch.zeros(4, 2))
    >>> activations[Location(module="0")].shape
    torch.Size([4, 3])
    """
    activations, taps = _reading(architecture(model), _locations(at), detach, device)
    with opened(Scope(model, taps)):
        yield activations
    _check_ran(activations, "this record block")


@contextmanager
def intervene(
    model: nn.Module,
    at: Where | None = None,
    *,
    op: Operator | None = None,
    source: Inputs | Run | Mapping[Location, Inputs | Run] | None = None,
    positions: Positions | Mapping[Location, Positions] = None,
    source_positions: Positions | Mapping[Location, Positions] = None,
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
        generator: for operators that draw; None is torch's default generator, as dropout uses.

    Yields:
        A handle that counts firings and the size of the change.

    Raises:
        InterventionError: a place that does not exist, never ran, or does not fit its source.

    Blocks nest: of two that write one place, the outer one writes first.
    """
    found = architecture(model)
    where = dict(positions=positions, source_positions=source_positions)
    writes = _writes(found, _pairs(at, op, source, location), source, **where, generator=generator)
    scope = Scope(model, [Tap(w.place.module, w.place.io, w) for w in writes], generator=generator)
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
        resume: False runs every block again.

    Raises:
        InterventionError: as `intervene`; or a base run older than the model's weights.

    Source: Geiger et al. 2021 (arXiv:2106.02997), section 2.
    """
    found = architecture(model)
    where = dict(positions=positions, source_positions=source_positions)
    writes = _writes(found, _pairs(at, op, source, {}), source, **where, generator=generator)
    recording = _resumable(base) if resume else None
    inputs = base.inputs if isinstance(base, Run) else base
    _check_inputs(inputs)
    kept = _locations(record)
    activations, reads = _reading(found, kept, False, None)
    count = 0 if recording is None else recording.reusable([w.place for w in writes], [found.place(at) for at in kept])
    replay = Replay(recording, count) if recording is not None and count else None
    taps = [Tap(w.place.module, w.place.io, w if replay is None else _drawing(w)) for w in writes]
    again = Recording.begin(found) if found.stacks else None
    scope = _recorded(model, [*taps, *reads], again)
    scope.generator = generator
    with ExitStack() as stack:
        if replay is not None:
            inputs = _without_cache(model, inputs)
            scope.replay, scope.replayed = replay, replay.blocks
            stack.enter_context(replay.surrounding(scope))
        stack.enter_context(opened(scope))
        output = call(model, inputs)
    _check_fired(writes, "the counterfactual run")
    _check_ran(activations, "the counterfactual run")
    done = Run(model, inputs, _without_past(output) if replay else output, activations, again, is_counterfactual=True)
    activations._fetch = _fetcher(done, found, False, None)
    return done


# --- reading ----------------------------------------------------------------------------------------------------------


def _reading(
    found: Architecture, locations: list[Location], detach: bool, device: torch.device | str | None
) -> tuple[Activations, list[Tap]]:
    activations = Activations(locations)

    def read(location: Location, place: Place) -> Tap:
        def keep(state: Tensor, scope: Scope) -> None:
            if not scope.recomputing:
                # A copy: what follows may go on in place.
                part = part_of(state, location, place).clone()
                part = part.detach() if detach else part
                activations._states[location].append(part if device is None else part.to(device))

        return Tap(place.module, place.io, keep)

    return activations, [read(location, found.place(location)) for location in locations]


def _recorded(model: nn.Module, taps: list[Tap], recording: Recording | None) -> Scope:
    if recording is None:
        return Scope(model, taps)
    # The writes come first: what a block is recorded to return is what the next one is given.
    return Scope(model, [*taps, *recording.taps()], watched=recording.found.blocks, raw_outputs=recording.raw_output)


def _read(model: nn.Module, inputs: Inputs, locations: list[Location], *, early: bool = True) -> Activations:
    """The activations of a run that stops after the last of them, or does not because some may run again."""
    activations, taps = _reading(architecture(model), locations, False, None)
    missing = set(locations)

    def stopping(location: Location, tap: Tap) -> Tap:
        def keep(state: Tensor, scope: Scope) -> None:
            tap.function(state, scope)
            missing.discard(location)
            if early and not missing:
                raise Stopped

        return Tap(tap.module, tap.io, keep)

    scope = Scope(model, [stopping(location, tap) for location, tap in zip(locations, taps, strict=True)])
    with until_stopped(), opened(scope):
        call(model, inputs)
    _check_ran(activations, "the source run")
    return activations


def _fetcher(done: Run, found: Architecture, detach: bool, device: torch.device | str | None) -> Fetch:
    def fetch(location: Location) -> Tensor:
        place = found.place(location)
        whole = replace(location, dims=None)
        state = done.recording.state(place) if done.recording is not None else None
        if state is None and whole in done.activations and location.dims is not None:
            state = done.activations[whole]
        if state is None:
            _check_repeatable(done, location)
            early = done.recording is not None and done.recording.runs_once(place)
            state = _read(done.model, done.inputs, [whole], early=early)[whole]
        state = part_of(state, location, place)
        state = state.detach() if detach else state
        return state if device is None else state.to(device)

    return fetch


def _check_repeatable(done: Run, location: Location) -> None:
    if done.is_counterfactual:
        raise InterventionError(
            f"{location} was not recorded in this counterfactual run; ask for it: interchange(…, "
            f"record=[{location!r}])."
        )
    if done.model.training:
        raise InterventionError(
            f"{location} was not recorded, and a model in train mode would draw other dropout when it runs again; ask "
            f"for it: run(model, inputs, at=[{location!r}])."
        )
    done.check_fresh()


# --- writing ----------------------------------------------------------------------------------------------------------


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
    locations = [_from_fields(fields)] if at is None else _locations(at)
    return _checked(dict.fromkeys(locations, Swap() if op is None else op))


def _from_fields(fields: dict) -> Location:
    try:
        return Location(**fields)
    except TypeError as error:
        raise InterventionError(
            f"{error}; the keywords of a location are layer, site, dims, stack, module and io."
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
    return pairs


def _locations(at: Where) -> list[Location]:
    places = [at] if isinstance(at, Location | str) or not isinstance(at, Iterable) else list(at)
    return list(dict.fromkeys(as_location(place) for place in places))


def _writes(
    found: Architecture,
    pairs: dict[Location, Operator],
    source: object,
    *,
    positions: object,
    source_positions: object,
    generator: torch.Generator | None,
) -> list[Write]:
    places = {location: found.place(location) for location in pairs}
    chosen, source_chosen = _of(positions, pairs), _of(source_positions, pairs)
    sources = _sources(found, pairs, places, source)
    return [
        Write(at, places[at], op, chosen[at], sources.get(at), source_chosen[at], generator) for at, op in pairs.items()
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
        wholes = {location: replace(location, dims=None) for location in mine}
        if isinstance(given, Run):
            _check_same_model(given, found.model)
            states, inputs = given.activations, given.inputs
        else:
            _check_inputs(given)
            states, inputs = _read(found.model, given, list(dict.fromkeys(wholes.values()))), given
        arguments = arguments_of(found.model, inputs)
        for location in mine:
            mask = arguments.get(places[location].mask)
            result[location] = Source(states[wholes[location]], mask if isinstance(mask, Tensor) else None)
    return result


def _is_by_location(source: object) -> bool:
    return isinstance(source, Mapping) and any(isinstance(key, Location) for key in source)


def _drawing(write: Write) -> Callable[[Tensor, Scope], Tensor]:
    def written(state: Tensor, scope: Scope) -> Tensor:
        with drawing(scope):
            return write(state, scope)

    return written


def _resumable(base: Inputs | Run) -> Recording | None:
    if not isinstance(base, Run):
        return None
    if base.is_counterfactual:
        raise InterventionError(
            "the base is itself a counterfactual run; pass its base and all locations in one call: "
            "at={location: operator}, source={location: source}; or resume=False inside a `with intervene(...)` block."
        )
    base.check_fresh()
    return base.recording


# --- inputs, outputs and checks ---------------------------------------------------------------------------------------


def _check_inputs(inputs: Inputs) -> None:
    if isinstance(inputs, Mapping) and inputs.get("past_key_values") is not None:
        raise InterventionError(
            "the inputs hold past_key_values, which a run changes, so they cannot be run twice; pass the whole "
            "sequence instead."
        )


def _check_same_model(given: Run, model: nn.Module) -> None:
    if given.model is not model:
        raise InterventionError(
            f"the source is a run of another model ({type(given.model).__name__}); run it on this one: run(model, "
            "inputs)."
        )
    given.check_fresh()


def _check_ran(activations: Activations, where: str) -> None:
    for location in activations:
        if not activations.calls(location):
            raise InterventionError(f"{location} never ran in {where}; look at describe(model) for what runs.")


def _check_fired(writes: list[Write], where: str) -> None:
    for write in writes:
        if write.firings == 0:
            raise InterventionError(f"{write.location} never ran inside {where}, or look at describe(model).")


def _without_cache(model: nn.Module, inputs: Inputs) -> Inputs:
    """Inputs of a resumed run: skipped blocks leave the cache and the attentions incomplete."""
    given = arguments_of(model, inputs)
    config = getattr(model, "config", None)
    if given.get("output_attentions", getattr(config, "output_attentions", False)):
        raise InterventionError("output_attentions=True is incomplete where blocks are skipped; pass resume=False.")
    if given.get("use_cache"):
        raise InterventionError("use_cache=True leaves the cache of skipped blocks empty; pass resume=False.")
    if isinstance(inputs, Mapping) and "use_cache" not in inputs and getattr(config, "use_cache", False):
        return {**inputs, "use_cache": False}
    return inputs


def _without_past(output: object) -> object:
    if isinstance(output, Mapping) and output.get("past_key_values") is not None:
        return type(output)(**{key: value for key, value in output.items() if key != "past_key_values"})
    return output


def _rows(value: Any, rows: Tensor) -> Any:
    """`value` for some examples: tensors are indexed along their first axis; what is no tensor or a scalar is kept."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim else value
    if isinstance(value, Mapping):
        taken = {key: _rows(entry, rows) for key, entry in value.items()}
        return type(value)(**taken) if hasattr(value, "to_tuple") else taken
    return type(value)(_rows(entry, rows) for entry in value) if type(value) in (tuple, list) else value
