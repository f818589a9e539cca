"""The base run of several counterfactuals at once: its inputs and what its blocks returned, repeated for each of them.

A counterfactual resumes from what the blocks returned in the base run. Several of them in one batch need the same for
each of their copies of the examples, which is repeated and not computed again.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from interventions.errors import InterventionError
from interventions.execution.examples import examples_in
from interventions.execution.recordings import BlockCall, map_tensors
from interventions.execution.run import Inputs, Run, rows_of
from interventions.hooks.states import hidden
from interventions.models.axes import axes_of, axis
from interventions.models.overrides import exception_for
from interventions.runs import run

Axes = list[int | None]
"""The axis of the examples in each tensor of a value, in order; None in a tensor that all examples share."""
_PLAIN = (Tensor, bool, int, float, str, type(None))


@dataclass(eq=False)
class RepeatedBase:
    """The base run with all of its examples repeated.

    Where a block returns its hidden state alone, the axis of the examples is known. What else it returns is compared
    with what it returns for twice the examples, in one more run: an axis that is twice as long holds the examples.
    Where that does not say it, the base runs anew for each number of times.

    Attributes:
        base: the base run.
        options: arguments that every run of the model is called with besides the inputs.
    """

    base: Run
    options: Mapping[str, object] = field(default_factory=dict)
    _times: int = 0
    _calls: list[BlockCall] = field(default_factory=list)
    _anew: dict[int, Run] = field(default_factory=dict)

    def times(self, times: int, first: int) -> Run:
        """Return the base run repeated, with what its first calls of blocks returned.

        Args:
            times: the number of times.
            first: the number of calls that are not run again.
        """
        inputs = self._inputs(times)
        if times == 1 or self.base.recording is None:
            return replace(self.base, inputs=inputs, output=None)
        if self._axes is None and first:
            if times not in self._anew:
                self._anew[times] = replace(run(self.base.model, inputs), output=None)
            return self._anew[times]
        if times != self._times:
            self._times, self._calls = times, []
        calls = self.base.recording.calls
        for number in range(len(self._calls), first):
            raw = _repeat(calls[number].raw, (self._axes or [])[number], times)
            self._calls.append(calls[number].with_output(raw))
        # The later calls run again, so what they returned is not needed; their blocks are, to find places by.
        later = [call.with_output(None) for call in calls[first:]]
        recording = replace(self.base.recording, calls=[*self._calls[:first], *later])
        return replace(self.base, inputs=inputs, output=None, activations={}, recording=recording)

    def _inputs(self, times: int) -> Inputs:
        """Return the inputs of the base repeated, with the options."""
        examples = examples_in(self.base.inputs)
        rows = torch.arange(examples).repeat(times)
        inputs: Any = self.base.inputs if times == 1 else rows_of(self.base.inputs, rows)
        return {**inputs, **self.options} if self.options else inputs

    @cached_property
    def _axes(self) -> list[Axes] | None:
        """The axes of the examples in what each call of a block returned; None where they are not known."""
        assert self.base.recording is not None
        calls = self.base.recording.calls
        found = [self._axes_of_state(call) for call in calls]
        if None not in found:
            return [axes for axes in found if axes is not None]
        if not all(_is_plain(call.raw) for call in calls):
            return None
        twice = run(self.base.model, self._inputs(2)).recording
        if twice is None or [call.block for call in twice.calls] != [call.block for call in calls]:
            return None
        compared = [_compare(call.raw, other.raw) for call, other in zip(calls, twice.calls, strict=True)]
        return None if None in compared else [axes for axes in compared if axes is not None]

    def _axes_of_state(self, call: BlockCall) -> Axes | None:
        """Return the axis of the examples of a call that returned its hidden state alone; None for any other."""
        values = list(_values(call.raw))
        tensors = [value for value in values if isinstance(value, Tensor)]
        exception, state = exception_for(self.base.model), hidden(call.raw)
        if state is None or len(tensors) != 1 or not _is_plain(call.raw) or (exception is not None and exception.axes):
            return None
        try:
            number = axis(axes_of(call.block, state), "b")
        except InterventionError:
            return None
        return [number] if tensors[0].shape[number] == examples_in(self.base.inputs) else None


def _repeat(value: object, axes: Axes, times: int) -> object:
    """Return a value with the examples of each tensor repeated."""
    each = iter(axes)

    def repeat(tensor: Tensor) -> Tensor:
        number = next(each)
        return tensor if number is None else torch.cat([tensor] * times, number)

    return map_tensors(repeat, value)


def _compare(value: object, twice: object) -> Axes | None:
    """Return the axes of the examples, from values for some examples and for twice as many; None where unclear."""
    tensors, others = ([each for each in _values(given) if isinstance(each, Tensor)] for given in (value, twice))
    if len(tensors) != len(others):
        return None
    found: Axes = []
    for one, two in zip(tensors, others, strict=True):
        if one.ndim != two.ndim:
            return None
        longer = [number for number in range(one.ndim) if one.shape[number] != two.shape[number]]
        if len(longer) > 1 or any(two.shape[number] != 2 * one.shape[number] for number in longer):
            return None
        found.append(longer[0] if longer else None)
    return found


def _is_plain(value: object) -> bool:
    """Return whether a value holds tensors, numbers and texts alone, in tuples, lists and mappings."""
    return all(isinstance(each, _PLAIN) for each in _values(value))


def _values(value: object) -> Iterator[object]:
    """Yield what is in a value, in the order of `map_tensors`, which looks into tuples, lists and mappings."""
    if isinstance(value, Mapping):
        for entry in value.values():
            yield from _values(entry)
    elif type(value) in (tuple, list):
        for entry in value:  # type: ignore[attr-defined]
            yield from _values(entry)
    else:
        yield value
