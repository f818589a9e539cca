"""Runs that end before the head of their model: its logits are computed when they are read, or part by part.

The head of a language model is the last thing that it does, and its logits, `[batch, token, vocabulary]`, are often
larger than all else in a training step. What works on a few tokens at a time need not hold them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from interventions.arguments import checked, is_whole
from interventions.endings import setting
from interventions.errors import InterventionError
from interventions.hooks.installation import is_called_plainly, opened
from interventions.hooks.scopes import Scope, Stopped, open_scopes, until_stopped
from interventions.hooks.taps import Tap
from interventions.models.answers import rule_of
from interventions.models.calls import CallContext, arguments_of, call
from interventions.models.structure import structure_of
from interventions.models.wrappers import is_sharded
from interventions.names import shown

After = Callable[[Tensor], Tensor]
"""From the output of a head to the logits of its model, entry by entry: a scaling, or a soft cap."""


@dataclass(frozen=True, eq=False)
class Deferral:
    """A head before which runs end, as `deferring_head` was given it."""

    head: nn.Module
    after: After | None
    least: int


_deferrals: ContextVar[Mapping[nn.Module, Deferral] | None] = ContextVar("_deferrals", default=None)


@checked
@contextmanager
def deferring_head(model: nn.Module, head: nn.Module, after: Any = None, *, least: Any = 1) -> Iterator[None]:
    """Let the runs of `model` inside the block, and in this thread, end before its head; `run.logits` then calls it.

    The output of such a run holds the input of the head: `output.states`, `[batch, token, dims]`. `output.answer(part)`
    returns the logits of some of them, and `output.logits` those of all, computed at the first use and kept.

    A run is whole, as outside of the block, where something would be lost: under hooks or in blocks of interventions,
    in a model that was compiled, offloaded or sharded, with a cache, with a rule for the answers (but for one that has
    `reads_logits = True`, a function that needs `output.logits` alone) or a function of the output, or where a
    requested place comes after the head.

    Args:
        model: a torch model.
        head: the module of it that ends in the logits, e.g. `model.get_output_embeddings()`.
        after: what the model does with the output of its head, entry by entry; None is nothing. Compare the logits of a
            run with those of one outside of the block.
        least: the number of tokens, over all examples, from which on a run ends before the head.

    Raises:
        InterventionError: the head is no part of the model, `after` no function, or `least` no number above 0.

    >>> from interventions import run
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 5))
    >>> with deferring_head(net, net[2]):
    ...     ran = run(net, torch.ones(4, 2))
    >>> ran.output.states.shape, ran.output.answer(ran.output.states[:1]).shape, ran.logits.shape
    (torch.Size([4, 3]), torch.Size([1, 5]), torch.Size([4, 5]))
    """
    if not structure_of(model).holds(head) or head is model:
        raise InterventionError(
            f"head={type(head).__name__} is no part of this {type(model).__name__}; give its last module, e.g. "
            "head=model.get_output_embeddings()."
        )
    if not (after is None or callable(after)) or not is_whole(least) or least < 1:
        raise InterventionError(
            f"after={shown(after)}, least={shown(least)}: after is a function of the output of the head, and least a "
            "number of tokens above 0; write deferring_head(model, head, after=lambda logits: logits / 8, least=1)."
        )
    with setting(_deferrals, {**(_deferrals.get() or {}), model: Deferral(head, after, least)}):
        yield


@dataclass(eq=False)
class Deferred:
    """The output of a run that ended before the head of its model.

    Attributes:
        states: the input of the head, `[batch, token, dims]`.
        head: the head.
        after: what the model does with its output; None is nothing.
        graded: whether the run kept a graph, which decides whether its logits have one.
        autocast: the type of device, and whether and in which precision the run computed there under autocast.
    """

    states: Tensor
    head: nn.Module
    after: After | None = None
    graded: bool = True
    autocast: tuple[str, bool, torch.dtype] = field(default=("cpu", False, torch.bfloat16), repr=False)

    @classmethod
    def of(cls, deferral: Deferral, states: Tensor) -> "Deferred":
        """Return the output of the run that just reached its head with these states."""
        return cls(states, deferral.head, deferral.after, torch.is_grad_enabled(), _autocast(states.device.type))

    def answer(self, states: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the logits of some states, `[…, classes]`, in the precision of the run.

        Args:
            states: `[…, dims]`.
            weights: tensors that take the place of parameters of the head, by name.
        """
        with self._precision():
            logits = functional_call(self.head, dict(weights), (states,)) if weights else self.head(states)
            return logits if self.after is None else _changed(logits, self.after)

    @cached_property
    def logits(self) -> Tensor:
        """The logits of all states, `[batch, token, classes]`."""
        with torch.set_grad_enabled(self.graded):
            return self.answer(self.states)

    @property
    def is_made(self) -> bool:
        """True once the logits of all states were read."""
        return "logits" in vars(self)

    def mapped(self, function: Callable[[Tensor], Any]) -> "Deferred":
        """Return the same output of other states, e.g. of some examples, or without a graph."""
        new = replace(self, states=function(self.states))
        if self.is_made:
            vars(new)["logits"] = function(self.logits)
        return new

    def detach(self) -> "Deferred":
        """Return the same output without a graph, neither to the states nor to the weights of the head."""
        new = self.mapped(Tensor.detach)
        new.graded = False
        return new

    def _precision(self) -> AbstractContextManager:
        device, enabled, dtype = self.autocast
        if _autocast(device) == self.autocast:
            return nullcontext()
        return torch.autocast(device, dtype=dtype, enabled=enabled)


