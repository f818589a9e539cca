"""A run of a model: its inputs, its output and its activations; and the checks of inputs and runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any, cast

from torch import Tensor, nn

from interventions.errors import InterventionError
from interventions.execution.deferring import Deferred
from interventions.execution.examples import check_inputs_of, check_rows, examples_in, numbers_of
from interventions.execution.recordings import Recording, detach_tensors
from interventions.execution.stamps import Stamp
from interventions.host_copies import keep_on_host, on_host
from interventions.locations import Location, as_location
from interventions.models.answers import Answers, logits_of, rule_of
from interventions.models.architectures import Architecture, architecture
from interventions.models.axes import axis, to_vectors
from interventions.models.calls import parameters_of
from interventions.models.wrappers import Model, module_of, unwrapped
from interventions.names import printed, shown

Inputs = object
"""The inputs of a model: a mapping (keywords), a tuple or list (positional arguments) or one tensor."""
Keep = Callable[[Any], Any]
"""From the output of a model to what is kept of it."""
Where = Location | str | Iterable[Location | str] | Mapping[Location | str, object]


class Activations(Mapping):
    """A mapping from locations to activations: requested ones, and others that are fetched when they are read."""

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
        """Return every activation at `location`, in the order of the calls."""
        location = as_location(location)
        return list(self._states[location]) if location in self._states else [self[location]]

    def put(self, location: Location, states: list[Tensor]) -> None:
        """Set the activations of a location, in the order of the calls; entries added to the list later count too."""
        self._states[location] = states

    def append(self, location: Location, state: Tensor) -> None:
        """Add the activation of one more call to those of a recorded location."""
        self._states[location].append(state)

    def fetch_with(self, fetch: "Fetch") -> None:
        """Let `fetch(location, activations)` give the activations of locations that were not recorded."""
        self._fetch = fetch

    @printed
    def __repr__(self) -> str:
        shapes = (f"{key}: {[list(state.shape) for state in states]}" for key, states in self._states.items())
        return f"Activations({', '.join(shapes)})"


Fetch = Callable[[Location, Activations], Tensor]


@dataclass(eq=False)
class Run:
    """One run of a model.

    Attributes:
        model: the torch model, or the model of nnsight, that was run.
        inputs: its inputs.
        output: its output.
        activations: location → activation. One that was not requested is fetched: from the outputs of the blocks if
            the run recorded them, else by another run.
        recording: the outputs of the blocks, if they were recorded.
        is_counterfactual: whether activations were written in the run.
        answers: where the logits are in the output, if `run(…, answers=…)` or `answering` states it.
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
        """Raise InterventionError if the model has changed since the run, see `interventions.execution.stamps`."""
        check_fresh(self.model, self._stamp)

    @property
    def logits(self) -> Tensor:
        """The logits: the part of the output that `answers` names, `logits`, or its only tensor; see `logits_of`."""
        if self.deferred is not None:
            self.check_fresh()  # the head is called now
        return logits_of(self.output, self.answers)

    @property
    def deferred(self) -> Deferred | None:
        """The output, if the run ended before the head of its model (`deferring_head`) and no logits were read yet."""
        return self.output if isinstance(self.output, Deferred) and not self.output.is_made else None

    def vectors(self, location: Location | str) -> Tensor:
        """Return an activation as `[batch, position, dims]`, `[batch, position, head, dims]` or `[batch, dims]`."""
        location = as_location(location)
        state = self.activations[location]
        if location.subspace is not None:
            return state
        return to_vectors(state, architecture(self.model).place(location).axes_of(state))

    @printed
    def __repr__(self) -> str:
        kind = ", counterfactual" if self.is_counterfactual else ""
        return f"Run({type(self.model).__name__}, {type(self.output).__name__}{kind}, {self.activations!r})"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"

    def take(self, rows: Any) -> "Run":
        """Return the same run for the examples `rows`, in that order, e.g. as the source of a shuffled batch.

        Args:
            rows: their numbers, a list or a tensor `[k]`, or a mask of all examples.

        Raises:
            InterventionError: an example that does not exist; inputs, or later an activation, without one row for each
                example: windows or patches of all of them.
        """
        found, examples = architecture(self.model), examples_in(self.inputs)
        check_inputs_of(self.inputs, examples)
        rows = numbers_of(rows, examples)

        def take_rows(location: Location, state: Tensor) -> Tensor:
            axes = "b" if location.subspace is not None else found.place(location).axes_of(state)
            check_rows(location, state.shape[axis(axes, "b")], examples)
            return state.index_select(axis(axes, "b"), rows.to(state.device))

        activations, output = _Derived(self.activations, take_rows), rows_of(without_past(self.output), rows, examples)
        inputs = rows_of(self.inputs, rows, examples)
        return replace(self, inputs=inputs, output=output, activations=activations, recording=None)

    def detach(self) -> "Run":
        """Return the same run, cut off from the graph."""
        cut = _Derived(self.activations, lambda location, state: state.detach())
        recording = None if self.recording is None else self.recording.detach()
        return replace(self, output=detach_tensors(self.output), activations=cut, recording=recording)


