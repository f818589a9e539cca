"""The evaluation of a training on held-out rows: on all of them at its end, on a few of them in between."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distill.causal.feed import Samples, given
from distill.causal.model import CausalModel
from distill.data.rows import Rows
from distill.data.task import Task
from distill.errors import DistillError
from distill.evaluation.evaluate import Evaluation, evaluate, evaluate_variables
from distill.interchange.mapping import Sides, layer_mapping
from distill.interchange.positions import PositionRule, Span
from distill.models.class_labels import has_classes
from distill.models.outputs import answered
from distill.models.preprocessors import given_preprocessors, tokenizer_among
from distill.objectives import DIITO, Objective
from distill.processes import dividing
from distill.tasks.loading import rows_to_measure
from distill.teachers.served import Served
from distill.training.checks import check
from distill.training.resolve import Training
from distill.writing.written import data_of
from interventions import Model

PAIRS, FEW_PAIRS = 2000, 100
"""Pairs of base and source that are interchanged at the end of a training, and in between."""
DRAWN_BY = 0
"""The seed that chooses a few of the held-out rows, the same in every training."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The held-out rows of a training, and its networks.

    Attributes:
        training: the training.
        teacher, student: its networks.
        rows: held-out rows, values of a causal model, or None.
        mapping: as `fit` takes it.
        answers: as `fit` takes it.
    """

    training: Training
    teacher: Any
    student: nn.Module
    rows: Any
    mapping: Any
    answers: Any

    @property
    def exists(self) -> bool:
        """True if there is anything to measure on; a causal model samples it."""
        return self.rows is not None or isinstance(self.teacher, CausalModel)

    def few(self, most: int) -> "HeldOut":
        """Return the same with so many of the rows at most, drawn once for all trainings."""
        if not isinstance(self.rows, Rows) or len(self.rows) <= most:
            return self
        drawn = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(DRAWN_BY))[:most]
        rows = self.rows.take(drawn.sort().values)
        return HeldOut(self.training, self.teacher, self.student, rows, self.mapping, self.answers)

    def measure(self, pairs: int | None = None) -> Evaluation:
        """Measure the student, each process on its part; where nothing can be measured, the note says why.

        Args:
            pairs: of base and source, to be interchanged; None takes `PAIRS`.
        """
        with dividing(self.teacher, self.student):
            return self._measure(PAIRS if pairs is None else pairs)

    def _measure(self, pairs: int) -> Evaluation:
        """Measure the student on the rows, or on samples of the causal model."""
        training, teacher, student = self.training, self.teacher, self.student
        if isinstance(teacher, CausalModel):
            excluded = None if isinstance(training.rows, Samples) else training.seen
            with answered((teacher, student), self.answers):
                return evaluate_variables(
                    teacher, student, training.entries, self.rows, examples=pairs, exclude=excluded
                )
        if self.rows is None:
            return Evaluation(None, None)
        mapping = None if self.mapping == {} else training.entries or full_mapping(teacher, student)
        rule = positions_of(training.objectives)
        try:
            return evaluate(teacher, student, mapping, self.rows, positions=rule, pairs=pairs, answers=self.answers)
        except DistillError as nothing:
            return Evaluation(None, None, f"nothing was measured: {nothing}")


def read_held_out(
    training: Training,
    networks: tuple[Any, nn.Module],
    eval_data: Any,
    data: Any,
    task: Task | None,
    *,
    mapping: Any,
    answers: Any,
    tokenizer: Any,
) -> HeldOut:
    """Return the held-out rows of a training; those of a causal model are checked where they are measured on."""
    teacher, student = networks
    rows = eval_data
    if isinstance(training.rows, Rows):
        known, reads = student if teacher is None else teacher, tokenizer_among(given_preprocessors(tokenizer))
        rows = rows_to_measure(eval_data, data_of(data), task, training.rows, known, student, tokenizer=reads)
        if rows is not None and has_classes(rows):
            check(None, student, rows)
    elif isinstance(teacher, CausalModel) and eval_data is not None:
        rows = given(teacher, eval_data)
    return HeldOut(training, teacher, student, rows, mapping, answers)


def positions_of(objectives: Sequence[Objective]) -> PositionRule | None:
    """Return the rule by which the objectives draw positions; the default of DIITO where none interchanges."""
    kinds = (each.kinds for each in objectives if isinstance(each, DIITO))
    return next((each[0].positions for each in kinds if each), Span(0.3))


def full_mapping(teacher: Model | Served | None, student: nn.Module) -> Sides | None:
    """Return the full layer mapping; None where a model has no layers."""
    if teacher is None:
        return None
    try:
        return layer_mapping(teacher, student, "full")
    except DistillError:
        return None
