"""Names of the version before, which work for one version and warn: of arguments, attributes and functions."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import wraps
from importlib import import_module
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def renamed(*by_place: str, **names: str) -> Callable[[F], F]:
    """Return a decorator that takes arguments as the version before did, with a DeprecationWarning.

    It stands above `checked`. Of a class the old names are attributes too.

    Args:
        by_place: keywords that could be given by place, behind what still can, in this order.
        names: {the keyword before: the keyword now}.

    >>> @renamed(colour="color")
    ... def painted(wall: str, *, color: str = "red") -> str:
    ...     return f"{wall} in {color}"
    >>> with warnings.catch_warnings(record=True) as said:
    ...     warnings.simplefilter("always")
    ...     painted("north", colour="blue")
    'north in blue'
    >>> print(said[0].message)
    painted(colour=…) is deprecated; write color=….
    """

    def decorate(called: F) -> F:
        if not isinstance(called, type):
            return _renamed(called, called, by_place, names)
        made: Any = called
        made.__init__ = _renamed(made.__init__, made, by_place, names)
        for before, now in names.items():
            setattr(made, before, _attribute(made.__name__, before, now))
        return called

    return decorate


def renamed_in(module: str, **names: str) -> Callable[..., Any]:
    """Return a `__getattr__` of a module for what has another name now: {the name before: the path of the new one}."""

    def get(name: str, stacklevel: int = 3) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, now = names[name].rpartition(".")
        _deprecate(f"{module}.{name} is deprecated; use {names[name]}.", stacklevel)
        return getattr(import_module(home), now)

    return get


def _renamed(function: Any, called: Any, by_place: tuple[str, ...], names: Mapping[str, str]) -> Any:
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
        if twice is not None and not is_dataclass(called):  # whose `replace` gives every field
            raise TypeError(f"{name}() got multiple values for argument {twice!r}")
        return function(*args, *more[len(by_place) :], **{**kwargs, **named})

    return call


def _attribute(owner: str, before: str, now: str) -> property:
    def get(self: Any) -> Any:
        _deprecate(f"{owner}.{before} is deprecated; use {owner}.{now}.")
        return getattr(self, now)

    return property(get, doc=f"`{now}`, as the version before called it.")


def _deprecate(said: str, stacklevel: int = 3) -> None:
    """Warn whoever called the function that calls this one."""
    warnings.warn(said, DeprecationWarning, stacklevel=stacklevel)
