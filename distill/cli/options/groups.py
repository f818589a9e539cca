"""The options that several commands share, in groups: the data, the schedule, and how interchanges are made."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import inf
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distill.data.rows import Rows
from distill.data.task import Task
from distill.data.trained_on import split_seed_of
from distill.errors import DistillError, checked
from distill.interchange.mapping import Sides, as_mapping, depth, entries_of, mapping_of
from distill.interchange.positions import Span
from distill.interchange.sources import InContext, Shuffle
from distill.objectives import DIITO, Objective
from distill.students.from_layers import from_layers
from distill.students.from_width import from_width
from distill.students.importance import importance
from distill.tasks import load
from distill.tasks.named import length_for, named_after
from distill.training.schedule import Schedule
from interventions import Mixup, Noise, printable


@dataclass(frozen=True)
class Options:
    """A group of options."""

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> Any:
        """Return the group, its settings picked by name of all options of a command; paths become texts."""
        return cls(**{
            each.name: str(value) if isinstance(value := options[each.name], Path) else value
            for each in fields(cls)
            if each.name in options
        })  # fmt: skip


LANGUAGE = ("text", "chat")
"""Names of tasks of language models."""
BEST = "best"
"""The value of `--save-best` for the first figure that there is."""
CHOSEN_BY = ("position", "importance", "search")
LOOKED_AT = 256
"""Rows on which the importance of the parts of a teacher is measured."""
SOURCES = ("shuffle", "in-context", "mixup", "noise")


@dataclass(frozen=True)
class DataOptions(Options):
    """The rows of a command: a task or a file, and how much of it is used."""

    task: str | None = None
    data: str | None = None
    eval_data: str | None = None
    text: str | None = None
    label: str | None = None
    fraction: float = 1.0
    classes: str | None = None
    max_length: int | None = None
    split_seed: int | None = None
    clusters: str | None = None
    packing: str | None = None
    block_size: int | None = None

    @property
    def is_language(self) -> bool:
        """True for texts and chats of language models."""
        return self.task in LANGUAGE

    def split_as(self, teacher: Path) -> "DataOptions":
        """Return the same rows split as those that a saved teacher was trained on, unless a split was requested."""
        return self if self.split_seed is not None else replace(self, split_seed=split_seed_of(teacher))

    def load(self, tokenizer: Any, seed: int, model: nn.Module | None = None) -> Task:
        """Load the task; `pvr` where neither a task nor data is named.

        Args:
            tokenizer: for texts; None where the task has none.
            seed: draws the share of the training rows that is used.
            model: texts of a file are cut at the longest input that it reads.
        """
        name = "pvr" if self.task is None and self.data is None else self.task
        options: dict[str, Any] = {
            "data": self.data, "eval_data": self.eval_data, "text": self.text, "label": self.label,
            "classes": None if self.classes is None else [name.strip() for name in self.classes.split(",")],
            "clusters": self.clusters, "packing": self.packing, "block_size": self.block_size,
            "max_length": self.max_length if name is not None or model is None else length_for(model, self.max_length),
        }  # fmt: skip
        split = 0 if self.split_seed is None else self.split_seed
        return load(name, tokenizer=tokenizer, fraction=self.fraction, seed=seed, split_seed=split, **options)

    @property
    def name(self) -> str:
        """The name of the task, or of the file, folder or pattern without its ending, for folders."""
        return self.task or (named_after(self.data) if self.data else "pvr")


@checked
@dataclass(frozen=True)
class StudentOptions(Options):
    """The parts of the teacher that a student has: layers, width, and how they are chosen."""

    student_layers: int | None = None
    student_width: int | None = None
    student_intermediate: int | None = None
    student_by: str = "position"

    def __post_init__(self) -> None:
        if self.student_by not in CHOSEN_BY:
            raise DistillError(f"--student-by {self.student_by} does not exist: choose one of {', '.join(CHOSEN_BY)}.")

    def make(self, teacher: nn.Module, rows: Rows) -> nn.Module:
        """Return the student of a teacher before its training.

        Args:
            teacher: the teacher.
            rows: to train on; the first of them show what is important.
        """
        layers = max(1, depth(teacher) // 2) if self.student_layers is None else self.student_layers
        found = None
        if self.student_by != "position":
            search = layers if self.student_by == "search" else None
            found = importance(teacher, rows.take(range(min(LOOKED_AT, len(rows)))), search=search)
        if self.student_width is not None or self.student_intermediate is not None:
            teacher = from_width(teacher, self.student_width, intermediate=self.student_intermediate, by=found)
        return from_layers(teacher, layers, by=found)


@checked
@dataclass(frozen=True)
class ScheduleOptions(Options):
    """The settings of the schedule that the command line gives; None leaves the value of the task."""

    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    param_dtype: str | None = None
    warmup: float | None = None
    weight_decay: float | None = None
    clip: float | None = None
    accumulate: int | None = None
    optimizer: str | None = None
    decay: str | None = None
    workers: int | None = None
    precision: str | None = None
    gradient_checkpointing: bool | None = None
    weight_decay_on: str | None = None
    group_by_length: bool | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are not None, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def schedule(self, task: Task, seed: int) -> Schedule:
        """Return the schedule of a student: that of the task, with the settings of the command line in its place.

        Three epochs where the task has no network of its own, so that its teacher is one of the user.
        """
        schedule = Schedule.of(task.student or task.recipe, seed)
        if task.network is None or self.epochs is not None:
            schedule = replace(schedule, steps=None, epochs=3)
        return replace(schedule, **self.given)


@dataclass(frozen=True)
class InterchangeOptions(Options):
    """The settings of interchanges: a mapping, the rule of sources, the share of positions, and the size of noise."""

    mapping: str = "full"
    sources: str = "shuffle"
    share: float = 0.3
    sigma: float = 1.0

    @classmethod
    def of(cls, **settings: Any) -> "InterchangeOptions":
        """Build it from what `asdict` returned, also in the version before, which called the sources `pairs`."""
        return cls(**{"sources" if name == "pairs" else name: value for name, value in settings.items()})

    def __post_init__(self) -> None:
        if self.sources not in SOURCES:
            raise DistillError(f"--sources {self.sources} does not exist: choose one of {', '.join(SOURCES)}.")
        if not 0 <= self.sigma < inf:
            raise DistillError(f"--sigma {self.sigma} is no size of noise; use a finite number of 0 or more.")
        Span(self.share)  # raises DistillError for a share that is none

    @property
    def positions(self) -> Span:
        """The rule that draws positions, in training and in measuring."""
        return Span(self.share)

    def mapped(self, teacher: nn.Module, student: nn.Module) -> Sides:
        """Return the mapping between two models, every location of it checked.

        Raises:
            DistillError: a mapping that does not exist, or one that is searched, which needs a training.
        """
        return as_mapping(entries_of(mapping_of(self.mapping, teacher, student), teacher, student))

    def check(self, task: Task) -> None:
        """Raise DistillError for sources that cannot be made from the rows of the task."""
        if self.sources == "in-context" and "input_ids" not in task.train.columns:
            raise DistillError(
                f"--sources in-context replaces tokens, and the rows of {task.name} are "
                f"{', '.join(task.train.columns)}; use --sources shuffle."
            )

    def objective(self, match: Objective, words: Tensor | None) -> DIITO:
        """Return the objective that matches counterfactual runs.

        Args:
            match: compares the student's counterfactual run with the teacher's.
            words: ids of whole words, which in-context sources are made of; None where there is no tokenizer.
        """
        if self.sources in ("mixup", "noise"):
            op = (Mixup if self.sources == "mixup" else Noise)(self.sigma)
            return DIITO(op=op, positions=self.positions, match=match)
        sources = Shuffle() if self.sources == "shuffle" else InContext(words=words)
        return DIITO(sources, positions=self.positions, match=match)


@dataclass(frozen=True)
class MonitorOptions(Options):
    """The evaluation of a student while it is trained, and what comes of it."""

    eval_every: int | str | None = None
    eval_rows: int | None = None
    save_best: str | None = None
    early_stopping: int | None = None
    keep: int | None = None
    track: Sequence[str] | None = ()

    def __post_init__(self) -> None:
        if isinstance(self.eval_every, str) and self.eval_every.isdecimal():
            object.__setattr__(self, "eval_every", int(self.eval_every))
        object.__setattr__(self, "track", tuple(self.track or ()))

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are given, by the names that they have in `fit`."""
        named = {name: value for name, value in asdict(self).items() if value not in (None, ())}
        if self.save_best is not None:
            named["save_best"] = self.save_best == BEST or self.save_best
        return named


def pairs_of_options(pairs: str | None, eval_pairs: int | None) -> tuple[str | None, int | None]:
    """Return the rule of sources that `--pairs` names, as the version before called them, and the number of pairs.

    Raises:
        DistillError: both options name a number.
    """
    if pairs is None or not pairs.lstrip("+-").isdecimal():
        return pairs, eval_pairs
    if eval_pairs is not None:
        raise DistillError(f"--pairs {pairs} and --eval-pairs {eval_pairs} are one option; leave one of them out.")
    return None, int(pairs)


def sources_of(sources: str | None, pairs: str | None) -> str:
    """Return the value of `--sources`, or of `--pairs`, as the version before called that option."""
    if pairs is None:
        return SOURCES[0] if sources is None else sources
    if sources is not None:
        raise DistillError(f"--sources {sources} and --pairs {pairs} are one option; leave --pairs out.")
    print(printable(f"distill: --pairs is deprecated; write --sources {pairs}."), file=sys.stderr)
    return pairs
