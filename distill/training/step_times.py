"""The ratio of the time of a step of some objectives to that of a step of others, to train a control for an equal time.

Two trainings of copies of one student take turns, a step of one and a step of the other, on the same rows, so that
whatever else the machine does slows both alike. Where the steps of pair i take a_i and b_i, and ā is the mean of a,

    ratio = Σ b_i / Σ a_i,    its standard error = √(Σ (b_i − ratio · a_i)² / (n (n − 1))) / ā,

and the 95 % interval is as many of these to either side as the quantile of Student's t for n − 1 degrees of freedom.

Cochran 1977, Sampling Techniques, section 6.4.
"""

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import nn

from distill.causal.model import CausalModel
from distill.errors import DistillError
from distill.interchange.mapping import Entry, Sides
from distill.models.inputs import evaluating
from distill.models.outputs import same_answers
from distill.models.trials import translated
from distill.objectives import Objective
from distill.processes import gather, process_state
from distill.statistics.intervals import student_quantile
from distill.teachers.served import Served
from distill.teachers.without_adapters import teacher_and_student
from distill.training.loop import train
from distill.training.progress import Record
from distill.training.resolve import objectives_of, training_of
from distill.training.schedule import Schedule, drawing
from interventions import Model

UNMEASURED = 3
"""Steps of each training before those that are measured, in which an optimizer makes its state and caches fill."""
BEFORE = -2
"""The step to whose seed the default generators are set while trainings are measured; they are restored afterwards."""

Clock = Callable[[], float]
Several = Objective | Sequence[Objective]


@dataclass(frozen=True)
class StepRatio:
    """The ratio of the time of a step of some objectives to that of a step of others, with its 95 % interval.

    Attributes:
        value: the ratio.
        low, high: the ends of the interval, of what this machine did while it was measured.
        steps: how many steps of each were measured.

    >>> print(StepRatio.of([1.0, 2.0, 3.0], [1.5, 3.1, 4.4]))
    1.50 [1.38, 1.62]
    """

    value: float
    low: float
    high: float
    steps: int

    @classmethod
    def of(cls, one: Sequence[float], other: Sequence[float]) -> "StepRatio":
        """Return the ratio of the sums of two lists of durations, pair by pair, with its interval.

        Raises:
            DistillError: the steps of `one` took no time.
        """
        count, total = len(one), sum(one)
        if not total > 0:
            raise DistillError(
                f"{count} steps took {total:g} s by this clock, and no step is a number of times as long; measure more "
                f"of them: step_ratio(…, steps={10 * count})."
            )
        value = sum(other) / total
        squares = sum((b - value * a) ** 2 for a, b in zip(one, other, strict=True))
        half = student_quantile(count - 1) * sqrt(squares / (count * (count - 1))) / (total / count)
        return cls(value, max(0.0, value - half), value + half, count)

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def step_ratio(
    teacher: Model | Served | CausalModel | None,
    student: nn.Module,
    mapping: Sides | tuple[Entry, ...] | str | None,
    rows: Any,
    *,
    one: Several,
    other: Several,
    schedule: Schedule,
    steps: int = 30,
    clock: Clock | None = None,
) -> StepRatio:
    """Measure how many times as long a step of the objectives `other` takes as one of `one`.

    Two copies of the student make the first steps of the training that `schedule` says, each by copies of its
    objectives, and take turns. The student, the teacher, the objectives and the default generators are as before
    afterwards, except that on a machine with a GPU the teacher has been moved there, as `fit` moves it. What the steps
    cost later, e.g. when answers fetched once are kept, is not seen.

    Args:
        teacher, student, mapping, rows: as for `fit`. Rules for answers hold that are in force (`answered`).
        one, other: the objectives, as `objective` of `fit`.
        schedule: batches, accumulation, clipping and optimizer of both trainings, and their seed.
        steps: how many steps of each are measured, at least 2, after 3 that are not.
        clock: returns a time [s]. By default processor time of all threads of this process on a CPU, where others may
            compute too; on a GPU time as it passes, when all that was started there is done.

    Raises:
        DistillError: a served teacher, fewer than two steps, a student or objectives that cannot be copied, or
            arguments that `fit` would refuse.
    """
    _refuse_unmeasurable(teacher, steps)
    teacher, student = teacher_and_student(teacher, student)
    device = process_state().device
    clock = clock_of(device) if clock is None else clock

    begun = partial(
        _training_of_a_copy, teacher, student, mapping, rows, schedule=schedule, least=UNMEASURED + steps + 1
    )
    with warnings.catch_warnings(), drawing(schedule.seed, BEFORE, device), translated():
        warnings.simplefilter("ignore")  # the training gives the same warnings
        with begun(objectives=one) as first, begun(objectives=other) as second:
            for _ in range(UNMEASURED):
                next(first), next(second)
            pairs = [(_duration(clock, first), _duration(clock, second)) for _ in range(steps)]
    # Processes that train together must come to one ratio, as they make equally many steps by it.
    own = torch.tensor(pairs, dtype=torch.float64).to(device if process_state().num_processes > 1 else "cpu")
    durations = gather(own).view(-1, steps, 2).sum(0)
    return StepRatio.of(durations[:, 0].tolist(), durations[:, 1].tolist())


