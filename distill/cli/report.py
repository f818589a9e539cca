"""The comparison of a teacher with its students: a table, `result.json`, and an HTML page that needs no other file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from distill.data.task import Task
from distill.evaluation.evaluate import Evaluation, evaluate
from distill.evaluation.outcome import Outcome
from distill.interchange.mapping import depth
from distill.results import FitResult, curves
from distill.statistics.intervals import Share
from distill.storage.files import write, write_json
from distill.storage.pages import embedded, page, table
from distill.training.fingerprints import environment
from interventions import printable

HEADINGS = (
    "layers",
    "parameters",
    "accuracy",
    "IIA",
    "effective",
    "effect rate",
    "do nothing",
    "replace all",
    "seconds",
)


@dataclass(frozen=True, eq=False)
class ComparedModel:
    """A model of a comparison, with its figures.

    Attributes:
        name: the title of its column.
        layers: how many blocks it has.
        parameters: how many numbers its weights are.
        evaluation: on held-out rows.
        seconds: how long its training took.
        fit: its training, for a student of `distill fit`.
    """

    name: str
    layers: int
    parameters: int
    evaluation: Evaluation
    seconds: float | None = None
    fit: FitResult | None = None

    def cells(self) -> tuple[str, ...]:
        """Return the figures as texts, in the order of `HEADINGS`."""
        interchange = self.evaluation.interchange
        outcome = None if interchange is None else interchange.overall
        figures = [""] * 5 if outcome is None else _figures(outcome)
        seconds = "" if self.seconds is None else f"{self.seconds:.1f}"
        return (str(self.layers), f"{self.parameters:,}", _share(self.evaluation.accuracy), *figures, seconds)


@dataclass(frozen=True, eq=False)
class Report:
    """A comparison of a teacher with its students.

    Attributes:
        title: of the table and the page.
        task: the rows that the models were trained and measured on.
        models: the teacher and its students.
        settings: plain data, shown on the page and kept in `result.json`.
    """

    title: str
    task: Task
    models: Sequence[ComparedModel]
    settings: dict[str, Any]

    def table(self) -> Table:
        """Return the table for a terminal of 80 characters: a column for each model."""
        title = Text(printable(self.title), "table.title")  # in a str, Rich would read brackets as its own markup
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
        table.add_column("")
        for each in self.models:
            table.add_column(Text(printable(each.name)), justify="right", no_wrap=True)
        for heading, *cells in zip(HEADINGS, *(each.cells() for each in self.models), strict=True):
            table.add_row(heading, *cells)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        return {
            "title": self.title,
            "task": {"name": self.task.name, "classes": list(self.task.classes), "majority": self.task.majority},
            "settings": self.settings,
            "models": [
                {
                    "name": each.name,
                    "layers": each.layers,
                    "parameters": each.parameters,
                    "seconds": each.seconds,
                    **each.evaluation.to_dict(),
                    **({} if each.fit is None else {"fit": each.fit.to_dict()}),
                }
                for each in self.models
            ],
            "versions": environment(),
        }

    def save(self, folder: Path) -> Path:
        """Write `result.json` and `report.html` into a folder, and return the path of the page."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "result.json", self.to_dict())
        report = folder / "report.html"
        write(report, self.html())
        return report

    def html(self) -> str:
        """Return the HTML page, with its pictures inside."""
        parts = [
            f"<h1>{escape(self.title)}</h1><p>{escape(self.task.description)} "
            f"{len(self.task.train):,} training rows, {len(self.task.test):,} held out{_majority_of(self.task)}.</p>",
            table(("", *HEADINGS), ((each.name, *each.cells()) for each in self.models)),
            f"<p class=note>{escape(LEGEND)}</p>",
            *self._pictures(),
            "<h2>Interchange accuracy for each entry of the mapping</h2>",
            *(_per_pair(each) for each in self.models if each.evaluation.interchange is not None),
            *(
                f"<p class=note>{escape(each.name)}: {escape(each.evaluation.note)}</p>"
                for each in self.models
                if each.evaluation.note
            ),
            "<h2>Settings</h2>",
            f"<pre>{escape(json.dumps(self.settings, indent=1, default=str))}</pre>",
            f"<p class=note>{escape(', '.join(f'{name} {number}' for name, number in environment().items()))}</p>",
        ]
        return page(self.title, parts)

    def _pictures(self) -> list[str]:
        trained = {each.name: each.fit.records for each in self.models if each.fit is not None and each.fit.records}
        measured = [(each.name, each.evaluation.interchange) for each in self.models]
        pictures = [] if not trained else ["<h2>Training</h2>" + embedded(curves(trained))]
        for name, interchange in measured:
            if interchange is not None:
                pictures.append(f"<h2>{escape(name)}</h2>" + embedded(interchange.plot()))
        return pictures


def compared_model(name: str, model: nn.Module, evaluation: Evaluation, fit: FitResult | None = None) -> ComparedModel:
    """Return the entry of a model, its layers and parameters counted."""
    parameters = sum(each.numel() for each in model.parameters())
    return ComparedModel(name, depth(model), parameters, evaluation, None if fit is None else fit.seconds, fit)


def teacher_evaluation(teacher: nn.Module, task: Task) -> Evaluation:
    """Measure the accuracy of a teacher on held-out rows; without labels measure nothing."""
    return Evaluation(None, None) if task.majority is None else evaluate(None, teacher, None, task)


def print_report(report: Report, console: Console) -> None:
    """Print the table of a report, and below it each note about the figures once."""
    console.print(report.table())
    measured = [each.evaluation.interchange for each in report.models]
    notes = [note for each in measured if each is not None for note in each.notes]
    notes += [each.evaluation.note for each in report.models if each.evaluation.note]
    for note in dict.fromkeys(notes):
        console.print(note, markup=False, highlight=False)


def _majority_of(task: Task) -> str:
    """Return the end of a sentence about the held-out rows: how common their most common class is."""
    return " without labels" if task.majority is None else f"; the most common class is {task.majority:.1%} of them"


def _share(share: Share | None) -> str:
    return "" if share is None else str(share)


def _figures(outcome: Outcome) -> list[str]:
    rates = (outcome.effective_iia, outcome.effect_rate, outcome.do_nothing, outcome.replace_all)
    return [_share(outcome.iia), *("–" if rate is None else f"{rate:.3f}" for rate in rates)]


def _per_pair(model: ComparedModel) -> str:
    table, *notes = str(model.evaluation.interchange).split("\n\n")
    return f"<h3>{escape(model.name)}</h3><pre>{escape(table)}</pre>" + "".join(
        f"<p class=note>{escape(note)}</p>" for note in notes
    )


LEGEND = (
    "IIA: share of held-out interchanges after which the student answers as the teacher does, with its 95 % "
    "interval; effective: on "
    "those alone that change the teacher's answer, which are the effect rate; do nothing and replace all: what a "
    "student would reach "
    "that ignores the interchange, or runs the source instead."
)
