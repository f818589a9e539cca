"""Blocks that end whatever happens: an interrupt may come at any line, also while another one ends the block.

What a block changes is noted before it is changed, and what undoes it may run again: then it can be undone from
wherever an interrupt struck.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import TypeVar, cast

import torch

T = TypeVar("T")
F = TypeVar("F", bound=Callable)


@contextmanager
def ending(end: Callable[[], None]) -> Iterator[None]:
    """Call `end` when the block is left, and again where an interrupt cut it off: it may run any number of times.

    >>> done = []
    >>> with ending(lambda: done.clear()):
    ...     done.append("changed")
    >>> done
    []
    """
    try:
        try:
            try:
                yield
            finally:
                end()
        finally:
            end()
    finally:
        end()


@contextmanager
def setting(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Inside the block, the variable has another value."""
    before = variable.get()

    def end() -> None:
        variable.set(before)

    with ending(end):
        variable.set(value)
        yield


@contextmanager
def without_gradients() -> Iterator[None]:
    """`torch.no_grad()`, which an interrupt before its own end would leave in force."""
    before = torch.is_grad_enabled()

    def end() -> None:
        torch.set_grad_enabled(before)

    with ending(end), torch.no_grad():
        yield


def one_at_a_time(lock: AbstractContextManager) -> Callable[[F], F]:
    """Run a function in one thread at a time."""

    def locked(function: F) -> F:
        @wraps(function)
        def alone(*args: object, **kwargs: object) -> object:
            # One line: at a line of its own, an interrupt could come between the end of the block and the release.
            with lock: return function(*args, **kwargs)  # fmt: skip  # noqa: E701

        return cast(F, alone)

    return locked
