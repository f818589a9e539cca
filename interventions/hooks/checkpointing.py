"""Gradient checkpointing: the backward pass repeats parts of a forward, with what the open scopes did in it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from interventions.endings import ending, setting
from interventions.errors import InterventionError
from interventions.hooks.scopes import Scope, acting, under
from interventions.models.calls import Call, CallContext

_checkpointed: ContextVar[bool] = ContextVar("checkpointed", default=False)
Install = Callable[[Scope], None]


def is_recomputing() -> bool:
    """Return whether a backward pass is running, so that a forward now repeats an earlier one."""
    return torch._C._current_graph_task_id() != -1


def check_graded(module: nn.Module, context: CallContext) -> None:
    """Raise where an activation with its gradient is read inside a re-entrant checkpoint, in which autograd is off.

    Raises:
        InterventionError: no gradient would reach the activation.
    """
    off = context.call is not None and context.call.graded and not torch.is_grad_enabled()
    if off and not is_recomputing() and (_checkpointed.get() or _in_checkpoint(context)):
        raise InterventionError(
            f"{type(module).__name__} runs inside a re-entrant gradient checkpoint, where what is kept has no "
            "gradient; use activation_checkpointing_enable({'use_reentrant': False}), detach=True or torch.no_grad()."
        )


def check_recomputable(module: nn.Module, context: CallContext) -> None:
    """Raise for a write inside a checkpoint that the model itself makes.

    Raises:
        InterventionError: its recomputation would run without the write.
    """
    if _checkpointed.get() or torch._C._current_graph_task_id() != -1:  # as `is_recomputing`, once for each write
        return
    packing = torch._C._autograd._top_saved_tensors_default_hooks(False)
    kept = packing is not None and getattr(packing[0], "__qualname__", "").startswith("_checkpoint_hook")
    # The re-entrant kind switches autograd off and leaves no hook, only its frame on the stack.
    off = context.call is not None and context.call.graded and not torch.is_grad_enabled()
    if kept or (off and _in_checkpoint(context)):
        raise InterventionError(
            f"{type(module).__name__} runs inside torch.utils.checkpoint, called by the model itself, whose "
            "recomputation would not see what is written here; turn its checkpointing off, or run under "
            "torch.no_grad()."
        )


def _in_checkpoint(context: CallContext) -> bool:
    """Return whether the model runs inside `torch.utils.checkpoint`, by the frames on the stack."""
    return any(frame.f_code.co_filename == checkpoint.__file__ for frame in context.frames())


def checkpoint_under_scopes(
    install: Install, original: Callable, function: Callable, *args: object, **kwargs: object
) -> object:
    """Run a function under gradient checkpointing; its recomputation sees the scopes of the forward it repeats.

    Args:
        install: puts the hooks of a scope on its model again, where its block is closed by then.
        original: the checkpointing function of the model.
    """
    scopes = acting()
    if not scopes:
        return original(function, *args, **kwargs)
    states = [(scope, _copy(scope.call), scope.outside, _state_of(scope.generator)) for scope in scopes]

    def again(*args: object, **kwargs: object) -> object:
        with setting(_checkpointed, True), _reopen(install, states) if is_recomputing() else nullcontext():
            return function(*args, **kwargs)

    return original(again, *args, **kwargs)


@contextmanager
def _reopen(install: Install, states: list[tuple[Scope, Call | None, Mapping | None, Tensor | None]]) -> Iterator[None]:
    """Let scopes act inside the block, each with the call and the random states that it had in the forward."""
    now = [(scope, scope.call, scope.outside, _state_of(scope.generator), scope.recomputing) for scope, *_ in states]
    user = object()

    def end() -> None:
        for scope, call, outside, state, recomputing in now:
            _set_state(scope, call, outside, state, recomputing=recomputing)
            scope.release(user)

    with ending(end), under(tuple(scope for scope, *_ in states)):
        for scope, call, outside, state in states:
            scope.acquire(user, install)
            _set_state(scope, _copy(call), outside, state, recomputing=True)
        yield


def _set_state(
    scope: Scope, call: Call | None, outside: Mapping | None, state: Tensor | None, *, recomputing: bool
) -> None:
    """Set the running call and the random states of a scope."""
    scope.call, scope.outside, scope.recomputing = call, outside, recomputing
    if scope.generator is not None and state is not None:
        scope.generator.set_state(state)


def _copy(call: Call | None) -> Call | None:
    """Return the call as it is now: turns that are counted later are not counted in the copy."""
    return None if call is None else replace(call, turns=dict(call.turns))


def _state_of(generator: torch.Generator | None) -> Tensor | None:
    return None if generator is None else generator.get_state()
