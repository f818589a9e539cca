"""The result of a training, which prints, plots and saves itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from distill.data.seen_rows import SeenRows
from distill.errors import DistillError
from distill.evaluation.evaluate import Evaluation
from distill.publishing.card import write_card
from distill.publishing.push import push_folder
from distill.statistics.tables import table_of
from distill.storage.files import sha256_of, write_json
from distill.training.checkpoints import LOG
from distill.training.progress import Record
from distill.training.run_folder import RESULT, STUDENT
from interventions import Picture, Result, plain_data, printed
from interventions import label as written

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]


@dataclass(frozen=True, eq=False, repr=False)
class FitResult(Result):
    """A trained student, with the record of its training and its evaluation.

    Attributes:
        student: the trained student, the object that was passed in.
        records: one for each step.
        evaluation: on the held-out rows, where there are any.
        settings: of the run, as plain data.
        seconds: how long the training took.
        output_dir: the folder where everything is saved; None where nothing is.
        seen: the rows that were trained on; `interchange_accuracy(…, exclude=result)` refuses them.
        best: the step after which the student was as it is returned, with `save_best`; else None.
    """

    student: nn.Module
    records: tuple[Record, ...]
    evaluation: Evaluation
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    output_dir: Path | None = None
    seen: SeenRows | None = field(default=None, repr=False)
    best: int | None = None

    @property
    def history(self) -> tuple[dict[str, float], ...]:
        """The evaluations between the steps: {"step": its number, name of a figure: value}, in their order."""
        return tuple({"step": each.step, **each.evaluation} for each in self.records if each.evaluation is not None)

    @property
    def stopped(self) -> str | None:
        """The reason why the training ended before its last step; None where it did not."""
        return self.records[-1].stop if self.records else None

    @property
    def iia(self) -> float | None:
        """The interchange intervention accuracy, where it was measured."""
        return None if self.evaluation.interchange is None else self.evaluation.interchange.iia

    @property
    def accuracy(self) -> float | None:
        """The accuracy on held-out rows, where it was measured."""
        return None if self.evaluation.accuracy is None else self.evaluation.accuracy.value

    def plot(self) -> Picture:
        """Draw the terms of the loss over the steps.

        Raises:
            DistillError: no step was made.
        """
        if not self.records:
            raise DistillError("there is no curve of a training without steps; train again with steps=100.")
        return curves({"": self.records})

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the records as a table: a row for each step, with the loss, its terms and the learning rate.

        A term that is called step, loss or lr itself has the column "term loss".

        Raises:
            DistillError: pandas is not installed.
        """
        own = ("step", "loss", "lr")
        rows = (
            {
                **{name: getattr(each, name) for name in own},
                **{f"term {name}" if name in own else name: value for name, value in each.terms.items()},
            }
            for each in self.records
        )
        return table_of(rows, "step")

    def to_dict(self) -> dict[str, Any]:
        """Return settings, number of steps, seconds, evaluation and the last record as plain data, for JSON."""
        return {
            "settings": plain_data(self.settings),
            "steps": len(self.records),
            "seconds": round(self.seconds, 2),
            "evaluation": self.evaluation.to_dict(),
            **({"history": plain_data(self.history), "best": self.best} if self.history else {}),
            "last": plain_data(self.records[-1].to_dict()) if self.records else None,
        }

    def save(self, folder: Path, *, teacher: Any = None, rows: int | None = None) -> None:
        """Write `result.json` into `folder`, with the checksum of the log there, and the card of a saved student.

        Args:
            folder: of the run.
            teacher: for the card: the network that the student learned from.
            rows: for the card: how many rows it was trained on.
        """
        log = folder / LOG
        write_json(folder / RESULT, {**self.to_dict(), **({"log": sha256_of(log)} if log.is_file() else {})})
        if (folder / STUDENT).is_dir():
            write_card(
                folder / STUDENT, student=self.student, teacher=teacher, evaluation=self.evaluation,
                settings=self.settings, steps=len(self.records), rows=rows,
            )  # fmt: skip

    def push(self, repo: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the saved student with its card to the Hugging Face hub, and return the address of the repository.

        Fingerprints of the rows that it was trained on are not uploaded.

        Args:
            repo: the id of the repository, as "organisation/name"; it is made if need be.
            private: whether a new repository is private.
            token: of the hub; None takes that of the login.

        Raises:
            DistillError: nothing is saved, or the hub cannot be reached or refuses.
        """
        if self.output_dir is None:
            raise DistillError(
                f"push({repo!r}) uploads a saved student, and this one is not; use fit(…, output_dir='a')."
            )
        return push_folder(self.output_dir / STUDENT, repo, private=private, token=token)

    @printed
    def __str__(self) -> str:
        if not self.records:
            return f"no step was made\n{self.evaluation}"
        last = self.records[-1]
        terms = ", ".join(f"{name} {value:.4g}" for name, value in last.terms.items())
        where = "" if self.output_dir is None else f"; saved in {self.output_dir}"
        early = "" if self.stopped is None else f" of {last.total} ({self.stopped})"
        kept = "" if self.best is None else f"; the student is that of step {self.best}"
        return (
            f"{last.step} steps{early} in {self.seconds:.1f} s, last loss {last.loss:.4g} ({terms}){kept}{where}\n"
            f"{self.evaluation}"
        )

    def __repr__(self) -> str:
        return f"FitResult({str(self).splitlines()[0]})"


def curves(runs: Mapping[str, Sequence[Record]]) -> Picture:
    """Draw the terms of one or several runs over their steps, each smoothed over 2 % of them.

    Args:
        runs: {name of a run, for the legend: its records}.
    """
    names = list(dict.fromkeys(name for records in runs.values() for record in records for name in record.terms))
    figure = Picture(figsize=(3.4 * max(1, len(names)), 2.6), layout="constrained")
    all_axes = figure.subplots(1, max(1, len(names)), squeeze=False)[0]
    for axes, term in zip(all_axes, names, strict=False):
        for number, (name, records) in enumerate(runs.items()):
            found = {record.step: record.terms[term] for record in records if term in record.terms}
            if found:
                values = _smooth(list(found.values()), max(1, len(found) // 50))
                axes.plot(list(found), values, color=f"C{number}", label=written(name) or None)
        positive = all(value > 0 for line in axes.lines for value in line.get_ydata())
        axes.set(title=written(term), xlabel="step", yscale="log" if positive else "linear")
        axes.grid(alpha=0.3)
        if any(runs):
            axes.legend(frameon=False, fontsize="small")
    return figure


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the means of each value and those before it, over a window."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]
