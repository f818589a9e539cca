"""Callbacks: functions that are called with the record of each step, and may end the training."""

from collections.abc import Callable, Sequence
from typing import Any

from distill.errors import DistillError
from distill.training.progress import Record
from interventions import shown

Callback = Callable[[Record], Any]
STOP = "stop"
"""The answer of a callback that ends the training; `raise StopIteration` does too."""


def callbacks_of(given: Any) -> tuple[Callback, ...]:
    """Return callbacks as a tuple, also one alone.

    Raises:
        DistillError: an object that cannot be called, or a class in place of an object of it.
    """
    if given is None:
        return ()
    found = (given,) if callable(given) or not isinstance(given, Sequence) else tuple(given)
    for each in found:
        if not callable(each) or isinstance(each, type):
            raise DistillError(
                f"callbacks={shown(each)} cannot be called with the record of a step; give functions, or objects with "
                "__call__: callbacks=[lambda record: print(record.step, record.loss)]."
            )
    return found


def stops(callbacks: Sequence[Callback], record: Record) -> bool:
    """Call the callbacks with a record, and return whether one of them ends the training.

    Raises:
        DistillError: an answer of which it is not clear whether it ends the training.
        Exception: the error of a callback.
    """
    stopped = False
    for each in callbacks:
        try:
            answer = each(record)
        except StopIteration:
            answer = STOP
        if isinstance(answer, bool) or (isinstance(answer, str) and answer != STOP):
            name = getattr(each, "__qualname__", type(each).__qualname__)
            raise DistillError(
                f"the callback {name} returned {answer!r} at step {record.step}, which may mean to stop or to go on; "
                f"return {STOP!r} to stop, or None to go on."
            )
        stopped = stopped or (isinstance(answer, str) and answer == STOP)
    return stopped
