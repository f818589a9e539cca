"""Context managers that clean up even when an interrupt (Ctrl-C) strikes at any line, their own clean-up included.

A change is noted before it is made, and undoing it twice is harmless. So a clean-up that an interrupt cut off is simply
run again.
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
    """Call `end` when the block is left, and once more where an interrupt cut `end` off.

    Args:
        end: undoes what the block changed; it must be safe to call any number of times.

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
    """Hold `variable` at `value` inside the block, and restore its former value."""
    before = variable.get()

    def end() -> None:
        variable.set(before)

    with ending(end):
        variable.set(value)
        yield


@contextmanager
def without_gradients() -> Iterator[None]:
    """Turn gradients off inside the block, as `torch.no_grad` does, and restore them even after an interrupt."""
    before = torch.is_grad_enabled()

    def end() -> None:
        torch.set_grad_enabled(before)

    with ending(end), torch.no_grad():
        yield


@contextmanager
def with_gradients() -> Iterator[None]:
    """Turn gradients on inside the block, as `torch.enable_grad` does, and restore them even after an interrupt.

    Recurrent modules of cuDNN have no derivative in eval mode, so those of torch stand in for them.
    """
    before = torch.is_grad_enabled()

    def end() -> None:
        torch.set_grad_enabled(before)

    with ending(end), torch.inference_mode(False), torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        yield


def one_at_a_time(lock: AbstractContextManager) -> Callable[[F], F]:
    """Return a decorator that holds `lock` while the function runs, so that one thread runs it at a time."""

    def locked(function: F) -> F:
        @wraps(function)
        def alone(*args: object, **kwargs: object) -> object:
            # On one line: on two, an interrupt could come between the end of the block and the release of the lock.
            with lock: return function(*args, **kwargs)  # fmt: skip  # noqa: E701

        return cast(F, alone)

    return locked
