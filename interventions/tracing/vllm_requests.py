"""What is done in the requests of a vLLM engine: the part that goes where the model is.

An engine reads the tokens of many requests in one step, in one slab. Each request has workers of its own, one for each
place, and nnsight shows them the tokens of that request alone: `[tokens, dims]`, the prompt first and then one token a
step. Which tokens of the sequence these are is told by `positions`, which the model is called with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from interventions.errors import InterventionError
from interventions.execution.parts import part_of
from interventions.execution.writes import Write
from interventions.hooks.states import at, path_in, with_new
from interventions.hooks.taps import Tap
from interventions.locations import Location
from interventions.models.calls import Call, CallContext, Generation, bind_arguments
from interventions.models.places import Place
from interventions.tracing.current_call import CurrentCall
from interventions.tracing.visits import forever


@dataclass(frozen=True, eq=False)
class Draws:
    """What a generator draws, on every machine that a model is spread over.

    Attributes:
        device: of the generator.
        state: of the generator.
        number: of the place, among those that draw from it.
    """

    device: str
    state: Tensor
    number: int

    def of_request(self, request: int) -> torch.Generator:
        """A generator for one request: what was sent for the first place of the first, and then others."""
        generator = torch.Generator(self.device)
        generator.set_state(self.state)
        if request or self.number:
            seed = int(torch.randint(2**40, (), generator=generator, device=self.device))
            generator.manual_seed(seed + 1_000_003 * request + self.number)
        return generator


@dataclass(eq=False)
class Post:
    """A place, and what is done there in every request.

    Attributes:
        envoy: nnsight's view of the module.
        adds: whether a block returns what is still to be added to the residual stream, and that, as two tensors.
        write: what is written, if anything is; else it is read.
        draws: what a write draws from.
        away: whether this is the copy where the model is.
        begun: how many requests have begun.
    """

    envoy: Any
    location: Location
    place: Place
    adds: bool
    write: Write | None = None
    draws: Draws | None = None
    away: bool = False
    begun: int = 0

    def stand(self, model: Any, report: dict[str, Any]) -> None:
        """Do it in all steps of one request, and note in `report` what was done: numbers, and tensors of the CPU."""
        request = Request(self, model, self.begun)
        self.begun += 1
        try:
            forever(lambda: request.step(report))
        finally:
            request.close(report)


class Request:
    """One request at one place.

    Args:
        number: how many there were before.
    """

    def __init__(self, post: Post, model: Any, number: int) -> None:
        self.post, self.model, self.moment = post, model, CurrentCall()
        self.generator = None if post.draws is None else post.draws.of_request(number)
        self.began = None if self.generator is None else self.generator.get_state()
        self.write = None if post.write is None else replace(post.write, generator=self.generator)
        self.states: list[Tensor] = []
        self.steps, self.prompt = 0, 0
        place = post.place
        function = self.read if self.write is None else self.write
        self.tap = Tap(place.module, place.io, function, writes=self.write is not None, unflattens=True)

    def step(self, report: dict[str, Any]) -> None:
        """Wait for the next step of the engine that reads tokens of this request, and for the place in it."""
        self._begin(bind_arguments(self.model._module, *self.model.inputs))
        envoy, is_input = self.post.envoy, self.post.place.io == "input"
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
        """The request is over."""
        begun, ran = self._counted()
        if ran > self.steps:
            report["error"] = self._not_once(begun, ran)
        if self.write is None:
            report["states"] = self.states
            return
        known = self.write.changed is not None and self.write.norm is not None
        report["change"] = (float(self.write.changed), float(self.write.norm)) if known else None  # type: ignore[arg-type]
        report["drew"] = self.generator is not None and not torch.equal(self.generator.get_state(), self.began)  # type: ignore[arg-type]

    def read(self, state: Tensor, moment: CallContext) -> None:
        """A tap function that keeps what is there: a copy, as the engine goes on in place."""
        part = part_of(state, self.post.location, self.post.place)
        self.states.append(part.detach().to("cpu", copy=True))

    def _begin(self, arguments: Mapping[str, Any]) -> None:
        """A step begins; `arguments` is what the model is called with, its tensors those of this request alone."""
        positions = arguments.get("positions")
        if not isinstance(positions, Tensor) or positions.ndim != 1:
            kind = f"of shape {list(positions.shape)}" if isinstance(positions, Tensor) else "missing"
            raise InterventionError(
                f"{self.post.location}: the engine calls this model with positions {kind}, so its tokens cannot be "
                "told apart; use a text model, which has one position a token."
            )
        past, tokens = int(positions[0]), len(positions)
        first = self.steps == 0
        if first:
            self.prompt = tokens
        self._check_tokens(past, tokens, first)
        there = {"input_ids": positions[None]}  # stands for the tokens: one example
        generation = Generation(there, self.prompt)
        self.moment.generation = generation
        self.moment.call = Call(self.model._module, there, past, tokens, self.prompt, generation)

    def _check_tokens(self, past: int, tokens: int, first: bool) -> None:
        if not self.counts or (past == 0 if first else past == 0 or tokens == 1):
            return
        why = (
            f"the engine had {past} tokens of this prompt in its prefix cache and read only the others; load it with "
            "enable_prefix_caching=False, as nnsight does."
            if first
            else f"the engine read {tokens} tokens after the first {past}: its prompts come in chunks, or it guesses "
            "several tokens at once; load it without enable_chunked_prefill and speculative_config."
        )
        raise InterventionError(f"{self.post.location}: positions and steps cannot be counted: {why}")

    @property
    def counts(self) -> bool:
        """Whether it matters which tokens of the sequence are there."""
        return self.write is None or any(
            each is not None for each in (self.write.positions, self.write.steps, self.write.source)
        )

    def _check_step(self) -> None:
        """Raise where the module does not run once in every step."""
        begun, ran = self._counted()
        if begun != self.steps + 1 or ran != self.steps:
            raise InterventionError(self._not_once(begun, ran + 1))

    def _counted(self) -> tuple[int, int]:
        """How many steps there were of this request, and how often the place was passed."""
        from nnsight.intervention.interleaver import Mediator

        worker = Mediator.current(self.post.place.path)
        places = f"{self.model.path}.input", f"{self.post.envoy.path}.{self.post.place.io}"
        begun, ran = map(worker.occurrence, places)
        return begun, ran

    def _not_once(self, begun: int, ran: int) -> str:
        return (
            f"{self.post.location} ran {ran} times in the first {begun} steps of a request, and on an engine only what "
            "runs once in every step can be read or written; name the block, or a module that does."
        )

    def _tapped(self, state: Tensor) -> Tensor | None:
        assert self.moment.call is not None
        tokens = self.moment.call.tokens
        if (state.ndim, len(state)) != (2, tokens) and (state.ndim, *state.shape[:2]) != (3, 1, tokens):
            raise InterventionError(
                f"{self.post.location} is {list(state.shape)} where the engine reads {tokens} tokens of this request; "
                "name a place with one vector a token."
            )
        return self.tap(state, self.moment)

    def _of_output(self, value: Any) -> Any:
        place = self.post.place
        if place.is_block_output and _is_pair(value):
            both = self._of_sum(*value)
            return value if both is None else type(value)(both)
        path = path_in(place.module, "output", value)
        new = self._tapped(at(value, path))
        return value if new is None else with_new(value, path, new)

    def _of_inputs(self, given: tuple) -> tuple:
        place, (args, kwargs) = self.post.place, given
        arguments = bind_arguments(place.module, args, kwargs)
        hidden, residual = _hidden_in(arguments, args, kwargs, self.post.location), arguments.get("residual")
        if place.module is place.block and isinstance(residual, Tensor):
            both = self._of_sum(hidden, residual)
            return given if both is None else _exchanged(given, {id(hidden): both[0], id(residual): both[1]})
        new = self._tapped(hidden)
        return given if new is None else _exchanged(given, {id(hidden): new})

    def _of_sum(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor] | None:
        """What is to be added to the residual stream, and that, put through the tap as their sum.

        Where it is changed, the sum goes into the one and zero into the other: what adds them gets it to the bit.
        """
        place = self.post.place
        if not self.post.adds:
            raise InterventionError(
                f"{type(place.module).__name__} passes on two tensors, and the normalisation after the blocks is none "
                f"that adds them, so what {self.post.location} is cannot be told; name a module inside of it."
            )
        state = hidden + residual
        new = self._tapped(state)
        if new is None:
            return None
        changed = (new != state).any(-1, keepdim=True)
        return torch.where(changed, new, hidden), residual.masked_fill(changed, 0)


def _is_pair(value: Any) -> bool:
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(isinstance(each, Tensor) for each in value):
        return False
    return value[0].shape == value[1].shape and value[0].is_floating_point() and value[1].is_floating_point()


def _hidden_in(arguments: Mapping[str, Any], args: tuple, kwargs: Mapping[str, Any], location: Location) -> Tensor:
    """The hidden state among arguments, of which the first are positions in most models of vLLM."""
    for value in (arguments.get("hidden_states"), *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise InterventionError(f"{location}: its module is called without a tensor to read or write; use io='output'.")


def _exchanged(given: tuple, new: Mapping[int, Tensor]) -> tuple:
    """Arguments with other tensors in place of those with these ids."""
    args, kwargs = given
    return tuple(new.get(id(each), each) for each in args), {k: new.get(id(each), each) for k, each in kwargs.items()}
