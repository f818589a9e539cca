"""Checks of argument types: public functions and classes raise for a value that does not fit its annotation.

`checked` reads the annotations of what it decorates and compares types alone (it also refuses NaN for a number). Ranges
are checked by the functions themselves, and so is every parameter that is annotated with `Any`, `object` or a protocol.
"""

import inspect
import math
import numbers
import os
import types
import typing
from collections import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, wraps
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar, Union

import numpy as np
import torch
from torch import Tensor

from interventions.errors import InterventionError
from interventions.names import shown

WRAPPED_MODEL = "interventions.architecture(model).model"
_REMEMBERED = 256
"""The number of types and shapes of tensors that an annotation is known to admit."""
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Kind:
    """The values that a parameter takes.

    Attributes:
        holds: returns whether a value is one of them.
        words: describe them in an error: "a whole number".
        example: one of them, as code.
    """

    holds: Callable[[Any], bool]
    words: str
    example: str


class Hashed:
    """A frozen dataclass that is often a key: it keeps its hash beside its attributes.

    Among these it would be saved, compared and fingerprinted, and texts have another hash in another process. A
    dataclass takes the method only where it says so: `__hash__ = Hashed.__hash__`.
    """

    __slots__ = ("_hash",)
    _hash: int

    def __getstate__(self) -> dict[str, Any]:
        return vars(self)

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            of: Any = vars(self)
            names: Any = type(self).__dataclass_fields__  # type: ignore[attr-defined]
            object.__setattr__(self, "_hash", hash(tuple([of[name] for name in names])))
            return self._hash


def checking(error: type[ValueError]) -> Callable[[F], F]:
    """Return a decorator of functions and classes that raises `error` for arguments of wrong types.

    The types are read from the annotations; a class is checked when it is constructed. A parameter whose annotation
    says nothing about types (`Any`, `object`, a protocol) takes every value.

    Args:
        error: the exception type to raise, e.g. InterventionError.

    >>> @checking(InterventionError)
    ... def half(value: float, *, exact: bool = True) -> float:
    ...     return value / 2
    >>> half("3")
    Traceback (most recent call last):
    interventions.errors.InterventionError: half(value='3'): value must be a number; write value=0.5.
    """

    def decorate(called: F) -> F:
        if not isinstance(called, type):
            return _check_calls(called, called.__name__, error)
        made: Any = called
        made.__init__ = _check_calls(made.__init__, made.__name__, error, made)
        return called

    return decorate


def _check_calls(function: Any, name: str, error: type[ValueError], made: type | None = None) -> Any:
    """Return the function with its arguments checked at each call; `made` is the class whose `__init__` it is."""

    @cache
    def kinds() -> tuple[tuple[str, ...], dict[str, Kind]]:
        return _kinds(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        positional, known = kinds()
        converts = False
        for parameter, value in (*zip(positional, args, strict=False), *kwargs.items()):
            kind = known.get(parameter)
            if kind is None:
                continue
            converts = converts or _is_foreign(value)
            if not kind.holds(value):
                called = name if made is None else type(args[0]).__name__
                example = WRAPPED_MODEL if wraps_model(value, kind) else kind.example
                raise error(
                    f"{called}({parameter}={shown(value)}): {parameter} must be {kind.words}; write "
                    f"{parameter}={example}."
                )
        if not converts:
            return function(*args, **kwargs)
        return function(*map(_to_python, args), **{name: _to_python(value) for name, value in kwargs.items()})

    return call


def _kinds(function: Any) -> tuple[tuple[str, ...], dict[str, Kind]]:
    """Return the names of the positional parameters, and {parameter: kind} where an annotation says which."""
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    by_place = (each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)
    found = {}
    for each in parameters:
        kind = None if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) else kind_of(hints.get(each.name, Any))
        if kind is not None:
            shows = each.default not in (each.empty, None) and _is_short(each.default) and kind.holds(each.default)
            found[each.name] = Kind(kind.holds, kind.words, repr(each.default) if shows else kind.example)
    return tuple(by_place), found


def _is_short(default: Any) -> bool:
    """Return whether a default value can stand in an error as the example."""
    return isinstance(default, bool | int | float | str | tuple) and len(repr(default)) < 30


