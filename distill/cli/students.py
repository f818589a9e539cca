"""The students that `distill fit` trains: on what, and for how long."""

from dataclasses import dataclass
from pathlib import Path

from distill.data.task import Task

ON_KD = {"diito": "interchange", "augmented": "augmented"}
"""The objectives that stand for KD and themselves, and their names in tables."""
UNTRAINED = "untrained"
"""The name of the student before any training, in tables."""


def is_language(task: Task) -> bool:
    """Return whether the rows of a task are texts of language models: each token has a label, and none a class."""
    labels = task.train.table.get("labels")
    return not task.classes and labels is not None and labels[0].ndim == 1


@dataclass(frozen=True)
class StudentPlan:
    """The plan of one student of a run: on what it is trained, and for how long.

    Attributes:
        name: its folder in the run.
        title: its name in tables.
        objectives: as `--objective` names them, with commas.
        as_long_as: the name of the student whose time it is trained for; None for the steps of the schedule.
    """

    name: str
    title: str
    objectives: str
    as_long_as: str | None = None

    def suits(self, task: Task) -> bool:
        """Return whether the rows of a task have what the objectives need: words to replace, for `augmented`.

        Those of language models are their labels too, which would have to be replaced alike.
        """
        return "augmented" not in self.objectives.split(",") or (
            "input_ids" in task.train.columns and not is_language(task)
        )

    def saved_in(self, run: Path) -> Path:
        """Return the folder of the student in a run."""
        return run / self.name


def plan_of(objectives: str) -> StudentPlan:
    """Return the plan of a student that is trained on objectives, with commas between their names."""
    return StudentPlan(objectives.replace(",", "+"), title_of(objectives), objectives)


def title_of(objectives: str) -> str:
    """Return the name of a student in tables, by its objectives.

    >>> title_of("kd"), title_of("diito"), title_of("kd,augmented"), title_of("labels,dkd")
    ('KD', 'KD + interchange', 'KD + augmented', 'labels,dkd')
    """
    names = objectives.split(",")
    if not {"kd", *ON_KD} & set(names):
        return objectives
    return " + ".join(["KD", *(ON_KD.get(name, name) for name in names if name != "kd")])


def steps_as_long(steps: int, ratio: float) -> int:
    """Return how many steps take as long as a training whose steps take `ratio` times as long, and not fewer.

    >>> steps_as_long(600, 1.75), steps_as_long(600, 0.9)
    (1050, 600)
    """
    return max(steps, round(steps * ratio))


USUAL = (
    plan_of("kd"), StudentPlan("kd-equal-time", "KD, equal time", "kd", as_long_as="diito"), plan_of("diito"),
    plan_of("augmented"),
)  # fmt: skip
"""The students of a run whose objective is not named: the first is what the others are compared with."""
