"""Shapes and types in annotations, enforced at each call: what jaxtyping and beartype check, in less time.

`jaxtyping.jaxtyped` binds the arguments of each call to a signature, and checks them before the call and after it.
Here beartype checks each once, and sizes are remembered only by functions whose annotations name shapes.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping._decorator import _destring_annotation, _make_fn_with_signature
from jaxtyping._storage import pop_shape_memo, push_shape_memo

# With the numeric tower `temperature=2` passes where `float` is annotated.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))


def enforced(what: Any) -> Any:
    """Return a function that checks what it takes and returns, or the class itself, whose `__init__` then does.

    Of classes only data classes are checked; methods are functions. Of generators the arguments are, at the call.
    """
    if not inspect.isclass(what):
        return _enforced(what)
    if dataclasses.is_dataclass(what) and not hasattr(what.__init__, "enforced"):
        what.__init__ = _enforced(what.__init__)
    return what


def _enforced(function: Callable) -> Callable:
    written = function.__annotations__
    # A name that only `TYPE_CHECKING` imports is read as `Any`.
    read = {name: _destring_annotation(hint, function.__globals__) for name, hint in written.items()}
    function.__annotations__ = read
    found = _of_generator(function) if inspect.isgeneratorfunction(function) else _checked(function)
    found.__annotations__ = function.__annotations__ = written
    if any(map(_names_a_shape, read.values())):
        found = _remembering(found)
    found.enforced = True
    return found


def _of_generator(function: Callable) -> Callable:
    """Return the function with its arguments checked before it starts; beartype alone would wait for the first item."""
    signature = inspect.signature(function).replace(return_annotation=Any)
    check = _checked(
        _make_fn_with_signature(function.__name__, function.__qualname__, function.__module__, signature, output=False)
    )

    @functools.wraps(function)
    def started(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return function(*args, **kwargs)

    return started


def _remembering(function: Callable) -> Callable:
    """Return the function with sizes of its own: a name of an axis has one size in all that it takes and returns."""

    @functools.wraps(function)
    def remembering(*args: Any, **kwargs: Any) -> Any:
        push_shape_memo({})
        try:
            return function(*args, **kwargs)
        finally:
            pop_shape_memo()

    return remembering


def _names_a_shape(hint: Any) -> bool:
    """Return whether a shape of jaxtyping is in an annotation, at any depth."""
    if isinstance(hint, list | tuple):
        return any(map(_names_a_shape, hint))
    return (inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)) or _names_a_shape(
        typing.get_args(hint)
    )
