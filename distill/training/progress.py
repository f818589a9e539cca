"""The progress of a training on a console: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment

from distill.processes import is_first
from interventions import printable

LINES = 10
MEASURED, LONG = 5, 10.0
"""After so many steps a console that is no terminal says how long a training takes, if it takes so many seconds."""


@dataclass(frozen=True)
class Record:
    """The record of a step: its number from 1, the number of steps, the loss, unweighted terms and learning rate.

    After a step that was evaluated `evaluation` holds the figures by name, and after the last step of a training that
    ended early `stop` says why; else both are None.

    On an accelerator loss and terms stay there until one of them is read, which waits for the step to be computed; a
    training reads them itself once in some steps.
    """

    step: int
    total: int
    loss: float
    terms: dict[str, float]
    lr: float
    evaluation: dict[str, float] | None = None
    stop: str | None = None

    @classmethod
    def pending(cls, step: int, total: int, terms: tuple[str, ...], lr: float, fetch: Callable[[], None]) -> "Record":
        """Return a record whose loss and terms are not known yet.

        Args:
            step, total, lr: its own.
            terms: the names of the terms.
            fetch: calls `know` of this record.
        """
        record = cls.__new__(cls)
        vars(record).update(step=step, total=total, lr=lr, _names=terms, _fetch=fetch)
        vars(record).update(evaluation=None, stop=None)
        return record

    def add(self, *, evaluation: Mapping[str, float] | None = None, stop: str | None = None) -> None:
        """Add the figures of an evaluation after this step, or the reason why the training ends with it."""
        vars(self).update(evaluation=None if evaluation is None else dict(evaluation), stop=stop)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data, for JSON; without evaluation and reason to stop where there is none."""
        return {name: each for name, each in asdict(self).items() if each is not None}

    def know(self, loss: float, terms: Sequence[float]) -> None:
        """Take the numbers of a pending record, the terms in the order of their names."""
        named = vars(self).pop("_names")
        vars(self).pop("_fetch")
        vars(self).update(loss=loss, terms=dict(zip(named, terms, strict=True)))

    @property
    def is_known(self) -> bool:
        """True if loss and terms are numbers already, so that reading them does not wait."""
        return "loss" in vars(self)

    @property
    def pending_terms(self) -> int:
        """The number of terms that are not known yet."""
        return len(vars(self).get("_names", ()))

    def __getattr__(self, name: str) -> Any:  # of what is not in the record: loss and terms of a pending one
        if name not in ("loss", "terms") or "_fetch" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        vars(self)["_fetch"]()
        return vars(self)[name]

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, each.name) for each in fields(self))


class Plain(Console):
    """A console that prints control characters in names of classes, files and tasks visibly, without any effect.

    Of several processes the first one speaks; the console of any other is quiet.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.quiet = self.quiet or not is_first()

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
        shown = ""
        line = bar.add_task(title, total=None, terms=shown)
        for record in records:
            shown = _terms(record) if record.is_known else shown
            bar.update(line, total=record.total, completed=record.step, terms=shown)
            if record.evaluation is not None:
                bar.console.print(f"{title}: {_evaluated(record)}", markup=False, highlight=False, soft_wrap=True)
            yield record


def _lines(records: Iterable[Record], title: str, console: Console) -> Iterator[Record]:
    """Yield the records and print plain lines."""
    began, first = time.monotonic(), None
    for record in records:
        first = record.step - 1 if first is None else first
        if record.step == first + 1:
            began = time.monotonic()  # the first step makes ready what the others find
        elif record.step == first + 1 + MEASURED:
            each, more = (time.monotonic() - began) / MEASURED, record.total - record.step
            if each * more > LONG:
                text = (
                    f"{title}: about {clock(each * more)} for {more:,} more steps, {each:.2g} s each in the first ones"
                )
                console.print(text, markup=False, highlight=False, soft_wrap=True)
        due = record.step * LINES // record.total > (record.step - 1) * LINES // record.total
        if due or record.step == record.total:
            left = (time.monotonic() - began) / max(1, record.step - first - 1) * (record.total - record.step)
            console.print(
                f"{title}: step {record.step}/{record.total}  {_terms(record)}  {clock(left)} left",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        if record.evaluation is not None:
            console.print(f"{title}: {_evaluated(record)}", markup=False, highlight=False, soft_wrap=True)
        yield record


def _evaluated(record: Record) -> str:
    """Return the figures of an evaluation as text."""
    figures = "  ".join(f"{name} {value:.4g}" for name, value in (record.evaluation or {}).items())
    return printable(f"step {record.step}/{record.total} evaluated  {figures or 'nothing could be measured'}")


def _terms(record: Record) -> str:
    """Return the loss and its terms as text."""
    terms = (f"{name} {value:.4f}" for name, value in record.terms.items())
    return printable("  ".join([f"loss {record.loss:.4f}", *terms]))


def clock(seconds: float) -> str:
    """Return a duration as minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
