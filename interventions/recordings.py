"""What the blocks of a model returned in one run, call by call, and how a later run takes it up from there."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from interventions.architectures import Architecture, Place
from interventions.errors import InterventionError
from interventions.hooks import Scope, Tap, hidden, open_scopes


@dataclass(eq=False)
class BlockCall:
    """One call of a block.

    Attributes:
        raw: what its forward returned, before any hook.
        state: its hidden state after all hooks, None until they ran.
        versions: of the tensors in both; another version means that the model went on in place.
        random: states of the default generators when it ended; None in eval mode.
    """

    block: nn.Module
    raw: object
    state: Tensor | None = None
    versions: tuple[int, ...] = ()
    random: dict[str, Tensor] | None = None

    @property
    def is_intact(self) -> bool:
        return self.versions == _versions(self.raw, self.state)


@dataclass(eq=False)
class Recording:
    """The block calls of one run in order, and what the model was then."""

    found: Architecture
    calls: list[BlockCall] = field(default_factory=list)
    stamp: tuple = ()
    scopes: tuple[Scope, ...] = ()

    def raw_output(self, module: nn.Module, output: object) -> None:
        """Note what a block returned."""
        training = self.found.model.training
        self.calls.append(BlockCall(module, output, random=random_states(hidden(output)) if training else None))

    def taps(self) -> list[Tap]:
        """What notes the hidden states after the hooks of the user."""
        return [Tap(block, "output", self._state) for block in self.found.blocks]

    def _state(self, state: Tensor, scope: Scope) -> None:
        if not scope.recomputing:
            last = self.calls[-1]
            last.state, last.versions = state, _versions(last.raw, state)

    def close(self) -> None:
        """Note what the model and the open blocks are at the end of the run."""
        self.stamp, self.scopes = stamp(self.found.model), open_scopes(self.found.model)

    def state(self, place: Place) -> Tensor | None:
        """The output of a block, if it ran once and nobody wrote into it since."""
        calls = [call for call in self.calls if call.block is place.block] if place.is_block_output else []
        return calls[0].state if len(calls) == 1 and calls[0].is_intact else None

    def reusable(self, places: Sequence[Place]) -> int:
        """How many of the calls come before anything that is written at `places`, so that they need not run again."""
        if self.scopes != open_scopes(self.found.model):
            return 0
        count = min((self._before(place) for place in places), default=0)
        return count if all(call.is_intact for call in self.calls[:count]) else 0

    def _before(self, place: Place) -> int:
        first = next((i for i, call in enumerate(self.calls) if call.block is place.block), None)
        if first is None:
            return 0
        return first + 1 if place.is_block_output else first

    def check_fresh(self) -> None:
        """Raise if the weights or the mode of the model changed since the run."""
        if self.stamp != stamp(self.found.model):
            raise InterventionError(
                "the base run is older than the model: its weights or its train/eval mode changed since; run it again: "
                "base = run(model, inputs)."
            )


@dataclass(eq=False)
class Replay:
    """Gives the first `count` recorded calls to the blocks that would run; the rest runs.

    In train mode the default generators are set, at the end of the last recorded call, to where they were then, so that
    dropout above is that of the base run; operators go on drawing from the generators as they were before.
    """

    recording: Recording
    count: int
    done: int = 0
    outside: dict[str, Tensor] | None = None
    inside: bool = False

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return tuple(dict.fromkeys(call.block for call in self.recording.calls[: self.count]))

    def __call__(self, module: nn.Module) -> object:
        if self.done == self.count:
            raise LookupError
        call = self.recording.calls[self.done]
        if call.block is not module:
            raise InterventionError(
                "the blocks ran in another order than in the base run (layer drop?); pass resume=False."
            )
        self.done += 1
        if self.done == self.count and call.random is not None:
            set_random_states(call.random)
            self.inside = True
        return call.raw

    @contextmanager
    def surrounding(self) -> Iterator[None]:
        """Leave the default generators as they were, but for what operators draw."""
        training = self.count > 0 and self.recording.calls[0].random is not None
        self.outside = random_states(hidden(self.recording.calls[0].raw)) if training else None
        try:
            yield
        finally:
            if self.outside is not None:
                set_random_states(self.outside)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Let an operator draw from the generators as they are outside of the resumed run."""
        if not self.inside:
            yield
            return
        inner = random_states(hidden(self.recording.calls[0].raw))
        set_random_states(self.outside)
        try:
            yield
        finally:
            self.outside = random_states(hidden(self.recording.calls[0].raw))
            set_random_states(inner)


def stamp(model: nn.Module) -> tuple:
    """What changes when weights are updated or a module goes from train to eval mode."""
    versions = sum(0 if p.is_inference() else p._version for p in model.parameters())
    return versions, hash(tuple(module.training for module in model.modules()))


def random_states(near: Tensor | None) -> dict[str, Tensor]:
    """The states of torch's default generators: the CPU's and that of the device where `near` is."""
    states = {"cpu": torch.get_rng_state()}
    if near is not None and near.device.type == "cuda":
        states[str(near.device)] = torch.cuda.get_rng_state(near.device)
    return states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Set torch's default generators."""
    for device, state in states.items():
        torch.set_rng_state(state) if device == "cpu" else torch.cuda.set_rng_state(state, device)


def _versions(*values: object) -> tuple[int, ...]:
    found: list[int] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(-1 if value.is_inference() else value._version)
        elif isinstance(value, Mapping):
            found += _versions(*value.values())
        elif isinstance(value, tuple | list):
            found += _versions(*value)
    return tuple(found)
