"""Reads and writes in the requests of a vLLM engine: the part that is sent to the process of the model.

An engine reads the tokens of many requests in one step, as one tensor. Each request has a worker of its own for each
place, to which nnsight shows the tokens of that request alone: `[tokens, dims]`, first the prompt and then one token
in each step. The argument `positions` of the model says where in the sequence these tokens are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from interventions.errors import InterventionError
from interventions.execution.measures import Change, Missing
from interventions.execution.parts import part_of
from interventions.execution.writes import Write, check_sources
from interventions.hooks.states import at, path_in, with_new
from interventions.hooks.taps import Tap
from interventions.locations import Location
from interventions.models.calls import Call, CallContext, Generation, bind_arguments
from interventions.models.places import Place
from interventions.tracing.current_call import CurrentCall
from interventions.tracing.visits import repeat_until_end


@dataclass(frozen=True, eq=False)
class Draws:
    """The state of a generator, so that every machine that a model is spread over draws the same numbers.

    Attributes:
        device: the device of the generator.
        state: its state.
        number: the number of the place, among those that draw from it.
    """

    device: str
    state: Tensor
    number: int

    def of_request(self, request: int) -> torch.Generator:
        """Return a generator for one request, with the state as sent for the first place of the first request."""
        generator = torch.Generator(self.device)
        generator.set_state(self.state)
        if request or self.number:
            seed = int(torch.randint(2**40, (), generator=generator, device=self.device))
            generator.manual_seed(seed + 1_000_003 * request + self.number)
        return generator


@dataclass(eq=False)
class RequestTap:
    """A read or a write at one place, in every request.

    Attributes:
        envoy: nnsight's view of the module.
        location: the location that was requested.
        place: where it is in the model.
        adds: True if a block returns two tensors, its last change and the residual stream to add it to.
        write: the write; None reads.
        draws: the generator of the write.
        away: True for the copy in the process of the model.
        begun: the number of requests that have begun.
    """

    envoy: Any
    location: Location
    place: Place
    adds: bool
    write: Write | None = None
    draws: Draws | None = None
    away: bool = False
    begun: int = 0

    def act(self, model: Any, report: dict[str, Any]) -> None:
        """Read or write in all steps of one request, and note in `report` what was done: numbers, and CPU tensors."""
        request = Request(self, model, self.begun)
        self.begun += 1
        try:
            repeat_until_end(lambda: request.step(report))
        finally:
            request.close(report)


class Request:
    """One request at one place.

    Args:
        request_tap: the read or write.
        model: nnsight's view of the model.
        number: the number of requests before this one.
    """

    def __init__(self, request_tap: RequestTap, model: Any, number: int) -> None:
        self.location, self.place, self.envoy = request_tap.location, request_tap.place, request_tap.envoy
        self.adds, self.model, self.current = request_tap.adds, model, CurrentCall()
        self.generator = None if request_tap.draws is None else request_tap.draws.of_request(number)
        self.first_state = None if self.generator is None else self.generator.get_state()
        counts: Any = dict(generator=self.generator, change=Change(), missing=Missing())  # of this request alone
        self.write = None if request_tap.write is None else replace(request_tap.write, **counts)
        self.states: list[Tensor] = []
        self.steps, self.prompt = 0, 0
        place = self.place
        function = self.read if self.write is None else self.write
        self.tap = Tap(place.module, place.io, function, writes=self.write is not None, unflattens=True)

    def step(self, report: dict[str, Any]) -> None:
        """Wait for the next step of the engine that reads tokens of this request, and for the place in it."""
        self._begin(bind_arguments(self.model._module, *self.model.inputs))
        envoy, is_input = self.envoy, self.place.io == "input"
        value = envoy.inputs if is_input else envoy.output
        self._check_step()
        new = self._of_inputs(value) if is_input else self._of_output(value)
        self.steps += 1
        if new is not value and is_input:
            envoy.inputs = new
        elif new is not value:
            envoy.output = new
        if self.write is not None:
            report.update(firings=self.write.firings, calls=self.write.calls)

    def close(self, report: dict[str, Any]) -> None:
        """End the request: complete the report, with an error if the place did not run once in every step."""
        begun, ran = self._counted()
        if ran > self.steps:
            report["error"] = self._not_once(begun, ran)
        if self.write is None:
            report["states"] = self.states
            return
        try:
            check_sources([self.write])
        except InterventionError as error:
            report.setdefault("error", str(error))
        change = self.write.change
        known = change is not None and change.difference is not None
        report["change"] = (float(change.difference), float(change.before)) if known else None  # type: ignore[union-attr, arg-type]
        report["drew"] = self.generator is not None and not torch.equal(self.generator.get_state(), self.first_state)  # type: ignore[arg-type]

    def read(self, state: Tensor, context: CallContext) -> None:
        """Keep a copy of the activation, as a tap function; the engine will change it in place."""
        part = part_of(state, self.location, self.place)
        self.states.append(part.detach().to("cpu", copy=True))

    def _begin(self, arguments: Mapping[str, Any]) -> None:
        """Begin a step: note the call of the model, whose arguments hold the tokens of this request alone."""
        positions = arguments.get("positions")
        if not isinstance(positions, Tensor) or positions.ndim != 1:
            kind = f"of shape {list(positions.shape)}" if isinstance(positions, Tensor) else "missing"
            raise InterventionError(
                f"{self.location}: the engine calls this model with positions {kind}, so the places of its tokens in "
                "the sequence are not known; use a text model, which has one position for each token."
            )
        past, tokens = int(positions[0]), len(positions)
        first = self.steps == 0
        if first:
            self.prompt = tokens
        self._check_tokens(past, tokens, first)
        inputs = {"input_ids": positions[None]}  # in place of the tokens, of one example
        generation = Generation(inputs, self.prompt)
        self.current.generation = generation
        self.current.call = Call(self.model._module, inputs, past, tokens, self.prompt, generation)

    def _check_tokens(self, past: int, tokens: int, first: bool) -> None:
        """Raise InterventionError if the engine skipped or grouped tokens, where these have to be counted."""
        if not self.counts or (past == 0 if first else past == 0 or tokens == 1):
            return
        why = (
            f"the engine had {past} tokens of this prompt in its prefix cache and read only the others; load it with "
            "enable_prefix_caching=False, as nnsight does."
            if first
            else f"the engine read {tokens} tokens after the first {past}: its prompts come in chunks, or it guesses "
            "several tokens at once; load it without enable_chunked_prefill and speculative_config."
        )
        raise InterventionError(f"{self.location}: positions and steps cannot be counted: {why}")

    @property
    def counts(self) -> bool:
        """True if positions, steps or a source are used, so that tokens have to be counted."""
        return self.write is None or any(
            each is not None for each in (self.write.positions, self.write.steps, self.write.source)
        )

    def _check_step(self) -> None:
        """Raise InterventionError if the module does not run exactly once in every step."""
        begun, ran = self._counted()
        if begun != self.steps + 1 or ran != self.steps:
            raise InterventionError(self._not_once(begun, ran + 1))

    def _counted(self) -> tuple[int, int]:
        """Return the number of steps of this request, and how often the place ran."""
        from nnsight.intervention.interleaver import Mediator

        worker = Mediator.current(self.place.path)
        places = f"{self.model.path}.input", f"{self.envoy.path}.{self.place.io}"
        begun, ran = map(worker.occurrence, places)
        return begun, ran

    def _not_once(self, begun: int, ran: int) -> str:
        """Return the message for a place that does not run exactly once in every step."""
        return (
            f"{self.location} ran {ran} times in the first {begun} steps of a request, and on an engine only what "
            "runs once in every step can be read or written; name the block, or a module that does."
        )

    def _apply(self, state: Tensor) -> Tensor | None:
        """Return the tensor to write in place of `state`; None if it stays."""
        assert self.current.call is not None
        tokens = self.current.call.tokens
        if (state.ndim, len(state)) != (2, tokens) and (state.ndim, *state.shape[:2]) != (3, 1, tokens):
            raise InterventionError(
                f"{self.location} is {list(state.shape)} where the engine reads {tokens} tokens of this request; "
                "name a place with one vector a token."
            )
        return self.tap(state, self.current)

    def _of_output(self, value: Any) -> Any:
        """Return the output of the module after the tap; the same object if nothing is written."""
        place = self.place
        if place.is_block_output and _is_pair(value):
            both = self._of_sum(*value)
            return value if both is None else type(value)(both)
        path = path_in(place.module, "output", value)
        new = self._apply(at(value, path))
        return value if new is None else with_new(value, path, new)

    def _of_inputs(self, inputs: tuple) -> tuple:
        """Return `(args, kwargs)` of the module after the tap; the same object if nothing is written."""
        place, (args, kwargs) = self.place, inputs
        arguments = bind_arguments(place.module, args, kwargs)
        hidden, residual = _hidden_in(arguments, args, kwargs, self.location), arguments.get("residual")
        if place.module is place.block and isinstance(residual, Tensor):
            both = self._of_sum(hidden, residual)
            return inputs if both is None else _exchange(inputs, {id(hidden): both[0], id(residual): both[1]})
        new = self._apply(hidden)
        return inputs if new is None else _exchange(inputs, {id(hidden): new})

    def _of_sum(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor] | None:
        """Apply the tap to the sum of a hidden state and its residual, and return both; None if nothing is written.

        Where the sum changes, the new sum becomes the hidden state and the residual 0, so that adding them is exact.
        """
        place = self.place
        if not self.adds:
            raise InterventionError(
                f"{type(place.module).__name__} passes on two tensors, and the normalisation after the blocks is none "
                f"that adds them, so the value of {self.location} is not known; name a module inside of it."
            )
        state = hidden + residual
        new = self._apply(state)
        if new is None:
            return None
        changed = (new != state).any(-1, keepdim=True)
        return torch.where(changed, new, hidden), residual.masked_fill(changed, 0)


def _is_pair(value: Any) -> bool:
    """Return whether a value is two floating-point tensors of one shape."""
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(isinstance(each, Tensor) for each in value):
        return False
    return value[0].shape == value[1].shape and value[0].is_floating_point() and value[1].is_floating_point()


def _hidden_in(arguments: Mapping[str, Any], args: tuple, kwargs: Mapping[str, Any], location: Location) -> Tensor:
    """Return the hidden state among the arguments of a module; in most models of vLLM positions come before it."""
    for value in (arguments.get("hidden_states"), *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise InterventionError(f"{location}: its module is called without a tensor to read or write; use io='output'.")


def _exchange(inputs: tuple, new: Mapping[int, Tensor]) -> tuple:
    """Return `(args, kwargs)` with new tensors in place of those with these ids."""
    args, kwargs = inputs
    return tuple(new.get(id(each), each) for each in args), {k: new.get(id(each), each) for k, each in kwargs.items()}
