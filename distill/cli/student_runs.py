"""The trainings of `distill fit`: every student of a run, for each seed, one after another; read again when resumed."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from distill.cli.fit_command import FitCommand
from distill.cli.students import StudentPlan, steps_as_long
from distill.data.seen_rows import SeenRows
from distill.data.task import Task
from distill.errors import DistillError, OtherProcessFailed
from distill.evaluation.evaluate import Evaluation, evaluate
from distill.evaluation.progress import measurements_shown
from distill.fit import fit
from distill.interchange.mapping import Sides
from distill.models.pretrained import load_model
from distill.monitoring.held_out import positions_of
from distill.processes import from_first
from distill.results import FitResult
from distill.storage.files import check_folder_whole, clear_leftovers, read_json, write_json
from distill.storage.locks import held
from distill.training.run_folder import RESULT, STUDENT, Interrupted, Resume, read_log
from distill.training.schedule import Schedule
from distill.training.step_times import step_ratio
from interventions import printable

TIMES = "times.json"
TIMED = 15
"""How many steps of two students are timed."""


@dataclass(frozen=True, eq=False)
class StudentRuns:
    """The trainings of one `distill fit`, with what they share.

    Attributes:
        command: its settings.
        folder: of the run.
        task, teacher, tokenizer: what is learned, from whom, and what both read with, or None.
        smaller: a student before any training.
        mapping: between teacher and students.
        schedule: of the students.
        resume: whether trainings that are finished are read again, and others resumed.
        console: shows the progress.
        pairs: of base and source, that each student is measured on; 0 measures no interchanges.
    """

    command: FitCommand
    folder: Path
    task: Task
    teacher: nn.Module
    tokenizer: Any
    smaller: nn.Module
    mapping: Sides
    schedule: Schedule
    resume: Resume
    console: Console
    pairs: int

    def plan(self, plans: Sequence[StudentPlan]) -> str:
        """Return what the run does, as text: the students, their steps, and on what they are measured."""
        rows, seeds = len(self.task.train), self.command.training_seeds
        steps = self.schedule.total(rows)
        titles = [plan.title for plan in plans]
        trainings = len(titles) * len(seeds)
        over = f", {len(seeds)} seeds each" if len(seeds) > 1 else ""
        many = f"{trainings} trainings, one after the other ({', '.join(titles)}{over}): " if trainings > 1 else ""
        epochs, each = steps / self.schedule.per_epoch(rows), " each" if many else ""
        return printable(
            f"{many}{steps:,} steps of {self.schedule.batch_size} rows{each} ({epochs:.3g} epochs of {rows:,} rows), "
            f"then measured on {len(self.task.test):,} held-out rows and {self._pairs_as_text}."
        )

    @property
    def _pairs_as_text(self) -> str:
        if not self.pairs:
            return "no interchanges (--pairs 200 measures some)"
        return (
            f"{self.pairs:,} interchanged pairs (IIA: the share after which student and teacher answer alike; --no-iia "
            "leaves it out)"
        )

    def measure(self, student: nn.Module, title: str = "untrained") -> Evaluation:
        """Measure a student on the held-out rows, with the rule of positions that measures all of them."""
        mapping = self.mapping if self.pairs else None
        with measurements_shown(self.console, title):
            return evaluate(
                self.teacher, student, mapping, self.task, positions=self.command.interchanges.positions,
                pairs=max(1, self.pairs),
            )  # fmt: skip

    def train(self, plans: Sequence[StudentPlan]) -> dict[str, list[FitResult]]:
        """Train the students of all seeds, and return {title: the result of each seed}."""
        found: dict[str, list[FitResult]] = {plan.title: [] for plan in plans}
        number, count = 0, len(plans) * len(self.command.training_seeds)
        for seed in self.command.training_seeds:
            done: dict[str, FitResult] = {}
            for plan in sorted(plans, key=lambda each: each.as_long_as is not None):
                number += 1
                of = f"{number} of {count}, " if count > 1 else ""
                done[plan.name] = self._train(plan, seed, self._schedule(plan, seed, done), of)
            for plan in plans:
                found[plan.title].append(done[plan.name])
        return found

    def _schedule(self, plan: StudentPlan, seed: int, done: dict[str, FitResult]) -> Schedule:
        """Return the schedule of a student; of one that is trained as long as another, with as many more steps."""
        schedule = replace(self.schedule, seed=seed)
        if plan.as_long_as is None:
            return schedule
        steps = len(done[plan.objectives].records)
        return replace(schedule, steps=steps_as_long(steps, self._ratio(plan.objectives, plan.as_long_as)))

    def _ratio(self, one: str, other: str) -> float:
        """Return how many times as long a step of other objectives takes, measured once in a run, which keeps it.

        It is rounded to 0.05, so that runs on one machine mostly have the same number of steps.
        """
        kept = self.folder / TIMES
        way_out = f"start the run anew: distill fit --output {self.folder}-2"
        known = from_first(lambda: read_json(kept, way_out)["ratio"] if kept.exists() else None)
        if known is not None:
            return float(known)
        objectives = [self.command.objectives(each, words_of(self.tokenizer)) for each in (one, other)]
        measured = step_ratio(
            self.teacher, copy.deepcopy(self.smaller), self.mapping, self.task.train, one=objectives[0],
            other=objectives[1], schedule=self.schedule, steps=TIMED,
        )  # fmt: skip
        ratio = round(20 * measured.value) / 20
        from_first(lambda: write_json(kept, {"ratio": ratio, "one": one, "other": other, **asdict(measured)}))
        return ratio

    def _train(self, plan: StudentPlan, seed: int, schedule: Schedule, of: str) -> FitResult:
        """Train and measure one student; the same rule of positions measures students of all objectives.

        Args:
            plan, seed, schedule: of the student.
            of: which of how many trainings it is, before its title.
        """
        folder = self.command.folder_of(self.folder, plan, seed)
        student, title = copy.deepcopy(self.smaller), of + self.command.title_of(plan, seed)
        objectives = self.command.objectives(plan.objectives, words_of(self.tokenizer))
        result = self._fit_or_read(student, folder, objective=objectives, schedule=schedule, title=title)
        # Where students are measured between the steps, so is the trained one, by the rule of its objectives.
        alike = positions_of(objectives) == self.command.interchanges.positions
        if not (alike and result.evaluation.figures):
            evaluation = self.measure(student, title)
            result = replace(result, evaluation=evaluation.marked(result.settings.get("kinds")))
        from_first(lambda: result.save(folder, teacher=self.teacher, rows=len(self.task.train)))
        return result

    def _monitored(self) -> dict[str, Any]:
        """Return the settings of what happens around the steps; students are measured on held-out rows between them."""
        given = self.command.monitored.given
        return {**given, "eval_data": self.task.test} if "eval_every" in given else given

    def _fit_or_read(self, student: nn.Module, folder: Path, **settings: Any) -> FitResult:
        """Train one student; in a resumed run, read one that is finished, and start one that was not started."""
        begun, finished = from_first(lambda: (folder.exists(), (folder / RESULT).exists()))
        if self.resume and finished:
            try:
                with held(folder):
                    from_first(lambda: clear_leftovers(folder))
                    return _read_finished(student, folder)
            except DistillError as error:
                warnings.warn(f"{error} The student is resumed from its last checkpoint.", stacklevel=2)
        resume = self.resume if begun else False
        try:
            return fit(
                self.teacher, student, self.mapping, self.command.data(self.task), output_dir=folder, resume=resume,
                console=self.console, tokenizer=self.tokenizer, every=self.command.every, cache=self.command.cache,
                top_k=self.command.top_k, pairs=self.pairs, **self._monitored(), **settings,
            )  # fmt: skip
        except (Interrupted, OtherProcessFailed) as stop:
            raise type(stop)(
                f"{str(stop).split('; go on')[0]}; go on with: distill fit --resume {self.folder}"
            ) from None


def _read_finished(student: nn.Module, folder: Path) -> FitResult:
    """Return the result of a student that is finished, with the saved weights put into the student.

    Raises:
        DistillError: a file is damaged.
    """
    saved_result, trained_on = read_json(folder / RESULT, "it is made again"), SeenRows.load(folder / STUDENT)
    check_folder_whole(folder / STUDENT, "it is made again")
    saved = load_model(folder / STUDENT)
    student.to(next(saved.parameters()).dtype).load_state_dict(saved.state_dict())
    settings, seconds = saved_result["settings"], saved_result["seconds"]
    return FitResult(student, tuple(read_log(folder)), Evaluation(None, None), settings, seconds, folder, trained_on)


def words_of(tokenizer: Any) -> Tensor | None:
    """Return the ids of whole words, for in-context sources; None without a tokenizer."""
    if tokenizer is None:
        return None
    special = set(tokenizer.all_special_ids)
    words = [
        i for word, i in tokenizer.get_vocab().items() if i not in special and not word.startswith(("##", "[unused"))
    ]
    return torch.tensor(sorted(words))
