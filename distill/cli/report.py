"""The comparison of a teacher with its students: a table, `result.json`, and an HTML page that needs no other file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from distill.cli.samples import Sample
from distill.cli.students import is_language
from distill.comparison.compared_figure import ComparedFigure
from distill.comparison.comparison import Comparison
from distill.data.task import Task
from distill.evaluation.evaluate import Evaluation, evaluate
from distill.evaluation.outcome import Outcome
from distill.interchange.mapping import depth
from distill.results import FitResult, curves
from distill.statistics.intervals import Estimate, Share
from distill.storage.files import write, write_json
from distill.storage.pages import embedded, page, table
from distill.training.fingerprints import environment
from interventions import printable

HEADINGS = {
    "accuracy": "accuracy",
    "IIA": "IIA",
    "effective": "effective IIA",
    "effect": "effect rate",
    "nothing": "do nothing",
    "s": "seconds",
}
"""The columns of the table, in a terminal and on the page."""
OF_LANGUAGE = {
    "perplexity": "perplexity",
    "agreement": "agreement",
    "KL": "KL of answers",
    "IIA": "IIA",
    "effective": "effective IIA",
    "s": "seconds",
}
"""The columns of language models in a terminal."""
OF_LABELS = {"micro": "micro F1", "macro": "macro F1", "exact": "exact match"}
OF_VALUES = {"MSE": "MSE", "Pearson": "Pearson", "Spearman": "Spearman"}
"""The columns of several labels a row, and of real values, in the place of the accuracy."""
ON_THE_PAGE: tuple[str, ...] = ("layers", "parameters", "perplexity", "accuracy")
ON_THE_PAGE += (*OF_LABELS.values(), *OF_VALUES.values(), "agreement", "KL of answers", "IIA")
ON_THE_PAGE += ("effective IIA", "normalized IIA", "effect rate", "do nothing", "replace all", "KL")
ON_THE_PAGE += ("agreement on bases", "KL on bases", "seconds")


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

    @property
    def figures(self) -> dict[str, str]:
        """The figures as texts, by the headings of the page; empty where they were not measured."""
        interchange = self.evaluation.interchange
        outcome = None if interchange is None else interchange.overall
        return {
            "layers": str(self.layers),
            "parameters": f"{self.parameters:,}",
            "accuracy": _text(self.evaluation.accuracy),
            "perplexity": _number(self.evaluation.perplexity),
            "micro F1": _number(self.evaluation.micro_f1),
            "macro F1": _number(self.evaluation.macro_f1),
            "exact match": _text(self.evaluation.exact_match),
            "MSE": _number(self.evaluation.mse),
            "Pearson": _number(self.evaluation.pearson),
            "Spearman": _number(self.evaluation.spearman),
            "agreement": _text(self.evaluation.agreement),
            "KL of answers": _number(self.evaluation.kl),
            "seconds": "" if self.seconds is None else f"{self.seconds:.1f}",
            **({} if outcome is None else _figures(outcome)),
        }


@dataclass(frozen=True, eq=False)
class Report:
    """A comparison of a teacher with its students.

    Attributes:
        title: of the table and the page.
        task: the rows that the models were trained and measured on.
        models: the teacher and its students.
        settings: plain data, shown on the page and kept in `result.json`.
        comparison: of the students over the same pairs; None where there is none.
        note: why there is none; else empty.
        samples: of text, what the models write.
    """

    title: str
    task: Task
    models: Sequence[ComparedModel]
    settings: dict[str, Any]
    comparison: Comparison | None = None
    note: str = ""
    samples: Sequence[Sample] = ()

    @property
    def headings(self) -> Mapping[str, str]:
        """The columns of the table in a terminal, which hold figures: headings, and the figures below them."""
        figures = [each.figures for each in self.models]
        return {name: each for name, each in self._usual_headings.items() if any(own.get(each) for own in figures)}

    @property
    def _usual_headings(self) -> Mapping[str, str]:
        """The columns for the kind of answers that the models give."""
        measured = [each.evaluation for each in self.models]
        if any(each.perplexity is not None for each in measured):
            return OF_LANGUAGE
        labelled = any(each.accuracy is not None for each in measured)
        if labelled:
            return HEADINGS
        first: dict[str, str] = {"agreement": "agreement"}
        if any(each.exact_match is not None for each in measured):
            first = OF_LABELS
        elif any(each.mse is not None for each in measured):
            first = OF_VALUES
        return {**first, **{name: each for name, each in HEADINGS.items() if name != "accuracy"}}

    @property
    def sentences(self) -> tuple[str, ...]:
        """Plain sentences of what was found, for each student but the first, or why nothing was compared.

        That about interchange comes first, as it is what a run asks.
        """
        if self.comparison is None:
            return (self.note,) if self.note else ()
        found = self.comparison.sentences
        first = [name for name in found if "interchange" in name]
        return tuple(found[name] for name in [*first, *(name for name in found if name not in first)])

    def table(self) -> Table:
        """Return the table for a terminal of 80 characters: a row for each model."""
        title = Text(printable(self.title), "table.title")  # in a str, Rich would read brackets as its own markup
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
        table.add_column("")
        for heading in self.headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for each in self.models:
            figures = each.figures
            cells = {name: figures.get(heading, "") for name, heading in self.headings.items()}
            short = {"accuracy", "agreement", "exact", "IIA"} & cells.keys()
            short |= {"effective"} if "perplexity" in cells else set()
            cells |= {name: cells[name].split(" ")[0] for name in short}  # intervals are on the page
            table.add_row(Text(printable(each.name)), *cells.values())
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        return {
            "title": self.title,
            "task": {"name": self.task.name, "classes": list(self.task.classes), "majority": self.task.majority},
            "settings": self.settings,
            "sentences": list(self.sentences),
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
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
            "samples": [each.to_dict() for each in self.samples],
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
        columns = [name for name in ON_THE_PAGE if any(each.figures.get(name) for each in self.models)]
        cells = [(each.name, *(each.figures.get(name, "") for name in columns)) for each in self.models]
        interchanged = [each for each in self.models if each.evaluation.interchange is not None]
        parts = [
            f"<h1>{escape(self.title)}</h1>",
            *(f"<p class=answer>{escape(sentence)}</p>" for sentence in self.sentences),
            f"<p>{escape(self.task.description)} "
            f"{len(self.task.train):,} training rows, {len(self.task.test):,} held out{_majority_of(self.task)}.</p>",
            *self._compared(),
            "<h2>Every model</h2>",
            table(("", *columns), cells),
            *([f"<p class=note>{escape(LEGEND)}</p>"] if interchanged else []),
            *self._written(),
            *self._pictures(),
            *(["<h2>Interchange accuracy for each entry of the mapping</h2>"] if interchanged else []),
            *map(_per_pair, interchanged),
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

    def _compared(self) -> list[str]:
        """Return the comparison of the students, as a picture and a table."""
        if self.comparison is None:
            return []
        figure = embedded(self.comparison.plot())
        return [f"<h2>The students compared</h2>{figure}<pre>{escape(str(self.comparison))}</pre>"]

    def _written(self) -> list[str]:
        """Return the samples of text."""
        if not self.samples:
            return []
        parts = ["<h2>Text</h2>", "<p class=note>The most likely tokens after the beginning of held-out texts.</p>"]
        for each in self.samples:
            rows = [(name, text) for name, text in each.written.items()]
            parts += [f"<pre>{escape(each.prompt)} …</pre>", table(("", "continued"), rows, text=1)]
        return parts

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
    """Measure a teacher on held-out rows; without labels measure nothing."""
    measured = "labels" in task.test.columns or is_language(task)
    return evaluate(None, teacher, None, task) if measured else Evaluation(None, None)


def print_report(report: Report, console: Console) -> None:
    """Print the tables of a report, each note about the figures once, what the words mean, and what was found."""
    console.print(report.table())
    if report.comparison is not None:
        console.print(kinds_table(report.comparison))
        console.print(_legend(report.comparison), markup=False, highlight=False)
    measured = [each.evaluation.interchange for each in report.models]
    notes = [note for each in measured if each is not None for note in each.notes]
    notes += [each.evaluation.note for each in report.models if each.evaluation.note]
    for note in dict.fromkeys(notes):
        console.print(note, markup=False, highlight=False)
    if any(each is not None for each in measured):
        console.print(WORDS, markup=False, highlight=False)
    for sentence in report.sentences[:1]:  # those of the others are on the page
        console.print()
        console.print(sentence, markup=False, highlight=False)


def kinds_table(comparison: Comparison) -> Table:
    """Return a table for a terminal of 80 characters: the effective IIA of each student, a row for each kind."""
    table = Table(title="effective IIA", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("kind of interchange")
    for name in comparison.students:
        table.add_column(Text(printable(name)), justify="right", min_width=7)
    for kind in comparison.kinds:
        found = [comparison.find("effective", name, kind) for name in comparison.students]
        if any(each is not None for each in found):
            table.add_row(Text(printable(kind)), *map(_marked, found))
    return table


def _marked(found: ComparedFigure | None) -> str:
    """Return a figure as text, with a mark where it surely differs from the first student's, or was trained."""
    if found is None or found.value.estimate is None:
        return "–"
    difference = None if found.difference is None else found.difference.estimate
    sure = difference is not None and (difference.low > 0 or difference.high < 0)
    sign = ("+" if difference.value > 0 else "−") if sure and difference is not None else " "
    return f"{found.value.estimate.value:.3f}{'*' if found.trained else ' '}{sign}"


