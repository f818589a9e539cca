"""Deprecated names of arguments, attributes and functions: they work for one more version, with a warning."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import wraps
from importlib import import_module
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def renamed(*by_place: str, **names: str) -> Callable[[F], F]:
    """Return a decorator that also takes arguments as the version before did, with a DeprecationWarning.

    Write it above `checked`. On a class, the old names also become attributes.

    Args:
        by_place: names of keyword-only parameters that used to be positional too, in that order, after those that
            still are.
        names: {old keyword: new keyword}.

    >>> @renamed(colour="color")
    ... def painted(wall: str, *, color: str = "red") -> str:
    ...     return f"{wall} in {color}"
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     painted("north", colour="blue")
    'north in blue'
    >>> print(caught[0].message)
    painted(colour=…) is deprecated; write color=….
    """

    def decorate(called: F) -> F:
        if not isinstance(called, type):
            return _accept_old(called, called, by_place, names)
        made: Any = called
        made.__init__ = _accept_old(made.__init__, made, by_place, names)
        for before, now in names.items():
            setattr(made, before, _attribute(made.__name__, before, now))
        return called

    return decorate


def renamed_in(module: str, **names: str) -> Callable[..., Any]:
    """Return a `__getattr__` for a module whose names have changed, which warns and hands on the new object.

    Args:
        module: the name of the module, for the warning.
        names: {old name: full dotted path of the new one}.
    """

    def get(name: str, stacklevel: int = 3) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, now = names[name].rpartition(".")
        _deprecate(f"{module}.{name} is deprecated; use {names[name]}.", stacklevel)
        return getattr(import_module(home), now)

    return get


def _accept_old(function: Any, called: Any, by_place: tuple[str, ...], names: Mapping[str, str]) -> Any:
    """Return the function with old keywords translated and warned of; `called` is the function or class to name."""
    parameters, name = inspect.signature(function).parameters.values(), called.__name__
    places = sum(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not by_place and names.keys().isdisjoint(kwargs):
            return function(*args, **kwargs)
        args, more = args[:places], args[places:]
        named = dict(zip(by_place, more, strict=False))
        for each in named:
            _deprecate(f"{name}: {each} by place is deprecated; write {each}=….")
        for before in [each for each in kwargs if each in names]:
            _deprecate(f"{name}({before}=…) is deprecated; write {names[before]}=….")
            named[names[before]] = kwargs.pop(before)
        twice = next((each for each in named if each in kwargs), None)
        if twice is not None and not is_dataclass(called):  # `dataclasses.replace` passes every field
            raise TypeError(f"{name}() got multiple values for argument {twice!r}")
        return function(*args, *more[len(by_place) :], **{**kwargs, **named})

    return call


def _attribute(owner: str, before: str, now: str) -> property:
    def get(self: Any) -> Any:
        _deprecate(f"{owner}.{before} is deprecated; use {owner}.{now}.")
        return getattr(self, now)

    return property(get, doc=f"`{now}`, as the version before called it.")


def _deprecate(message: str, stacklevel: int = 3) -> None:
    """Issue a DeprecationWarning at the line that called the function which calls this one."""
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)
