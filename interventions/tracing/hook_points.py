"""Where a traced model lets one in: the two sides of a module, an operation in its forward, or its attention."""

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
    """A way into a module of a traced model."""

    def meet(self, envoy: Any, taps: Sequence[Tap], moment: CurrentCall, kept: dict[str, Any]) -> None:
        """Wait until the model comes by once more, and put what is there through the taps, one after the other.

        Args:
            kept: what it remembers from one time to the next, within a run.
        """
        ...


@dataclass(frozen=True)
class Side:
    """What a module returns, or what it is given.

    Attributes:
        io: "output" or "input".
    """

    io: str

    def meet(self, envoy: Any, taps: Sequence[Tap], moment: CurrentCall, kept: dict[str, Any]) -> None:
        passed(envoy, self.io, envoy._module, taps, moment)


@dataclass(frozen=True)
class Operation:
    """A call or an assignment in the forward of a module, or in a function that it calls.

    Attributes:
        names: of the operation, after those of the calls that it is in.
        io: "output" or "input".
    """

    names: tuple[str, ...]
    io: str

    def meet(self, envoy: Any, taps: Sequence[Tap], moment: CurrentCall, kept: dict[str, Any]) -> None:
        operation = opened(envoy, self.names)
        try:
            passed(operation, self.io, envoy._module, taps, moment)
        except InterventionError as error:
            where = f"{envoy.path} {'.'.join(self.names)}"
            raise InterventionError(str(error) if where in str(error) else f"{where}: {error}") from None


@dataclass(frozen=True)
class Function:
    """The function of transformers that an attention calls, with its query, key, value, scores, pattern and heads.

    Attributes:
        name: of the call.
        chooser: of the call that gave the function, and was given the model's own eager one.
    """

    name: str
    chooser: str

    def meet(self, envoy: Any, taps: Sequence[Tap], moment: CurrentCall, kept: dict[str, Any]) -> None:
        if not kept or kept["cache"] is not None:
            kept["cache"] = cache_in(*envoy.inputs)
        if "eager" not in kept:  # it may be called several times in one call of the module, and is chosen once
            chooser = opened(envoy, (self.chooser,))
            choice, settings = chooser.inputs
            kept["eager"] = settings["default"] if "default" in settings else choice[1]
            kept["implementation"] = chooser.output
        operation = opened(envoy, (self.name,))
        (module, *states), kwargs = operation.inputs
        change = changing(module, taps, moment, kept["cache"])
        if change.sites:
            operation.skip(attend(change, kept["implementation"], kept["eager"], *states, **kwargs))


@dataclass(frozen=True)
class Computation:
    """All that an attention computes, where it does so by products and a softmax of its own."""

    def meet(self, envoy: Any, taps: Sequence[Tap], moment: CurrentCall, kept: dict[str, Any]) -> None:
        from nnsight.intervention.source import STATE, run_body

        args, kwargs = envoy.inputs
        module = envoy._module
        change = changing(module, taps, moment, cache_in(args, kwargs))
        if change.sites:
            with changing_attention(change, products=any(tap.kind == "sdpa" for tap, _ in change.taps)):
                output = run_body(vars(module)[STATE], module, args, kwargs)
            envoy.skip(output)


def changing(module: nn.Module, taps: Sequence[Tap], moment: CurrentCall, cache: object) -> TappedAttention:
    """What is done in the call of an attention that begins."""
    mine = tuple((tap, moment) for tap in taps if tap.has_turn(moment))
    return TappedAttention(module, mine, lambda: cache if moment.stores else None)


def passed(view: Any, io: str, module: nn.Module, taps: Sequence[Tap], moment: CurrentCall) -> None:
    """Put what a module or an operation returns, or is given, through the taps."""
    if io == "input":
        given = view.inputs
        new = of_arguments(module, given, taps, moment)
        if new is not given:
            view.inputs = new
        return
    value = view.output
    new = of_output(module, value, taps, moment)
    if new is not value:
        view.output = new


def of_output(module: nn.Module, value: Any, taps: Sequence[Tap], moment: CurrentCall) -> Any:
    """What `module` returned, put through the taps; itself where none writes."""
    for tap in taps:
        if tap.has_turn(moment):
            path = path_in(module, tap.io, value)
            state = at(value, path)
            if state.ndim < 2 or (tap.writes and not state.is_floating_point()):
                raise InterventionError(
                    f"{type(module).__name__} has {state.dtype} {list(state.shape)} there, which is no activation "
                    "[batch, …, dims]; name another place."
                )
            new = tap(state, moment)
            value = value if new is None else with_new(value, path, new)
    return value


def of_arguments(module: nn.Module, given: tuple, taps: Sequence[Tap], moment: CurrentCall) -> tuple:
    """What `module` was given, put through the taps; itself where none writes."""
    for tap in taps:
        if not tap.has_turn(moment):
            continue
        args, kwargs = given
        name = argument_in(module, args, kwargs)
        new = tap(args[0] if name is None else kwargs[name], moment)
        if new is not None:
            given = with_argument(module, args, kwargs, new)
    return given


def opened(envoy: Any, names: tuple[str, ...]) -> Any:
    """An operation in the forward of a module, or in a function that it calls.

    Raises:
        InterventionError: there is none, or no source to look into.
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
