"""Runs of a model: with its activations kept, with some of them replaced, or both."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from interventions.errors import InterventionError
from interventions.execution.examples import check_inputs_of, check_rows, examples_in, numbers_of
from interventions.execution.recordings import Recording, detached
from interventions.execution.stamps import Stamp
from interventions.execution.writes import part_of
from interventions.hooks.hooks import (
    Scope,
    Stopped,
    Tap,
    acting,
    check_graded,
    open_scopes,
    opened,
    under,
    until_stopped,
    user_hooks,
)
from interventions.locations import Location, as_location
from interventions.models.answers import Answers, checked, logits_of, rule_of
from interventions.models.architectures import Architecture, Place, architecture
from interventions.models.axes import axis, to_vectors
from interventions.models.calls import call, parameters_of
from interventions.models.wrappers import Model, is_sharded, is_traced, module_of, unwrapped
from interventions.names import printed

Inputs = (
    object  # a mapping (keywords), a tuple or list (positional arguments) or one tensor: what the model is called with
)
Keep = Callable[[Any], Any]  # from the output of a model to what is kept of it
Where = Location | str | Iterable[Location | str] | Mapping[Location | str, object]


class Activations(Mapping):
    """Location → activation, for the places that were asked for and, fetched on demand, for others of the same run."""

    def __init__(self, locations: Iterable[Location], fetch: "Fetch | None" = None) -> None:
        self._fetch = fetch
        self._states: dict[Location, list[Tensor]] = {location: [] for location in locations}

    def __getitem__(self, location: Location | str) -> Tensor:
        location = as_location(location)
        if location not in self._states:
            if self._fetch is None:
                raise InterventionError(f"{location} was not recorded; ask for it: record(model, [{location!r}]).")
            self._states[location] = [self._fetch(location, self)]
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
        location = as_location(location)
        return list(self._states[location]) if location in self._states else [self[location]]

    @printed
    def __repr__(self) -> str:
        shapes = (f"{key}: {[list(state.shape) for state in states]}" for key, states in self._states.items())
        return f"Activations({', '.join(shapes)})"


Fetch = Callable[[Location, Activations], Tensor]


@dataclass(eq=False)
class Run:
    """One run of a model.

    Attributes:
        model: the one that it was given to: a torch model, or one of nnsight.
        inputs: what the model was called with.
        output: what it returned.
        activations: Location → activation. One that was not asked for is fetched: from what the blocks returned if the
            run kept that, else by running again.
        answers: what of the output is the answer, where that was said: by `run(…, answers=…)` or `answering`.
    """

    model: Any
    inputs: Inputs
    output: object
    activations: Activations | Mapping[Location, Tensor] = field(repr=False)
    recording: Recording | None = field(default=None, repr=False)
    is_counterfactual: bool = False
    answers: Answers | None = field(default=None, repr=False)
    _stamp: Stamp = field(default=None, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self._stamp = self._stamp or Stamp.of(self.model)
        if self.answers is None:
            self.answers = rule_of(module_of(self.model))

    def check_fresh(self) -> None:
        """Raise if the model changed since the run, see `interventions.execution.stamps`."""
        check_fresh(self.model, self._stamp)

    @property
    def logits(self) -> Tensor:
        """What `answers` says, else `output.logits`, or the only tensor of the output; see `logits_of`."""
        return logits_of(self.output, self.answers)

    def vectors(self, location: Location | str) -> Tensor:
        """The activation as `[batch, position, dims]`, `[batch, position, head, dims]` or `[batch, dims]`."""
        location = as_location(location)
        state = self.activations[location]
        if location.subspace is not None:
            return state
        return to_vectors(state, architecture(self.model).place(location).axes_of(state))

    @printed
    def __repr__(self) -> str:
        kind = ", counterfactual" if self.is_counterfactual else ""
        return f"Run({type(self.model).__name__}, {type(self.output).__name__}{kind}, {self.activations!r})"

    def take(self, rows: Any) -> "Run":
        """The same run for the examples `rows`, in that order, e.g. as the source of a shuffled batch.

        Args:
            rows: their numbers, a list or a tensor `[k]`, or a mask of all examples.

        Raises:
            InterventionError: an example that there is not; inputs, or an activation when it is asked for, without one
                row for each example: windows or patches of all of them.
        """
        found, examples = architecture(self.model), examples_in(self.inputs)
        check_inputs_of(self.inputs, examples)
        rows = numbers_of(rows, examples)

        def of_rows(location: Location, state: Tensor) -> Tensor:
            axes = "b" if location.subspace is not None else found.place(location).axes_of(state)
            check_rows(location, state.shape[axis(axes, "b")], examples)
            return state.index_select(axis(axes, "b"), rows.to(state.device))

        taken, output = _Taken(self.activations, of_rows), rows_of(without_past(self.output), rows, examples)
        inputs = rows_of(self.inputs, rows, examples)
        return replace(self, inputs=inputs, output=output, activations=taken, recording=None)

    def detach(self) -> "Run":
        """The same run, cut off from the graph."""
        cut = _Taken(self.activations, lambda location, state: state.detach())
        recording = None if self.recording is None else self.recording.detach()
        return replace(self, output=detached(self.output), activations=cut, recording=recording)


class _Taken(Activations):
    """The activations of another run, each put through a function of location and state when it is asked for."""

    def __init__(self, whole: Mapping[Location, Tensor], change: Callable[[Location, Tensor], Tensor]) -> None:
        super().__init__((), lambda location, _: change(location, whole[location]))


def run(
    model: Model,
    inputs: Inputs,
    at: Where = (),
    *,
    resumable: bool = True,
    detach: bool = False,
    device: torch.device | str | None = None,
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
    answers = None if answers is None else checked(answers)
    if (elsewhere := traced(model, remote)) is not None:
        there = elsewhere.run(model, inputs, locations_of(at), detach=detach, device=device, keep=keep, remote=remote)
        return there if answers is None else replace(there, answers=answers)
    check_inputs(inputs)
    model, found = module_of(model), architecture(model)
    inputs = without_cache(found, inputs)
    recording = Recording.begin(found) if resumable and found.stacks else None
    activations, taps = reading(found, locations_of(at), detach=detach, device=device)
    scope = recorded(model, taps, recording)
    with opened(scope):
        output = call(model, inputs)
    output = output if keep is None else keep(output)
    if recording is not None:
        recording.close()
    check_ran(activations, "this run")
    made = Stamp.of(model)
    activations._fetch = fetcher(model, inputs, recording, made=made, store=_storing(detach, device))
    return Run(model, inputs, output, activations, recording, answers=answers, _stamp=made)


def run_to(model: Model, inputs: Inputs, at: Where, *, remote: bool | str = False) -> Run:
    """A run that stops after the last of the locations `at`: a source for interchanges. Its output is None.

    Raises:
        InterventionError: as `run`.
    """
    locations, found = locations_of(at), architecture(model)
    if (elsewhere := traced(model, remote)) is not None:
        return elsewhere.run_to(model, inputs, locations, remote=remote)
    check_inputs(inputs)
    activations = read(module_of(model), inputs, list(dict.fromkeys(location.whole for location in locations)))
    activations._fetch = lambda location, kept: part_of(kept[location.whole], location, found.place(location))
    return Run(model, inputs, None, activations)


def traced(model: Model, remote: bool | str = False) -> Any:
    """`interventions.tracing` for a model of nnsight, else None.

    Raises:
        InterventionError: `remote` for another model.
    """
    if is_traced(model):
        from interventions import tracing  # the one that comes later: it imports nnsight, which changes torch

        return tracing
    if remote:
        raise InterventionError(
            f"remote={remote!r} asks another machine for the model, and this {type(model).__name__} is here; pass a "
            "model of nnsight: TransformersModel(name)."
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


def check_eval(model: Model, remote: bool | str = False) -> None:
    """Raise in train mode, where dropout would differ between runs that are compared; what is elsewhere is a host's."""
    if (elsewhere := traced(model, remote)) is not None and not remote:
        elsewhere.load(model)
    if not remote and any(module.training for module in module_of(model).modules()):
        raise InterventionError(
            "the model is in train mode, where dropout differs from run to run; call model.eval() first."
        )


