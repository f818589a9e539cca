"""What functions of the user return for a batch, and how it reads in an error."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distill.errors import DistillError, did_you_mean

Values = Mapping[str, Tensor]
"""A value `[batch]` or `[batch, ...]` of each of some variables."""


BATCHED = "it gets batched tensors on the device of the model, so index tables as table.to(values.device)[values]"


def called(what: str, function: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
    """What a function of the user returns for a batch; its failures say which one failed."""
    return made_by(what, BATCHED, function, *args, **named)


def made_by(what: str, way_out: str, function: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
    """What a function of the user returns; its failures say which one failed, and the way out."""
    try:
        return function(*args, **named)
    except DistillError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise DistillError(f"{what} failed, {type(error).__name__}: {lines[0]}; {way_out}.") from error


def described(value: object) -> str:
    """A value, for an error: its shape, dtype and device."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype} on {value.device}"
    return f"an object of type {type(value).__name__}"


def on_device(device: torch.device | str | None) -> torch.device | None:
    """A device that is there, by its name; None stays.

    Raises:
        DistillError: there is none of this name here.
    """
    if device is None:
        return None
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).strip().splitlines() or [""]
        raise DistillError(f"device={str(device)!r} is not here ({why[0]}); use one that is: device='cpu'.") from None


def as_answers(logits: Tensor, answers: Tensor) -> Tensor:
    """A network's real-valued answers in the shape of those of a causal model.

    Raises:
        DistillError: more or fewer numbers.
    """
    if logits.numel() != answers.numel():
        raise DistillError(
            f"the causal model answers with {described(answers)} and the network with {described(logits)}; give its "
            f"last layer {answers[0].numel()} outputs, or CausalModel(…, decode=…)."
        )
    return logits.reshape(answers.shape)


def rows_in(value: Tensor) -> str:
    """How many examples a value is of, for an error."""
    return f"{len(value)} examples on {value.device}"


def one_batch(values: Any, names: tuple[str, ...], variables: tuple[str, ...], what: str) -> dict[str, Tensor]:
    """Values of exactly these names, one batch on one device.

    Args:
        values: what was given.
        names: what must be there.
        variables: all that there are.
        what: holds them, for an error.

    Raises:
        DistillError: a name too many or missing, no tensor, or batches of different sizes or devices.
    """
    if not isinstance(values, Mapping):
        raise DistillError(f"{what} {described(values)}; give a dict {{name: tensor}} of {', '.join(names)}.")
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
                f"{what} {described(values[name])} as {name!r}; give a tensor [batch], as torch.tensor([...])."
            )
        first = values[names[0]]
        if len(values[name]) != len(first) or values[name].device != first.device:
            raise DistillError(
                f"{what} {rows_in(values[name])} of {name!r} and {rows_in(first)} of {names[0]!r}; give one batch, "
                "on one device."
            )
    return {name: values[name] for name in names}
