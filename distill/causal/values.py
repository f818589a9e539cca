"""Batches of values of variables: their checks, functions of the user that compute them, and their form in errors."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distill.errors import DistillError, did_you_mean

Values = Mapping[str, Tensor]
"""The value of each of some variables, `[batch]` or `[batch, ...]`."""


class Computed(dict[str, Tensor]):
    """Values of variables as a causal model drew or computed and checked them; a copy of it is a plain dict.

    Args:
        values: of all variables, or of the inputs.
        by: what computed them.
    """

    def __init__(self, values: Values, by: object) -> None:
        super().__init__(values)
        counted = not any(value.is_inference() for value in values.values())
        self.by, self._made = by, {name: (each, each._version) for name, each in values.items()} if counted else None

    def is_of(self, by: object) -> bool:
        """Return whether the values are those that `by` computed: none was replaced, or written in place."""
        if self.by is not by or self._made is None or self.keys() != self._made.keys():
            return False
        return all(self[name] is made and made._version == version for name, (made, version) in self._made.items())

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def moved(values: Values, device: torch.device) -> Values:
    """Return values on a device, without a wait for it; what a causal model computed needs no check there either."""
    there = {name: value.to(device, non_blocking=True) for name, value in values.items()}
    if isinstance(values, Computed) and values.is_of(values.by):
        return Computed(there, values.by)
    return there


BATCHED = "it gets batched tensors on the device of the model, so index tables as table.to(values.device)[values]"


def call(what: str, function: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
    """Call a function of the user on a batch; an error says which function failed.

    Raises:
        DistillError: the function failed.
    """
    return call_or_explain(what, BATCHED, function, *args, **named)


def call_or_explain(what: str, way_out: str, function: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
    """Call a function of the user; an error says which function failed, and the way out.

    Raises:
        DistillError: the function failed.
    """
    try:
        return function(*args, **named)
    except DistillError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise DistillError(f"{what} failed, {type(error).__name__}: {lines[0]}; {way_out}.") from error


def describe(value: object) -> str:
    """Return a value as an error shows it: its shape, dtype and device."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype} on {value.device}"
    return f"an object of type {type(value).__name__}"


def describe_rows(value: Tensor) -> str:
    """Return the number of examples of a value as an error shows it."""
    return f"{len(value)} examples on {value.device}"


def on_device(device: torch.device | str | None) -> torch.device | None:
    """Return the device of this name; None stays None.

    Raises:
        DistillError: this machine has no such device.
    """
    if device is None:
        return None
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).strip().splitlines() or [""]
        raise DistillError(f"device={str(device)!r} is not here ({why[0]}); use one that is: device='cpu'.") from None


def as_answers(logits: Tensor, answers: Tensor) -> Tensor:
    """Return a network's real-valued answers in the shape of those of a causal model.

    Raises:
        DistillError: more or fewer numbers.
    """
    if logits.numel() != answers.numel():
        raise DistillError(
            f"the causal model answers with {describe(answers)} and the network with {describe(logits)}; give its "
            f"last layer {answers[0].numel()} outputs, or CausalModel(…, decode=…)."
        )
    return logits.reshape(answers.shape)


def one_batch(values: Any, names: tuple[str, ...], variables: tuple[str, ...], what: str) -> dict[str, Tensor]:
    """Return the values of exactly these variables, after a check that they are one batch on one device.

    Args:
        values: the values to check.
        names: the variables that they must have.
        variables: all variables of the model.
        what: the beginning of an error, as "the values hold".

    Raises:
        DistillError: a variable too many or missing, no tensor, or batches of different sizes or devices.
    """
    if not isinstance(values, Mapping):
        raise DistillError(f"{what} {describe(values)}; give a dict {{name: tensor}} of {', '.join(names)}.")
    for name in values:
        if name not in names:
            way_out = f"fix it with interchange(base, {{{name!r}: source}})"
            raise DistillError(
                f"{what} {name!r}, which is none of {', '.join(names)}{did_you_mean(str(name), names)}; "
                f"{way_out if name in variables else 'leave it out'}."
            )
    for name in names:
        if name not in values:
            raise DistillError(f"{what} no {name!r}; give a tensor of {', '.join(names)} each.")
        if not isinstance(values[name], Tensor) or not values[name].ndim:
            raise DistillError(
                f"{what} {describe(values[name])} as {name!r}; give a tensor [batch], as torch.tensor([...])."
            )
        first = values[names[0]]
        if len(values[name]) != len(first) or values[name].device != first.device:
            raise DistillError(
                f"{what} {describe_rows(values[name])} of {name!r} and {describe_rows(first)} of {names[0]!r}; give "
                "one batch, on one device."
            )
    return {name: values[name] for name in names}