@contextmanager
def record(
    model: Model, at: Where, *, detach: bool = False, device: torch.device | str | None = None
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
    activations, taps = reading(architecture(model), locations_of(at), detach=detach, device=device)
    with opened(Scope(module_of(model), taps)):
        yield activations
    check_ran(activations, "this record block")


def _storing(detach: bool, device: torch.device | str | None) -> Callable[[Tensor], Tensor]:
    def store(state: Tensor) -> Tensor:
        state = state.detach() if detach else state
        return state if device is None else state.to(device)

    return store


def reading(
    found: Architecture, locations: list[Location], *, detach: bool = False, device: torch.device | str | None = None
) -> tuple[Activations, list[Tap]]:
    """Empty activations, and the taps that fill them."""
    activations, store = Activations(locations), _storing(detach, device)

    def read(location: Location, place: Place) -> Tap:
        def keep(state: Tensor, scope: Scope) -> Tensor | None:
            if scope.recomputing:
                return None
            if not detach:
                check_graded(place.module, scope)
            part = part_of(state, location, place)
            activations._states[location].append(store(part))
            # The model goes on with a copy, which it may change in place; what is kept stays on the way to the output.
            return state.clone() if part is state else None

        return Tap.at(place, keep, writes=False)

    return activations, [read(location, found.place(location)) for location in locations]


def recorded(model: nn.Module, taps: list[Tap], recording: Recording | None) -> Scope:
    """What records the taps, and what the blocks return if there is a recording."""
    if recording is None:
        return Scope(model, taps)
    # The writes come first: what a block is recorded to return is what the next one is given.
    return Scope(model, [*taps, *recording.taps()], watched=recording.found.blocks, raw_outputs=recording.raw_output)


def read(model: nn.Module, inputs: Inputs, locations: list[Location], *, early: bool = True) -> Activations:
    """The activations of a run that stops after the last of them, or does not because some may run again.

    Inside a block it stops when that has returned: its parts may run more than once.
    """
    found = architecture(model)
    activations, taps = reading(found, locations)
    missing = set(locations)
    early = early and not is_sharded(model)  # FSDP must see each block return

    def stop(state: Tensor, scope: Scope) -> None:
        if early and not missing:
            raise Stopped

    def stopping(location: Location, tap: Tap, place: Place) -> Tap:
        def keep(state: Tensor, scope: Scope) -> Tensor | None:
            going_on = tap.function(state, scope)
            missing.discard(location)
            if place.block in (None, place.module):
                stop(state, scope)
            return going_on

        return replace(tap, function=keep)

    places = [found.place(location) for location in locations]
    stopped = [stopping(*each) for each in zip(locations, taps, places, strict=True)]
    around = dict.fromkeys(place.block for place in places if place.block not in (None, place.module))
    ends = [Tap(block, "output", stop, writes=False) for block in around if block is not None]
    with until_stopped(), opened(Scope(model, [*stopped, *ends])):
        call(model, without_cache(found, inputs))
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
    """What gets an activation that was not asked for.

    Args:
        made: of the model when it ran; None for a counterfactual run, which cannot run again.

    It holds the parts of a run and not the run, which holds it: a cycle would keep activations until the next garbage
    collection.
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
                state = read(model, inputs, [whole], early=early)[whole]
        return store(part_of(state, location, place))

    return fetch


def check_repeatable(location: Location, *, is_counterfactual: bool, training: bool) -> None:
    """Raise for a run that would not be the same again."""
    if is_counterfactual:
        raise InterventionError(
            f"{location} was not recorded in this counterfactual run; ask for it: interchange(…, "
            f"record=[{location!r}])."
        )
    if training:
        raise InterventionError(
            f"{location} was not recorded, and a model in train mode would draw other dropout when it runs again; ask "
            f"for it: run(model, inputs, at=[{location!r}])."
        )


def check_fresh(model: Model, made: Stamp) -> None:
    """Raise if the model changed since `made`, its stamp at the time of a run."""
    if not made.is_of(model):
        raise InterventionError(
            "the run is older than the model: its weights, buffers, adapters, settings or its train/eval mode changed "
            "since; run it again: run(model, inputs)."
        )


def locations_of(at: Where) -> list[Location]:
    """One or several places as distinct locations."""
    places = [at] if isinstance(at, Location | str) or not isinstance(at, Iterable) else list(at)
    return list(dict.fromkeys(as_location(place) for place in places))


def check_inputs(inputs: Inputs) -> None:
    """Raise for inputs that are none, and for those that a run changes, so that they cannot be run twice."""
    texts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, list | tuple) else [inputs]
    if inputs is None or any(isinstance(each, str) for each in texts):
        raise InterventionError(
            f"inputs={repr(inputs)[:60]} holds no tensors; tokenise text: tokenizer(text, return_tensors='pt')."
        )
    if isinstance(inputs, Mapping) and inputs.get("past_key_values") is not None:
        raise InterventionError(
            "the inputs hold past_key_values, which a run changes, so they cannot be run twice; pass the whole "
            "sequence instead."
        )


def check_ran(activations: Activations, where: str) -> None:
    """Raise for a location that never ran."""
    for location in activations:
        if not activations.calls(location):
            raise InterventionError(f"{location} never ran in {where}; look at describe(model) for what runs.")


def without_cache(found: Architecture, inputs: Inputs) -> Inputs:
    """Inputs for a run of which nobody goes on: without a cache, unless they ask for one.

    Runs are compared with each other, and a resumed one can have none; some caches change the precision of values.
    """
    model, config = found.model, getattr(found.model, "config", None)
    takes = {"use_cache", "kwargs"} & set(parameters_of(unwrapped(model)[-1]))
    if not found.resumes or not takes or not isinstance(inputs, Mapping) or "use_cache" in inputs:
        return inputs
    return {**inputs, "use_cache": False} if getattr(config, "use_cache", False) else inputs


def without_past(output: object) -> object:
    """The output without its cache, which is incomplete or of other rows."""
    if isinstance(output, Mapping) and output.get("past_key_values") is not None:
        return type(output)(**{key: value for key, value in output.items() if key != "past_key_values"})
    return output


def rows_of(value: Any, rows: Tensor, examples: int | None = None) -> Any:
    """`value` for some examples: tensors are indexed along their first axis; what is no tensor or a scalar is kept.

    Args:
        examples: how many there are: of tensors with other rows, one row is kept, and the others left out as None.
    """
    if isinstance(value, Tensor):
        if not value.ndim or (examples is not None and len(value) == 1 != examples):
            return value
        return None if examples is not None and len(value) != examples else value[rows.to(value.device)]
    if isinstance(value, Mapping):
        taken = {key: rows_of(entry, rows, examples) for key, entry in value.items()}
        return type(value)(**taken) if hasattr(value, "to_tuple") else taken
    return type(value)(rows_of(entry, rows, examples) for entry in value) if type(value) in (tuple, list) else value
