"""Where the hidden state is in what a module returned, and what it looks like with another in its place."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from interventions.errors import InterventionError
from interventions.locations import STATES
from interventions.models.answers import UnknownAnswer, logits_of, rule_of
from interventions.models.sites import kind_of

Path = tuple[int | str, ...]


def path_in(module: nn.Module, io: str, value: Any) -> Path:
    """The indices that lead to what is asked for in what `module` returned.

    Args:
        io: "output" (the tensor itself or the first of a tuple, list or mapping), "logits", or a state of a recurrent
            module.

    Raises:
        InterventionError: it is not there.
    """
    if io in STATES:
        return _recurrent(module, io, value)
    if io == "logits":
        return _logits(module, value)
    if isinstance(value, Tensor):
        return ()
    path = _first(value)
    if path is None:
        check_packed(module, value)
        raise InterventionError(
            f"{type(module).__name__} returned {type(value).__name__}, which holds no tensor; name a place inside it."
        )
    return path


def at(value: Any, path: Path) -> Tensor:
    """What stands at `path`."""
    for step in path:
        value = value[step]
    return value


def with_new(value: Any, path: Path, new: Tensor) -> Any:
    """A copy of `value` with `new` at `path`."""
    if not path:
        return new
    step, *rest = path
    inner = with_new(value[step], tuple(rest), new)
    if isinstance(value, Mapping):
        return type(value)(**{**value, step: inner})
    entries = [inner if i == step else entry for i, entry in enumerate(value)]
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)


def hidden(value: Any) -> Tensor | None:
    """The hidden state in what a module returned, if there is one."""
    path = () if isinstance(value, Tensor) else _first(value)
    return None if path is None else at(value, path)


def argument_in(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> str | None:
    """By which name `module` was given its input; None if that is the first argument without one.

    Raises:
        InterventionError: it was given no tensor.
    """
    if isinstance(args[0] if args else None, Tensor):
        return None
    if "hidden_states" in kwargs:
        return "hidden_states"
    floating = (key for key, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point())
    name = next(floating, None)
    if name is None:
        check_packed(module, args)
        raise InterventionError(
            f"{type(module).__name__} was called without a tensor to read or write; use io='output'."
        )
    return name


def with_argument(
    module: nn.Module, args: tuple, kwargs: Mapping[str, Any], new: Tensor
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call of `module` with `new` as its input.

    An attention that is given one tensor as query, key and value, as torch's own is, has one input: all of it is new.
    """
    name = argument_in(module, args, kwargs)
    old = args[0] if name is None else kwargs[name]
    if kind_of(module) is None:
        return ((new, *args[1:]), dict(kwargs)) if name is None else (args, {**kwargs, name: new})
    return (
        tuple(new if each is old else each for each in args),
        {key: new if each is old else each for key, each in kwargs.items()},
    )


def check_packed(module: nn.Module, value: object) -> None:
    """Raise for packed sequences, which have no axis of examples."""
    if any(isinstance(entry, PackedSequence) for entry in (value, *(value if isinstance(value, tuple) else ()))):
        raise InterventionError(
            f"{type(module).__name__} takes and gives a PackedSequence, in which examples and tokens cannot be told "
            "apart; call it on a padded tensor."
        )


def _first(value: Any) -> Path | None:
    """Where the first tensor is: among the entries themselves before those of nested ones."""
    if isinstance(value, PackedSequence):
        return None
    entries = list(value.items() if isinstance(value, Mapping) else enumerate(value) if _is_list(value) else ())
    if any(isinstance(entry, PackedSequence) for _, entry in entries):
        return None
    flat = next(((key,) for key, entry in entries if isinstance(entry, Tensor)), None)
    if flat is not None:
        return flat
    nested = ((key, _first(entry)) for key, entry in entries)
    return next(((key, *path) for key, path in nested if path is not None), None)


def _is_list(value: object) -> bool:
    return isinstance(value, tuple | list)


def _logits(module: nn.Module, value: Any) -> Path:
    try:
        logits = logits_of(value, rule_of(module))
    except UnknownAnswer as error:
        fields = ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
        raise UnknownAnswer(
            f"{type(module).__name__} returned no logits (its output has {fields}); use a model with a head, name the "
            "module that computes what you mean, Location(module='…'), or say what the answer is: answers='…'."
        ) from error
    path = _path_to(logits, value)
    if path is None:
        raise InterventionError(
            f"answers computes the logits of {type(module).__name__} from its output, in which they have no place; "
            "name the module that computes what you mean: Location(module='…')."
        )
    return path


def _path_to(tensor: Tensor, value: Any) -> Path | None:
    """Where a tensor stands in a value; None if it stands nowhere."""
    if value is tensor:
        return ()
    entries = value.items() if isinstance(value, Mapping) else enumerate(value) if _is_list(value) else ()
    inner = ((key, _path_to(tensor, entry)) for key, entry in entries)
    return next(((key, *path) for key, path in inner if path is not None), None)


def _recurrent(module: nn.Module, io: str, value: Any) -> Path:
    """`(output, h)` or `(output, (h, c))` of a layer; `h` or `(h, c)` of a cell."""
    cell = isinstance(module, nn.RNNCellBase)
    both = isinstance(module, nn.LSTM | nn.LSTMCell)
    if io == "cell_state" and not both:
        raise InterventionError(f"{type(module).__name__} has no cell_state, only an LSTM has; use io='hidden_state'.")
    check_packed(module, value)
    return (*(() if cell else (1,)), *((int(io == "cell_state"),) if both else ()))