def call_deferring(model: nn.Module, inputs: Any, scope: Scope, is_done: Callable[[], bool], *, whole: bool) -> Any:
    """Return the output of a model called under a scope, a `Deferred` where the run ended before the head.

    Args:
        model: the model.
        inputs: its inputs.
        scope: acts on the call.
        is_done: returns whether all that the caller wants of the run has come before the head.
        whole: whether the output itself is wanted, by a rule or a function.
    """
    deferral = None if whole else _deferral_of(model)
    if deferral is None or arguments_of(model, inputs).get("use_cache"):
        with opened(scope):
            return call(model, inputs)
    found: list[Deferred] = []

    def stop(states: Tensor, context: CallContext) -> None:
        if prod(states.shape[:-1]) >= deferral.least and is_done():
            found.append(Deferred.of(deferral, states))
            raise Stopped

    scope.taps = [*scope.taps, Tap(deferral.head, "input", stop, writes=False)]
    with until_stopped(), opened(scope):
        return call(model, inputs)
    return found[0]  # reached after `Stopped` alone


def needs_output(rule: Any) -> bool:
    """Return whether a rule for the answers needs more of an output than its logits."""
    return rule is not None and not getattr(rule, "reads_logits", False)


def _deferral_of(model: nn.Module) -> Deferral | None:
    """Return the head before which a run of a model may end; None where something would be lost."""
    deferral = (_deferrals.get() or {}).get(model)
    if deferral is None or needs_output(rule_of(model)) or open_scopes(model) or is_sharded(model):
        return None
    around = structure_of(model).around([deferral.head])
    return deferral if is_called_plainly(around, deferral.head) else None


def _changed(logits: Tensor, after: After) -> Tensor:
    """Return what a model makes of the output of its head, in one shape with it."""
    try:
        changed: Any = after(logits)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InterventionError(
            f"after={shown(after)} fails on the output of the head, {list(logits.shape)}: {reason}; give a function of "
            "one tensor: after=lambda logits: logits / 8."
        ) from error
    if not isinstance(changed, Tensor) or changed.shape != logits.shape:
        raise InterventionError(
            f"after={shown(after)} makes {shown(changed)} of the output of the head, {list(logits.shape)}; give a "
            "function entry by entry: after=lambda logits: logits / 8."
        )
    return changed


def _autocast(device: str) -> tuple[str, bool, torch.dtype]:
    """Return the type of a device, and whether and in which precision autocast is on there."""
    if not torch.amp.is_autocast_available(device):
        return device, False, torch.float32
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def calls_made(locations: Sequence[Any], activations: Any) -> bool:
    """Return whether each location was read at least once."""
    return all(activations.calls(each) for each in locations)
