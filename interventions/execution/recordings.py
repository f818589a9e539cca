"""Record the outputs of the blocks of a model in one run, and resume a later run from them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from interventions.endings import ending
from interventions.errors import InterventionError
from interventions.execution.deferring import Deferred
from interventions.hooks.installation import user_hooks
from interventions.hooks.scopes import Scope, open_scopes
from interventions.hooks.states import hidden
from interventions.hooks.taps import Tap
from interventions.models.architectures import Architecture
from interventions.models.calls import CallContext
from interventions.models.places import Place


@dataclass(eq=False)
class BlockCall:
    """One recorded call of a block.

    Attributes:
        block: the block.
        raw: the output of its forward, before any hook.
        state: its hidden state after all hooks; None where it returned none.
        versions: the versions of the tensors in both; another version means that they were changed in place.
        random: the states of the default generators at its end; None in eval mode.
    """

    block: nn.Module
    raw: object
    state: Tensor | None = None
    versions: tuple[int, ...] = ()
    random: dict[torch.device, Tensor] | None = None

    @property
    def is_intact(self) -> bool:
        """True unless the output was changed in place since."""
        return self.versions == _versions(self.raw, self.state)

    def with_output(self, raw: object) -> "BlockCall":
        """Return the same call of the block with another output."""
        return BlockCall(self.block, raw, versions=_versions(raw), random=self.random)


def _are_intact(calls: Sequence[BlockCall]) -> bool:
    """Return whether no output of these calls was changed in place since; tensors are compared all at once."""
    whole = [
        call for call in calls if call.raw is call.state and isinstance(call.raw, Tensor) and call.versions[0] >= 0
    ]
    raws: Any = [call.raw for call in whole]
    if [(each._version,) * 2 for each in raws] != [call.versions for call in whole]:
        return False
    return len(whole) == len(calls) or all(call.is_intact for call in calls)


@dataclass(eq=False)
class Recording:
    """The block calls of one run in order, with the random states, scopes and hooks under which it was made.

    Attributes:
        found: the model.
        random: the states of the default generators at the start of the run; None in eval mode.
        calls: the calls of its blocks.
        scopes: the scopes open on the model.
        hooks: the ids of the hooks of the user.
        stops: whether the run stopped before its end, so that a block without a call comes after all that have one.
    """

    found: Architecture
    random: dict[torch.device, Tensor] | None = None
    calls: list[BlockCall] = field(default_factory=list)
    scopes: tuple[Scope, ...] = ()
    hooks: tuple[int, ...] = ()
    stops: bool = False
    _raw_state: Tensor | None = field(default=None, repr=False)

    @classmethod
    def begin(cls, found: Architecture, *, like: "Recording | None" = None) -> "Recording":
        """Return the recording of a run that begins now.

        Args:
            found: the model.
            like: a recording of the model as it is, whose modules are in the same modes.
        """
        training = found.structure.any_trains() if like is None else like.random is not None
        if not training:
            return cls(found)
        devices = {torch.device("cpu")}
        if torch.cuda.is_initialized():  # else no parameter is there, and all need not be looked at
            devices |= {p.device for p in found.model.parameters() if p.device.type == "cuda"}
        return cls(found, random_states(devices))

    def begin_with(self, calls: Sequence[BlockCall]) -> None:
        """Take over calls of an earlier run, which are answered in this one as they were."""
        self.calls.extend(calls)

    def raw_output(self, module: nn.Module, output: object) -> None:
        """Record the output of a block, which is its state as well unless hooks change it later."""
        random = None if self.random is None else random_states(self.random)
        if isinstance(output, Tensor) and not output.is_inference():
            version = output._version
            self.calls.append(BlockCall(module, output, output, (version, version), random))
            return
        raw = copy_inference_tensors(output)
        self.calls.append(BlockCall(module, raw, hidden(raw), _versions(output, hidden(output)), random))
        self._raw_state = hidden(output)

    def taps(self, blocks: Iterable[nn.Module]) -> list[Tap]:
        """Return the taps that record the hidden states of blocks after other hooks on them."""
        return [Tap(block, "output", self._record_state) for block in blocks]

    def _record_state(self, state: Tensor, context: CallContext) -> None:
        """Record the hidden state of the block that ran last, where a hook has changed it."""
        last = self.calls[-1]
        if not context.recomputing and state is not self._raw_state and state is not last.state:
            last.state = copy_inference_tensors(state)
            last.versions = _versions(last.raw, state)
        self._raw_state = None

    def detach(self) -> "Recording":
        """Return the same recording, cut off from the graph."""
        cut = [replace(call, raw=detach_tensors(call.raw), state=detach_tensors(call.state)) for call in self.calls]
        return replace(self, calls=cut)

    def close(self) -> None:
        """Record the scopes and the hooks at the end of the run."""
        self.scopes, self.hooks = open_scopes(self.found.model), user_hooks(self.found.model)

    def state(self, place: Place) -> Tensor | None:
        """Return the output of a block that ran once and was not changed in place since; None of any other place."""
        if not place.is_block_output or not self.runs_once(place):
            return None
        call = self.calls[self._turns(place)[0]]
        return call.state if call.is_intact else None

    def runs_once(self, place: Place) -> bool:
        """Return whether the place is the input or output of a block that ran once."""
        return place.module is place.block and len(self._turns(place)) == 1

    def _turns(self, place: Place) -> list[int]:
        """Return the numbers of the calls of the block of a place: of one call, where layers share the block."""
        turns = [i for i, call in enumerate(self.calls) if call.block is place.block]
        return turns if place.turn is None else turns[place.turn : place.turn + 1]

    def reusable(self, writes: Sequence[Place], reads: Sequence[Place] = ()) -> int:
        """Return how many calls come before any block that is written, or read inside, and need not run again."""
        if (
            not self.found.resumes
            or self.scopes != open_scopes(self.found.model)
            or self.hooks != user_hooks(self.found.model)
        ):
            return 0
        inside = [place for place in reads if place.block not in (None, place.module)]
        count = min(map(self._before, [*writes, *inside]), default=0)
        return count if _are_intact(self.calls[:count]) else 0

    def _before(self, place: Place) -> int:
        """Return how many calls of blocks come before a place."""
        if place.stack is not None:  # after all blocks of a stack
            return max((i + 1 for i, call in enumerate(self.calls) if call.block in place.stack.blocks), default=0)
        turns = self._turns(place)
        if not turns:
            return len(self.calls) if self.stops and place.block is not None else 0
        return turns[0] + 1 if place.is_block_output else turns[0]


@dataclass(eq=False)
class Replay:
    """Answers the first `count` calls of blocks with their recorded outputs; the later ones run.

    In train mode the default generators are set to their recorded states at the start and at the end of each answered
    call, so that dropout elsewhere is that of the base run. Operators draw from the generators as they were before.

    Attributes:
        recording: the recorded calls.
        count: how many of them are answered.
        done: how many have been.
    """

    recording: Recording
    count: int
    done: int = 0

    @cached_property
    def blocks(self) -> dict[nn.Module, None]:
        """The blocks that are skipped at least once, in the order of their calls."""
        return dict.fromkeys(self.blocks_called)

    @property
    def takes_over(self) -> bool:
        """True where the skipped calls are those of the base run to the last hook, and no skipped block runs later."""
        later = {call.block for call in self.recording.calls[self.count :]}
        return not (self.recording.scopes or self.recording.hooks) and later.isdisjoint(self.blocks)

    @cached_property
    def blocks_called(self) -> tuple[nn.Module, ...]:
        """The block of each call that is skipped."""
        return tuple([call.block for call in self.recording.calls[: self.count]])

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
        if isinstance(call.raw, Tensor) and call.versions[0] >= 0:
            return call.raw
        return copy_inference_tensors(call.raw)

    @contextmanager
    def surrounding(self, scope: Scope) -> Iterator[None]:
        """Set the default generators to those of the base run inside the block, and back after it.

        What operators draw in between, they draw from the generators outside.
        """
        if self.recording.random is None:
            yield
            return
        scope.outside = random_states(self.recording.random)
        with ending(lambda: set_random_states(scope.outside or {})):
            set_random_states(self.recording.random)
            yield


@contextmanager
def drawing_outside(scope: Scope) -> Iterator[None]:
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
    """Return the states of torch's default generators on these devices."""
    return {at: torch.get_rng_state() if at.type == "cpu" else torch.cuda.get_rng_state(at) for at in devices}


