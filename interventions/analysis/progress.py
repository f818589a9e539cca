"""Progress of verbs that may take long: a bar in a terminal, once it is clear that they do."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interventions.errors import InterventionError
from interventions.names import shown

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE = 2.0
"""The seconds before a bar is shown."""


@dataclass(eq=False)
class Steps:
    """The steps of a verb, which are counted by a call each.

    Attributes:
        show: is called with the number of steps so far and that of all, None where it is not known.
        parts: into how many parts the work is divided; None where it is not known.
        done: the steps so far.
        total: the steps of all parts, as far as is known.
    """

    show: Callable[[int, int | None], None]
    parts: int | None = 1
    done: int = 0
    total: int | None = None
    _parts: int = 0
    _expected: int = 0

    def expect(self, count: int) -> None:
        """Add the steps of the next part; the others are taken to have as many on average."""
        self._parts, self._expected = self._parts + 1, self._expected + count
        if self.parts is not None:
            self.total = self._expected * max(self.parts, self._parts) // self._parts

    def __call__(self, count: int = 1) -> None:
        self.done += count
        self.show(self.done, self.total)


@contextmanager
def progress_of(what: str, parts: int | None, console: "Console | None") -> Iterator[Steps]:
    """Hold a counter of steps, and show a bar if the block takes longer than `PATIENCE`.

    Args:
        what: the text before the bar.
        parts: into how many parts the work is divided; None where it is not known.
        console: where it is shown; None is the terminal to which errors are written, and nowhere if that is none.

    Raises:
        InterventionError: a console that is none of rich.
    """
    _check_console(console)
    began = time.monotonic()
    bar: Any = None
    task: Any = None

    def show(done: int, total: int | None) -> None:
        nonlocal bar, task
        if bar is None and time.monotonic() - began > PATIENCE:
            bar = _bar(console)
            task = bar.add_task(what, total=total)
            bar.start()
        if bar is not None:
            bar.update(task, completed=done, total=total)

    try:
        yield Steps(show, parts)
    finally:
        if bar is not None:
            bar.stop()


def _check_console(console: object) -> None:
    if console is None:
        return
    from rich.console import Console

    if not isinstance(console, Console):
        raise InterventionError(f"console={shown(console)} is no Console of rich; write console=Console(quiet=True).")


def _bar(console: "Console | None") -> Any:
    from rich.console import Console  # rich takes a while to import
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    shown = Console(stderr=True) if console is None else console
    hidden = console is None and not (shown.is_terminal or shown.is_jupyter)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=shown, disable=hidden or shown.quiet, transient=True)