class _Derived(Activations):
    """The activations of another run, each changed by a function of location and state when it is read."""

    def __init__(self, whole: Mapping[Location, Tensor], change: Callable[[Location, Tensor], Tensor]) -> None:
        super().__init__((), lambda location, _: change(location, whole[location]))


def check_repeatable(location: Location, *, is_counterfactual: bool, training: bool) -> None:
    """Raise InterventionError for a run that would not be the same again."""
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
    """Raise InterventionError if the model has changed since `made`, its stamp at the time of a run."""
    if not made.is_of(model):
        raise InterventionError(
            "the run is older than the model: its weights, buffers, adapters, settings or its train/eval mode changed "
            "since; run it again: run(model, inputs)."
        )


def locations_of(at: Where) -> list[Location]:
    """Return one or several places as distinct locations."""
    if isinstance(at, Location):
        return [at]
    one = isinstance(at, str | Tensor | nn.Module) or not isinstance(at, Iterable) or hasattr(at, "dtype")
    places: list[Any] = [at] if one else list(cast(Iterable, at))
    return list(dict.fromkeys(as_location(place) for place in places))


def check_inputs(inputs: Inputs) -> None:
    """Raise InterventionError for values that are no inputs, and for inputs that a run changes."""
    texts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, list | tuple) else [inputs]
    if inputs is None or any(isinstance(each, str) for each in texts):
        raise InterventionError(
            f"inputs={shown(inputs)} holds no tensors; tokenise text: tokenizer(text, return_tensors='pt')."
        )
    if isinstance(inputs, Mapping) and not all(isinstance(name, str) for name in inputs):
        raise InterventionError(
            f"inputs={shown(inputs)} has keys that are no names of arguments; write {{'input_ids': …}}."
        )
    if isinstance(inputs, Mapping) and inputs.get("past_key_values") is not None:
        raise InterventionError(
            "the inputs hold past_key_values, which a run changes, so they cannot be run twice; pass the whole "
            "sequence instead."
        )


def check_ran(activations: Activations, where: str) -> None:
    """Raise InterventionError for a location that never ran."""
    for location in activations:
        if not activations.calls(location):
            raise InterventionError(f"{location} never ran in {where}; look at describe(model) for what runs.")


def without_cache(found: Architecture, inputs: Inputs) -> Inputs:
    """Return the inputs of a single run: without a cache, unless they set one.

    Runs are compared with each other, and a resumed one cannot have a cache; some caches change the precision.
    """
    model, config = found.model, getattr(found.model, "config", None)
    takes = {"use_cache", "kwargs"} & set(parameters_of(unwrapped(model)[-1]))
    if not found.resumes or not takes or not isinstance(inputs, Mapping) or "use_cache" in inputs:
        return inputs
    return {**inputs, "use_cache": False} if getattr(config, "use_cache", False) else inputs


def without_past(output: object) -> object:
    """Return the output without its cache, which is incomplete or holds other rows."""
    if isinstance(output, Mapping) and output.get("past_key_values") is not None:
        return type(output)(**{key: value for key, value in output.items() if key != "past_key_values"})
    return output


def _taken(value: Tensor, rows: Tensor) -> Tensor:
    """Return rows of a tensor; those of a mask, or of tokens, are known on the host if the whole is."""
    taken = value[rows.to(value.device, non_blocking=rows.is_cpu)]
    if value.is_floating_point() or not rows.is_cpu or (value.is_cpu and on_host(value) is value):
        return taken
    return keep_on_host(taken, lambda: on_host(value)[rows])


def rows_of(value: Any, rows: Tensor, examples: int | None = None) -> Any:
    """Return `value` for some examples: tensors are indexed along their first axis, scalars and other values kept.

    Args:
        value: the inputs or the output of a model.
        rows: the numbers of the examples, `[k]`.
        examples: the number of all examples: a tensor with one row is kept, one with other rows is left out as None.
    """
    if isinstance(value, Tensor):
        if not value.ndim or (examples is not None and len(value) == 1 != examples):
            return value
        return None if examples is not None and len(value) != examples else _taken(value, rows)
    if isinstance(value, Deferred):
        return value.mapped(lambda states: rows_of(states, rows, examples))
    if isinstance(value, Mapping):
        taken = {key: rows_of(entry, rows, examples) for key, entry in value.items()}
        return type(value)(**taken) if hasattr(value, "to_tuple") else taken
    return type(value)(rows_of(entry, rows, examples) for entry in value) if type(value) in (tuple, list) else value