def clock_of(device: torch.device) -> Clock:
    """Return the clock by which steps on a device are measured [s]."""
    if device.type == "cpu":
        return time.process_time

    def elapsed() -> float:
        torch.get_device_module(device).synchronize()
        return time.perf_counter()

    return elapsed


def _refuse_unmeasurable(teacher: Any, steps: int) -> None:
    """Raise DistillError for a served teacher, and for too few steps."""
    if isinstance(teacher, Served):
        raise DistillError(
            f"how long a step with {teacher!r} takes depends on its host and on which answers its cache holds, and "
            "measuring it would fill that; measure with the model itself: step_ratio(served.model, …)."
        )
    if steps < 2:
        raise DistillError(
            f"step_ratio(steps={steps}) has no interval, which needs 2 steps or more of each; use e.g. steps=30."
        )


@contextmanager
def _training_of_a_copy(
    teacher: Any, student: nn.Module, mapping: Any, rows: Any, *, objectives: Several, schedule: Schedule, least: int
) -> Iterator[Generator[Record, None, None]]:
    """Yield the steps of a training of copies of a student and its objectives, of which there are `least` or more."""
    copied, own = _copies(student, objectives_of(objectives, teacher, mapping))
    with same_answers(copied, student), ExitStack() as modes:
        training = training_of(teacher, copied, mapping, rows, objective=own, weights=None, schedule=schedule)
        total = max(least, schedule.total(len(training.rows)))
        # Two trainings have one teacher, so that neither of them may be the one to bring back its modes.
        for model in training.computation.still:
            modes.enter_context(evaluating(model))
        with closing(train(replace(training, schedule=replace(schedule, steps=total)))) as records:
            yield records


def _copies(student: nn.Module, objectives: list[Objective]) -> tuple[nn.Module, list[Objective]]:
    """Return copies of a student and of its objectives, which know the copy where they know the student.

    Raises:
        DistillError: they hold what cannot be copied.
    """
    try:
        return deepcopy((student, objectives))
    except Exception as error:
        why = (str(error).strip().splitlines() or ["no message"])[0].rstrip(".;")
        raise DistillError(
            f"step_ratio trains copies, and this {type(student).__name__} with {objectives} cannot be copied "
            f"({type(error).__name__}: {why}); keep out of it what copy.deepcopy(student) cannot copy."
        ) from error


def _duration(clock: Clock, records: Generator[Record, None, None]) -> float:
    """Return how long the next step takes."""
    began = clock()
    next(records)
    return clock() - began
