"""The progress of measurements on a console, where they take long: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distill.training.progress import LINES, LONG, clock
from interventions import printable

PATIENCE = 2.0
"""The seconds after which a measurement shows how far it is, on a terminal; elsewhere if it takes `LONG`."""

_SHOWN: ContextVar[tuple[Console, str] | None] = ContextVar("_SHOWN", default=None)


@contextmanager
def measurements_shown(console: Console, title: str) -> Iterator[None]:
    """Show on a console how far the measurements inside the block are.

    Args:
        console: where.
        title: of what is measured, before each line.
    """
    before = _SHOWN.set((console, title))
    try:
        yield
    finally:
        _SHOWN.reset(before)


@dataclass(eq=False)
class Counter:
    """Counts what of a measurement is done; it says so once it is clear that it takes long.

    Attributes:
        what: the name of what is counted, e.g. "pairs".
        total: how many there are.
        shown: the console and the title; None says nothing.
        done: how many are done.
    """

    what: str
    total: int
    shown: tuple[Console, str] | None
    done: int = 0
    _began: float = field(default_factory=lambda: time.monotonic())
    _bar: Any = None
    _task: Any = None
    _said: int = 0

    def __call__(self, count: int) -> None:
        """Count as many more."""
        self.done += count
        if self.shown is None or self.shown[0].quiet or time.monotonic() - self._began < PATIENCE:
            return
        if self.shown[0].is_terminal:
            self._draw()
        else:
            self._say()

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    @property
    def _title(self) -> str:
        assert self.shown is not None
        return printable(f"{self.shown[1]}: measuring {self.total:,} {self.what}")

    def _draw(self) -> None:
        if self._bar is None:
            assert self.shown is not None
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.shown[0], transient=True)
            self._task = self._bar.add_task(self._title, total=self.total)
            self._bar.start()
        self._bar.update(self._task, completed=self.done)

    def _say(self) -> None:
        part = self.done * LINES // max(1, self.total)
        if part == self._said or self.done >= self.total:
            return
        taken = time.monotonic() - self._began
        left = taken / self.done * (self.total - self.done)
        if taken + left < LONG:
            return
        self._said = part
        assert self.shown is not None
        line = f"{self._title}: {self.done:,} done, {clock(left)} left"
        self.shown[0].print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def counting(what: str, total: int) -> Iterator[Counter]:
    """Hold a counter of a measurement, which is shown inside a block of `measurements_shown`.

    Args:
        what: the name of what is counted, e.g. "pairs".
        total: how many there are.
    """
    counter = Counter(what, total, _SHOWN.get())
    try:
        yield counter
    finally:
        counter.end()