def _legend(comparison: Comparison) -> str:
    """Return what the marks of the table of kinds mean, and what its intervals are over."""
    counts = [f"{count:,} {name}" for name, count in comparison.settings.get("shared", {}).items()]
    over = f" Over {comparison.settings['pairs']:,} pairs of {', '.join(counts)}." if counts else ""
    first = comparison.students[0]
    return f"* trained on this kind; + −: above or below {first} by more than its 95 % interval.{over}"


def _majority_of(task: Task) -> str:
    """Return the end of a sentence about the held-out rows: how common their most common class is."""
    if is_language(task):
        return ""
    return " without labels" if task.majority is None else f"; the most common class is {task.majority:.1%} of them"


def _text(value: Share | Estimate | None) -> str:
    return "" if value is None else str(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _figures(outcome: Outcome) -> dict[str, str]:
    """Return the figures of an outcome as texts, by the headings of the page."""
    rates = {
        "effect rate": outcome.effect_rate,
        "do nothing": outcome.do_nothing,
        "replace all": outcome.replace_all,
        "KL": outcome.kl,
        "KL on bases": outcome.base_kl,
    }
    return {
        "IIA": _text(outcome.iia),
        "effective IIA": _text(outcome.effective) or "–",
        "normalized IIA": _text(outcome.normalized) or "–",
        "agreement on bases": _text(outcome.agreement),
        **{name: "–" if rate is None else f"{rate:.3f}" for name, rate in rates.items()},
    }


def _per_pair(model: ComparedModel) -> str:
    table, *notes = str(model.evaluation.interchange).split("\n\n")
    return f"<h3>{escape(model.name)}</h3><pre>{escape(table)}</pre>" + "".join(
        f"<p class=note>{escape(note)}</p>" for note in notes
    )


WORDS = (
    "IIA: interchange intervention accuracy, the share of interchanges after which student and teacher answer alike; "
    "effective: of those alone that change the teacher's answer."
)
"""The words of the table in a terminal."""
LEGEND = (
    "IIA: the share of held-out interchanges after which the student answers as the teacher does; effective: on those "
    "alone that change the teacher's answer, which are the effect rate; normalized: 0 for a student that ignores "
    "interchanges, 1 for one that follows all; do nothing and replace all: the IIA of a student that ignores the "
    "interchange, or runs the source instead. In brackets 95 % intervals, which know what pairs share."
)
