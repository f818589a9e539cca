"""Signals that stop a training between two steps: Ctrl-C, and those by which a cluster ends a job."""

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Interrupt(threading.Event):
    """An event that a signal sets; while `final` is True, the run is being saved and a second one has no effect.

    Attributes:
        agreed: whether a process of those that train together was sent a signal; None where one trains alone.
    """

    final = False
    agreed: bool | None = None

    @property
    def stops(self) -> bool:
        """True if the training is to stop after this step, in all processes alike."""
        return self.is_set() if self.agreed is None else self.agreed


@contextmanager
def defer_interrupt() -> Iterator[Interrupt]:
    """Let signals set an event in the block, so that no step is left half done; a second one interrupts at once.

    Where several processes train together a second one has no effect: torchrun passes on the Ctrl-C or the signal of a
    cluster that they were sent themselves, and kills them after 30 seconds.

    This works in the main thread, where Python delivers signals; in other threads the event is never set.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.is_set() and not interrupt.final and interrupt.agreed is None:
            raise KeyboardInterrupt
        interrupt.set()

    with ExitStack() as before:
        for each in SIGNALS:
            before.callback(signal.signal, each, signal.signal(each, handle) or signal.SIG_DFL)
        yield interrupt


@contextmanager
def delay_signals() -> Iterator[None]:
    """Delay signals in the block until its end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    before = {each: signal.getsignal(each) for each in SIGNALS}
    for each in SIGNALS:
        signal.signal(each, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler or signal.SIG_DFL)
    if received:
        number, frame = received[0]
        handler = before[number]
        if callable(handler):
            handler(number, frame)
        elif handler != signal.SIG_IGN:
            signal.raise_signal(number)
