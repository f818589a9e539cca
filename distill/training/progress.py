"""The progress of a training on a console: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment

from interventions import printable

LINES = 10


@dataclass(frozen=True)
class Record:
    """The record of a step: its number from 1, the number of steps, the loss, unweighted terms and learning rate."""

    step: int
    total: int
    loss: float
    terms: dict[str, float]
    lr: float


class Plain(Console):
    """A console that prints control characters in names of classes, files and tasks visibly, without any effect."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the rendered segments, their text made printable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def console_of() -> Console:
    """Return a console; one that is no terminal is wide enough for the table and without control characters."""
    console = Plain()
    return console if console.is_terminal else Plain(width=120, no_color=True)


def show_progress(records: Iterable[Record], title: str, console: Console) -> Iterator[Record]:
    """Yield the records as they come, and show step, loss, terms and the remaining time on the console.

    On a console that is no terminal, `LINES` plain lines without control characters are shown.
    """
    yield from (_bar if console.is_terminal else _lines)(records, printable(title), console)


def _bar(records: Iterable[Record], title: str, console: Console) -> Iterator[Record]:
    """Yield the records and show a bar."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[terms]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        line = bar.add_task(title, total=None, terms="")
        for record in records:
            bar.update(line, total=record.total, completed=record.step, terms=_terms(record))
            yield record


def _lines(records: Iterable[Record], title: str, console: Console) -> Iterator[Record]:
    """Yield the records and print plain lines."""
    began, first = time.monotonic(), None
    for record in records:
        first = record.step - 1 if first is None else first
        due = record.step * LINES // record.total > (record.step - 1) * LINES // record.total
        if due or record.step == record.total:
            left = (time.monotonic() - began) / (record.step - first) * (record.total - record.step)
            console.print(
                f"{title}: step {record.step}/{record.total}  {_terms(record)}  {_clock(left)} left",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        yield record


def _terms(record: Record) -> str:
    """Return the loss and its terms as text."""
    terms = (f"{name} {value:.4f}" for name, value in record.terms.items())
    return printable("  ".join([f"loss {record.loss:.4f}", *terms]))


def _clock(seconds: float) -> str:
    """Return a duration as minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
