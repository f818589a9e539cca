"""Progress of verbs that may take long: a bar in a terminal, once it is clear that they do."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from interventions.errors import InterventionError
from interventions.names import shown

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE = 2.0
"""The seconds before a bar is shown."""


@contextmanager
def progress_of(what: str, total: int | None, console: "Console | None") -> Iterator[Callable[[], None]]:
    """Hold a function that counts one more step, and show a bar if the block takes longer than `PATIENCE`.

    Args:
        what: the text before the bar.
        total: the number of steps; None where it is not known.
        console: where it is shown; None is the terminal to which errors are written, and nowhere if that is none.

    Raises:
        InterventionError: a console that is none of rich.
    """
    _check_console(console)
    began, done = time.monotonic(), 0
    bar: Any = None
    task: Any = None

    def count() -> None:
        nonlocal bar, task, done
        done += 1
        if bar is None and time.monotonic() - began > PATIENCE:
            bar = _bar(console)
            task = bar.add_task(what, total=total)
            bar.start()
        if bar is not None:
            bar.update(task, completed=done)

    try:
        yield count
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