def kind_of(annotation: Any) -> Kind | None:
    """Return the values that an annotation admits; None where they are not checked."""
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        if any(typing.get_origin(each) is abc.Iterable for each in inner):
            return None  # one or several: functions that take either raise their own errors
        found = _any_of([kind_of(each) for each in inner])
        return _of_paths(found) if found is not None and {str, Path} <= set(inner) else found
    if isinstance(annotation, TypeVar) and annotation.__constraints__:
        return _any_of([kind_of(each) for each in annotation.__constraints__])
    if origin is Literal:
        return Kind(
            lambda value: any(
                isinstance(value, type(each)) and isinstance(value, bool) == isinstance(each, bool) and value == each
                for each in inner
            ),
            " or ".join(map(repr, inner)),
            repr(inner[0]),
        )
    if origin is tuple:
        return _many(tuple, inner[:1], "a tuple", "({},)") if inner[1:] == (...,) else _tuple(inner)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(*inner)
    if origin is Sequence or origin is list:
        return _many(Sequence, inner, "a sequence", "[{}]")
    if isinstance(origin, type) and issubclass(origin, Callable):  # type: ignore[arg-type]
        return _PLAIN[Callable]
    if isinstance(origin, type) and issubclass(origin, Iterable):
        alone = (str, bytes, Tensor, np.ndarray, torch.nn.Module)
        return Kind(lambda value: isinstance(value, Iterable) and not isinstance(value, alone), "several", "[…]")
    if hasattr(annotation, "dtypes") and hasattr(annotation, "dim_str"):
        return _array(annotation)
    if (
        isinstance(annotation, type)
        and annotation not in _CHECKED_ELSEWHERE
        and not getattr(annotation, "_is_protocol", False)
    ):
        return Kind(
            lambda value: isinstance(value, annotation), f"of class {annotation.__name__}", f"{annotation.__name__}(…)"
        )
    return None


def _any_of(kinds: list[Kind | None]) -> Kind | None:
    """Return the values of all kinds together; None if one of these is not known."""
    known = [each for each in kinds if each is not None]
    if len(known) < len(kinds):
        return None
    holds = tuple(each.holds for each in known)
    shown_first = next((each for each in known if each.words != "None"), known[0])
    words = list(dict.fromkeys(each.words for each in known))
    return Kind(lambda value: any(each(value) for each in holds), " or ".join(words), shown_first.example)


def _many(container: type, inner: tuple[Any, ...], words: str, example: str) -> Kind:
    """Return the sequences whose entries are of one kind, if that is known; a text is no sequence of texts."""
    entry = kind_of(inner[0]) if inner else None

    def holds(given: Any) -> bool:
        values: Any = given
        if entry is None or not _is_sequence(given, container):
            return _is_sequence(given, container)
        return not isinstance(given, str | bytes) and all(entry.holds(each) for each in values)

    if entry is None:
        return Kind(holds, words, example.format("…"))
    return Kind(holds, f"{words}, each {entry.words}", example.format(entry.example))


def _is_sequence(given: Any, container: type) -> bool:
    """Return whether a value is a sequence: also a list for a tuple (JSON has no tuples), a ModuleList, a 1-D array."""
    if isinstance(given, container) or (container is tuple and isinstance(given, list)):
        return True
    return isinstance(given, torch.nn.ModuleList) or (
        getattr(given, "ndim", 0) == 1 and hasattr(given, "tolist") and not isinstance(given, Tensor)
    )


def _tuple(inner: tuple[Any, ...]) -> Kind:
    """Return the tuples with as many entries as `inner`, each of its own kind."""
    entries = [kind_of(each) for each in inner]

    def holds(values: Any) -> bool:
        fits = isinstance(values, tuple | list) and len(values) == len(entries)
        return fits and all(entry is None or entry.holds(each) for entry, each in zip(entries, values, strict=True))

    words, examples = (
        ("…" if each is None else getattr(each, name) for each in entries) for name in ("words", "example")
    )
    return Kind(holds, f"a tuple of {len(entries)}: {', '.join(words)}", f"({', '.join(examples)})")


