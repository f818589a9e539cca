"""Doors of a traced model, where taps act: the two sides of a module, an operation in its forward, its attention."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from interventions.errors import InterventionError
from interventions.hooks.attention import attend, changing_attention
from interventions.hooks.attention_taps import TappedAttention
from interventions.hooks.states import argument_in, at, path_in, with_argument, with_new
from interventions.hooks.taps import Tap
from interventions.tracing.current_call import CurrentCall, cache_in


@runtime_checkable
class Door(Protocol):
    """A way into a module of a traced model, at which taps read and write."""

    def meet(self, envoy: Any, taps: Sequence[Tap], current: CurrentCall, memory: dict[str, Any]) -> None:
        """Wait until the model comes by once more, and put the tensor there through the taps, one after the other.

        Args:
            envoy: nnsight's view of the module.
            taps: those that act in this run.
            current: the current call of the model.
            memory: what the door remembers from one time to the next within a run.
        """
        ...


@dataclass(frozen=True)
class Side:
    """The output of a module, or its first input.

    Attributes:
        io: "output" or "input".
    """

    io: str

    def meet(self, envoy: Any, taps: Sequence[Tap], current: CurrentCall, memory: dict[str, Any]) -> None:
        apply(envoy, self.io, envoy._module, taps, current)


@dataclass(frozen=True)
class Operation:
    """A call or an assignment in the forward of a module, or in a function that it calls.

    Attributes:
        names: the name of the operation, after those of the calls that it is in.
        io: "output" or "input".
    """

    names: tuple[str, ...]
    io: str

    def meet(self, envoy: Any, taps: Sequence[Tap], current: CurrentCall, memory: dict[str, Any]) -> None:
        operation = open_operation(envoy, self.names)
        try:
            apply(operation, self.io, envoy._module, taps, current)
        except InterventionError as error:
            where = f"{envoy.path} {'.'.join(self.names)}"
            raise InterventionError(str(error) if where in str(error) else f"{where}: {error}") from None


@dataclass(frozen=True)
class Function:
    """The attention function of transformers that a module calls, with query, key, value, scores, pattern and heads.

    Attributes:
        name: the name of the call.
        chooser: the name of the call that chose the function, among whose arguments is the model's eager one.
    """

    name: str
    chooser: str

    def meet(self, envoy: Any, taps: Sequence[Tap], current: CurrentCall, memory: dict[str, Any]) -> None:
        if not memory or memory["cache"] is not None:
            memory["cache"] = cache_in(*envoy.inputs)
        if "eager" not in memory:  # a module may call the function several times, and chooses it once
            chooser = open_operation(envoy, (self.chooser,))
            choice, settings = chooser.inputs
            memory["eager"] = settings["default"] if "default" in settings else choice[1]
            memory["implementation"] = chooser.output
        operation = open_operation(envoy, (self.name,))
        (module, *states), kwargs = operation.inputs
        change = tapped_attention(module, taps, current, memory["cache"])
        if change.sites:
            operation.skip(attend(change, memory["implementation"], memory["eager"], *states, **kwargs))


@dataclass(frozen=True)
class Computation:
    """The whole forward of an attention that computes its products and softmax itself."""

    def meet(self, envoy: Any, taps: Sequence[Tap], current: CurrentCall, memory: dict[str, Any]) -> None:
        from nnsight.intervention.source import STATE, run_body

        args, kwargs = envoy.inputs
        module = envoy._module
        change = tapped_attention(module, taps, current, cache_in(args, kwargs))
        if change.sites:
            with changing_attention(change, products=any(tap.kind == "sdpa" for tap, _ in change.taps)):
                output = run_body(vars(module)[STATE], module, args, kwargs)
            envoy.skip(output)


def tapped_attention(module: nn.Module, taps: Sequence[Tap], current: CurrentCall, cache: object) -> TappedAttention:
    """Return the call of an attention that begins, with the taps that act in it."""
    acting = tuple((tap, current) for tap in taps if tap.has_turn(current))
    return TappedAttention(module, acting, lambda: cache if current.stores else None)


def apply(view: Any, io: str, module: nn.Module, taps: Sequence[Tap], current: CurrentCall) -> None:
    """Put the output, or the arguments, of a module or an operation through the taps."""
    if io == "input":
        arguments = view.inputs
        new = apply_to_arguments(module, arguments, taps, current)
        if new is not arguments:
            view.inputs = new
        return
    value = view.output
    new = apply_to_output(module, value, taps, current)
    if new is not value:
        view.output = new


def apply_to_output(module: nn.Module, value: Any, taps: Sequence[Tap], current: CurrentCall) -> Any:
    """Return what `module` returned after the taps; the same object if none of them writes."""
    for tap in taps:
        if tap.has_turn(current):
            path = path_in(module, tap.io, value)
            state = at(value, path)
            if state.ndim < 2 or (tap.writes and not state.is_floating_point()):
                raise InterventionError(
                    f"{type(module).__name__} has {state.dtype} {list(state.shape)} there, which is no activation "
                    "[batch, …, dims]; name another place."
                )
            new = tap(state, current)
            value = value if new is None else with_new(value, path, new)
    return value


def apply_to_arguments(module: nn.Module, arguments: tuple, taps: Sequence[Tap], current: CurrentCall) -> tuple:
    """Return `(args, kwargs)` of `module` after the taps; the same object if none of them writes."""
    for tap in taps:
        if not tap.has_turn(current):
            continue
        args, kwargs = arguments
        name = argument_in(module, args, kwargs)
        new = tap(args[0] if name is None else kwargs[name], current)
        if new is not None:
            arguments = with_argument(module, args, kwargs, new)
    return arguments


def open_operation(envoy: Any, names: tuple[str, ...]) -> Any:
    """Return nnsight's view of an operation in the forward of a module, or in a function that it calls.

    Raises:
        InterventionError: there is no such operation, or no source text to look it up in.
    """
    from nnsight.intervention.source import SourceNotAvailable

    found, where = envoy, envoy.path
    for name in names:
        try:
            source = found.source
        except SourceNotAvailable as error:
            raise InterventionError(
                f"{where} cannot be opened: {error}; name an operation outside of it, or the output of a module."
            ) from None
        if name not in source.names:
            near = difflib.get_close_matches(name, source.names, n=5, cutoff=0.0)
            raise InterventionError(
                f"{where} has no operation {name!r}; of its {len(source.names)}, these are near: "
                f"{', '.join(near) or 'none'}."
            )
        found, where = getattr(source, name), f"{where}.{name}"
    return found
