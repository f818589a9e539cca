"""What the blocks of a model returned in one run, call by call, and how a later run takes it up from there."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from interventions.endings import ending
from interventions.errors import InterventionError
from interventions.hooks.hooks import Scope, Tap, open_scopes, user_hooks
from interventions.hooks.states import hidden
from interventions.models.architectures import Architecture
from interventions.models.modules import modules_of
from interventions.models.places import Place


@dataclass(eq=False)
class BlockCall:
    """One call of a block.

    Attributes:
        raw: what its forward returned, before any hook.
        state: its hidden state after all hooks, None until they ran.
        versions: of the tensors in both; another version means that a hook or the model went on in place.
        random: states of the default generators when it ended; None in eval mode.
    """

    block: nn.Module
    raw: object
    state: Tensor | None = None
    versions: tuple[int, ...] = ()
    random: dict[torch.device, Tensor] | None = None

    @property
    def is_intact(self) -> bool:
        """Whether nobody wrote into what it returned."""
        return self.versions == _versions(self.raw, self.state)


@dataclass(eq=False)
class Recording:
    """The block calls of one run in order, and what the model was then.

    Attributes:
        random: states of the default generators when the run began; None in eval mode.
        scopes, hooks: the blocks open on the model and the hooks of the user.
    """

    found: Architecture
    random: dict[torch.device, Tensor] | None = None
    calls: list[BlockCall] = field(default_factory=list)
    scopes: tuple[Scope, ...] = ()
    hooks: tuple[int, ...] = ()
    _given: Tensor | None = field(default=None, repr=False)

    @classmethod
    def begin(cls, found: Architecture) -> "Recording":
        """The recording of a run that begins now."""
        training = any(module.training for module in modules_of(found.model))
        devices = {torch.device("cpu"), *(p.device for p in found.model.parameters() if p.device.type == "cuda")}
        return cls(found, random_states(devices) if training else None)

    def raw_output(self, module: nn.Module, output: object) -> None:
        """Note what a block returned."""
        random = None if self.random is None else random_states(self.random)
        self._given = hidden(output)
        self.calls.append(BlockCall(module, own(output), versions=_versions(output), random=random))

    def taps(self) -> list[Tap]:
        """What notes the hidden states after the hooks of the user."""
        return [Tap(block, "output", self._state) for block in self.found.blocks]

    def _state(self, state: Tensor, scope: Scope) -> None:
        if not scope.recomputing:
            last = self.calls[-1]
            last.state = hidden(last.raw) if state is self._given else own(state)
            last.versions += _versions(state)
            self._given = None

    def detach(self) -> "Recording":
        """The same recording, cut off from the graph."""
        cut = [replace(call, raw=detached(call.raw), state=detached(call.state)) for call in self.calls]
        return replace(self, calls=cut)

    def close(self) -> None:
        """Note the open blocks and the hooks at the end of the run."""
        self.scopes, self.hooks = open_scopes(self.found.model), user_hooks(self.found.model)

    def state(self, place: Place) -> Tensor | None:
        """The output of a block, if it ran once and nobody wrote into it since."""
        if not place.is_block_output or not self.runs_once(place):
            return None
        call = self.calls[self._turns(place)[0]]
        return call.state if call.is_intact else None

    def runs_once(self, place: Place) -> bool:
        """Whether the place is that of a block which ran once."""
        return place.module is place.block and len(self._turns(place)) == 1

    def _turns(self, place: Place) -> list[int]:
        """Which of the calls are of the block of a place: one, where layers share it."""
        turns = [i for i, call in enumerate(self.calls) if call.block is place.block]
        return turns if place.turn is None else turns[place.turn : place.turn + 1]

    def reusable(self, writes: Sequence[Place], reads: Sequence[Place] = ()) -> int:
        """How many of the calls come before any block that is written, or read inside, and need not run again."""
        if (
            not self.found.resumes
            or self.scopes != open_scopes(self.found.model)
            or self.hooks != user_hooks(self.found.model)
        ):
            return 0
        inside = [place for place in reads if place.block not in (None, place.module)]
        count = min(map(self._before, [*writes, *inside]), default=0)
        return count if all(call.is_intact for call in self.calls[:count]) else 0

    def _before(self, place: Place) -> int:
        if place.stack is not None:  # it comes after all blocks of a stack
            return max((i + 1 for i, call in enumerate(self.calls) if call.block in place.stack.blocks), default=0)
        turns = self._turns(place)
        if not turns:
            return 0
        return turns[0] + 1 if place.is_block_output else turns[0]


@dataclass(eq=False)
class Replay:
    """Gives the first `count` recorded calls to the blocks that would run; the rest runs.

    In train mode the default generators are set, at the start and at the end of each recorded call, to where they were
    then, so that dropout elsewhere is that of the base run; operators draw from the generators as they were before.
    """

    recording: Recording
    count: int
    done: int = 0

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The blocks that are skipped at least once."""
        return tuple(dict.fromkeys(self.blocks_called))

    @property
    def blocks_called(self) -> tuple[nn.Module, ...]:
        """The block of each call that is skipped."""
        return tuple(call.block for call in self.recording.calls[: self.count])

    def __call__(self, module: nn.Module) -> object:
        if self.done == self.count:
            raise LookupError
        call = self.recording.calls[self.done]
        if call.block is not module:
            raise InterventionError(
                "the blocks ran in another order than in the base run (layer drop?); pass resume=False."
            )
        self.done += 1
        if call.random is not None:
            set_random_states(call.random)
        return own(call.raw)

    @contextmanager
    def surrounding(self, scope: Scope) -> Iterator[None]:
        """Leave the default generators as they were, but for what operators draw."""
        if self.recording.random is None:
            yield
            return
        scope.outside = random_states(self.recording.random)
        with ending(lambda: set_random_states(scope.outside or {})):
            set_random_states(self.recording.random)
            yield


@contextmanager
def drawing(scope: Scope) -> Iterator[None]:
    """Let an operator draw from the default generators as they are outside of a resumed run."""
    if scope.outside is None:
        yield
        return
    inside = random_states(scope.outside)
    with ending(lambda: set_random_states(inside)):
        set_random_states(scope.outside)
        try:
            yield
        finally:
            scope.outside = random_states(scope.outside)


def random_states(devices: Iterable[torch.device]) -> dict[torch.device, Tensor]:
    """The states of torch's default generators."""
    return {at: torch.get_rng_state() if at.type == "cpu" else torch.cuda.get_rng_state(at) for at in devices}


def set_random_states(states: Mapping[torch.device, Tensor]) -> None:
    """Set torch's default generators."""
    for device, state in states.items():
        torch.set_rng_state(state) if device.type == "cpu" else torch.cuda.set_rng_state(state, device)


def own(value: Any) -> Any:
    """`value`, with copies of those tensors in which nobody could see that the model went on in place."""
    return mapped(lambda tensor: tensor.clone() if tensor.is_inference() else tensor, value)


def detached(value: Any) -> Any:
    """`value` with its tensors cut off from the graph."""
    return mapped(Tensor.detach, value)


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with each tensor in it put through a function."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        entries = {key: mapped(function, entry) for key, entry in value.items()}
        return type(value)(**entries) if hasattr(value, "to_tuple") else entries
    return type(value)(mapped(function, entry) for entry in value) if type(value) in (tuple, list) else value


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
