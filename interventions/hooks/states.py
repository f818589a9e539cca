"""Find the hidden state in the output or the arguments of a module, and put another in its place."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from interventions.errors import InterventionError
from interventions.locations import STATES
from interventions.models.answers import UnknownAnswer, logits_of, rule_of
from interventions.models.attentions import kind_of

Path = tuple[int | str, ...]


def path_in(module: nn.Module, io: str, value: Any) -> Path:
    """Return the path (keys and indices) of a state in the output of `module`.

    Args:
        io: the state: "output" (the output itself, or the first tensor of a tuple, list or mapping), "logits", or a
            state of a recurrent module.
        value: the output of the module.

    Raises:
        InterventionError: the output does not hold it.
    """
    if io in STATES:
        return _path_of_state(module, io, value)
    if io == "logits":
        return _path_of_logits(module, value)
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
    """Return the tensor at a path in a value."""
    for step in path:
        value = value[step]
    return value


def with_new(value: Any, path: Path, new: Tensor) -> Any:
    """Return a copy of `value` with the tensor `new` at a path."""
    if not path:
        return new
    step, *rest = path
    inner = with_new(value[step], tuple(rest), new)
    if isinstance(value, Mapping):
        return type(value)(**{**value, step: inner})
    entries = [inner if i == step else entry for i, entry in enumerate(value)]
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)


def hidden(value: Any) -> Tensor | None:
    """Return the hidden state in the output of a module; None if there is none."""
    path = () if isinstance(value, Tensor) else _first(value)
    return None if path is None else at(value, path)


def argument_in(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> str | None:
    """Return the name of the argument that is the input of `module`; None for the first positional argument.

    Raises:
        InterventionError: no argument is a tensor.
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
    """Return the arguments of a call of `module` with `new` as its input.

    Where an attention takes one tensor as query, key and value, as torch's does, all three are new.
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
    """Raise InterventionError for packed sequences, which have no axis of examples."""
    if any(isinstance(entry, PackedSequence) for entry in (value, *(value if isinstance(value, tuple) else ()))):
        raise InterventionError(
            f"{type(module).__name__} takes and gives a PackedSequence, in which examples and tokens cannot be "
            "distinguished; call it on a padded tensor."
        )


def _first(value: Any) -> Path | None:
    """Return the path of the first tensor in a value: its own entries come before those of nested ones."""
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


def _path_of_logits(module: nn.Module, value: Any) -> Path:
    """Return the path of the logits in the output of a model."""
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
    """Return the path of a tensor in a value; None if the value does not hold it."""
    if value is tensor:
        return ()
    entries = value.items() if isinstance(value, Mapping) else enumerate(value) if _is_list(value) else ()
    inner = ((key, _path_to(tensor, entry)) for key, entry in entries)
    return next(((key, *path) for key, path in inner if path is not None), None)


def _path_of_state(module: nn.Module, io: str, value: Any) -> Path:
    """Return the path of a final state: in `(output, h)` or `(output, (h, c))`, of a cell in `h` or `(h, c)`."""
    cell = isinstance(module, nn.RNNCellBase)
    both = isinstance(module, nn.LSTM | nn.LSTMCell)
    if io == "cell_state" and not both:
        raise InterventionError(f"{type(module).__name__} has no cell_state, only an LSTM has; use io='hidden_state'.")
    check_packed(module, value)
    return (*(() if cell else (1,)), *((int(io == "cell_state"),) if both else ()))