def set_random_states(states: Mapping[torch.device, Tensor]) -> None:
    """Set the states of torch's default generators."""
    for device, state in states.items():
        torch.set_rng_state(state) if device.type == "cpu" else torch.cuda.set_rng_state(state, device)


def copy_inference_tensors(value: Any) -> Any:
    """Return `value` with copies of its inference tensors, which keep no count of changes in place."""
    return map_tensors(lambda tensor: tensor.clone() if tensor.is_inference() else tensor, value)


def detach_tensors(value: Any) -> Any:
    """Return `value` with its tensors cut off from the graph, also from that to the weights of a head that waits."""
    if isinstance(value, Deferred):
        return value.detach()
    return map_tensors(Tensor.detach, value)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return `value` with a function applied to each tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Deferred):
        return value.mapped(function)
    if isinstance(value, Mapping):
        entries = {key: map_tensors(function, entry) for key, entry in value.items()}
        return type(value)(**entries) if hasattr(value, "to_tuple") else entries
    return type(value)(map_tensors(function, entry) for entry in value) if type(value) in (tuple, list) else value


def _versions(*values: object) -> tuple[int, ...]:
    """Return the versions of all tensors in values: −1 for inference tensors, which have none."""
    found: list[int] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(-1 if value.is_inference() else value._version)
        elif isinstance(value, Mapping):
            found += _versions(*value.values())
        elif isinstance(value, tuple | list):
            found += _versions(*value)
    return tuple(found)
