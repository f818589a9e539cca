"""Showing how far a run is: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distill.schedules import Record

LINES = 10


def shown(records: Iterable[Record], title: str, console: Console) -> Iterator[Record]:
    """The records, passed on, with the step, the loss, its terms and the time left on the console.

    Where the console is no terminal, `LINES` plain lines without control characters.
    """
    yield from (_bar if console.is_terminal else _lines)(records, title, console)


def _bar(records: Iterable[Record], title: str, console: Console) -> Iterator[Record]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[terms]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        line = bar.add_task(title, total=None, terms="")
        for record in records:
            bar.update(line, total=record.total, completed=record.step, terms=_terms(record))
            yield record


def _lines(records: Iterable[Record], title: str, console: Console) -> Iterator[Record]:
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
            )
        yield record


def _terms(record: Record) -> str:
    return "  ".join([f"loss {record.loss:.4f}", *(f"{name} {value:.4f}" for name, value in record.terms.items())])


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