def _mapping(key: Any = Any, value: Any = Any) -> Kind:
    """Return the mappings whose keys and values are of one kind each, where that is known."""
    keys, values = kind_of(key), kind_of(value)

    def holds(given: Any) -> bool:
        return isinstance(given, Mapping) and all(
            (keys is None or keys.holds(name)) and (values is None or values.holds(each))
            for name, each in given.items()
        )

    parts = [f"each {what} {kind.words}" for what, kind in (("key", keys), ("value", values)) if kind is not None]
    example = ": ".join("…" if kind is None else kind.example for kind in (keys, values))
    return Kind(holds, ", ".join(["a mapping", *parts]), f"{{{example}}}")


def _of_paths(kind: Kind) -> Kind:
    """Return the values of `kind` that can be a path: texts must not be empty or hold a null character."""
    return Kind(
        lambda value: kind.holds(value) and (not isinstance(value, str) or (value != "" and "\0" not in value)),
        kind.words.replace("a text or a path", "a path"),
        kind.example,
    )


def _array(annotation: Any) -> Kind:
    """Return the tensors that a jaxtyping annotation admits; axes of one name in two arguments are not compared."""
    from jaxtyping import jaxtyped

    admitted: set[tuple[torch.dtype, torch.Size]] = set()  # as jaxtyping takes longer than a small kernel

    @jaxtyped(typechecker=None)  # a scope of its own: axes of a function that calls this one are others
    def fits(value: Tensor) -> bool:
        return isinstance(value, annotation)

    def holds(value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        if (value.dtype, value.shape) in admitted:
            return True
        if not fits(value):
            return False
        if len(admitted) >= _REMEMBERED:
            admitted.clear()
        admitted.add((value.dtype, value.shape))
        return True

    return Kind(holds, f"a tensor {annotation.__name__}", "torch.ones(…)")


def wraps_model(value: Any, kind: Kind) -> bool:
    """Return whether a model of nnsight, which wraps a torch model, was passed where a torch model is needed."""
    return kind.holds is _PLAIN[torch.nn.Module].holds and isinstance(getattr(value, "_module", None), torch.nn.Module)


def _is_foreign(value: Any) -> bool:
    """Return whether a value is a number that torch and JSON do not take everywhere: of NumPy, or a fraction."""
    return isinstance(value, np.generic) or Fraction in type(value).__mro__  # isinstance of an ABC is slower


def _to_python(value: Any) -> Any:
    """Return a number of another library as one of Python, and any other value as it is."""
    if isinstance(value, Fraction):
        return float(value)
    return value.item() if isinstance(value, np.generic) else value


def listed(numbers: Tensor) -> list[Any]:
    """Return the numbers of a tensor as nested lists.

    Raises:
        TypeError: the tensor holds no values (device meta), is sparse, or has no axes.
    """
    if numbers.is_meta or numbers.layout != torch.strided or not numbers.ndim:
        raise TypeError("no list of numbers")
    return numbers.tolist()


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number of 64 bits, of Python or NumPy; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and -(2**63) <= int(value) < 2**63


def is_number(value: Any) -> bool:
    """Return whether a value is a number, of Python or NumPy, and not NaN; True and False are none."""
    if isinstance(value, int | np.integer):
        return is_whole(value)
    return isinstance(value, numbers.Real) and not math.isnan(value)


_PLAIN: dict[Any, Kind] = {
    bool: Kind(lambda value: isinstance(value, bool | np.bool_), "True or False", "True"),
    int: Kind(is_whole, "a whole number", "1"),
    float: Kind(is_number, "a number", "0.5"),
    str: Kind(lambda value: isinstance(value, str), "a text", "'…'"),
    Path: Kind(lambda value: isinstance(value, os.PathLike), "a path", "Path('…')"),
    torch.Generator: Kind(
        lambda value: isinstance(value, torch.Generator), "a torch.Generator", "torch.Generator().manual_seed(0)"
    ),
    torch.nn.Module: Kind(lambda value: isinstance(value, torch.nn.Module), "a torch model", "model"),
    Tensor: Kind(lambda value: isinstance(value, Tensor), "a tensor", "torch.ones(…)"),
    Callable: Kind(callable, "a function", "lambda …: …"),
    type(None): Kind(lambda value: value is None, "None", "None"),
    None: Kind(lambda value: value is None, "None", "None"),
}

_CHECKED_ELSEWHERE = (Any, object, slice, range)  # functions that take positions, heads or dims raise their own errors

checked = checking(InterventionError)
