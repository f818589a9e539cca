"""The evaluation of a training on held-out rows: on all of them at its end, on a few of them in between."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from distill.causal.feed import Samples, given
from distill.causal.model import CausalModel
from distill.data.rows import Rows
from distill.data.task import Task
from distill.errors import DistillError
from distill.evaluation.evaluate import Evaluation, answers_on, evaluate_variables, with_interchange
from distill.evaluation.measurement import check_pairs, usual_pairs
from distill.interchange.mapping import Sides, layer_mapping
from distill.interchange.positions import PositionRule, Span
from distill.models.class_labels import has_classes
from distill.models.outputs import answered
from distill.models.preprocessors import given_preprocessors, tokenizer_among
from distill.objectives import DIITO, Objective
from distill.processes import dividing
from distill.tasks.loading import held_out, rows_to_measure
from distill.teachers.served import Served
from distill.training.checks import check
from distill.training.readings import duration
from distill.training.resolve import Training
from distill.writing.written import data_of
from interventions import Model

FEW_PAIRS = 100
"""Pairs of base and source that are interchanged between the steps of a training, at most."""
DRAWN_BY = 0
"""The seed that chooses a few of the held-out rows, the same in every training."""


class Measured(NamedTuple):
    """The measurement of a student.

    Attributes:
        evaluation: all figures.
        answers: those of its answers alone; None where they were not measured apart.
        pairs: how many were interchanged.
    """

    evaluation: Evaluation
    answers: Evaluation | None
    pairs: int


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The held-out rows of a training, and its networks.

    Attributes:
        training: the training.
        teacher, student: its networks.
        rows: held-out rows, values of a causal model, or None.
        mapping: as `fit` takes it.
        answers: as `fit` takes it.
        pairs: of base and source, that are interchanged at the end; None chooses by the length of the training, 0 is
            none.
    """

    training: Training
    teacher: Any
    student: nn.Module
    rows: Any
    mapping: Any
    answers: Any
    pairs: int | None = None

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
        return replace(self, rows=rows)

    @property
    def interchanged(self) -> bool:
        """True if interchanges are measured: they are trained on, or a mapping or a number of pairs was given."""
        if self.mapping == {} or self.pairs == 0:
            return False
        trained = any(each.interchanges for each in self.training.objectives)
        return self.pairs is not None or self.mapping is not None or trained

    def pairs_on(self, entries: int) -> int:
        """Return how many pairs are interchanged in so many places at the end: those given, or by the rule."""
        if self.pairs:
            return self.pairs
        steps, _ = duration(self.training.rows, self.training.schedule)
        return usual_pairs(steps * self.training.schedule.batch_size, entries)

    def measure(self, most: int | None = None, known: Measured | None = None) -> Measured:
        """Measure the student, each process on its part; where nothing can be measured, the note says why.

        Args:
            most: how many pairs of base and source are interchanged at most; None does not limit it.
            known: what was measured of this student on these rows; only what it lacks is measured.
        """
        with dividing(self.teacher, self.student):
            return self._measure(2**62 if most is None else most, known)

    def _measure(self, most: int, known: Measured | None) -> Measured:
        """Measure the student on the rows, or on samples of the causal model."""
        training, teacher, student = self.training, self.teacher, self.student
        if isinstance(teacher, CausalModel):
            entries = training.entries if self.pairs != 0 else ()
            pairs = min(most, self.pairs_on(len(entries)))
            if known is not None and known.pairs == pairs:
                return known
            excluded = None if isinstance(training.rows, Samples) else training.seen
            with answered((teacher, student), self.answers):
                found = evaluate_variables(teacher, student, entries, self.rows, examples=pairs, exclude=excluded)
            return Measured(found, None, pairs)
        if self.rows is None:
            return Measured(Evaluation(None, None), None, 0)
        rows = held_out(self.rows, student if teacher is None else teacher, student)
        mapping = (training.entries or full_mapping(teacher, student)) if self.interchanged else None
        pairs = min(most, self.pairs_on(len(mapping))) if mapping else 0
        if known is not None and known.pairs == pairs:
            return known
        try:
            with answered((teacher, student), self.answers):
                answers = answers_on(teacher, student, rows) if known is None else known.answers
                whole = with_interchange(
                    teacher, student, mapping, rows, answers, positions=positions_of(training.objectives),
                    kinds=None, pairs=pairs, seed=0,
                )  # fmt: skip
        except DistillError as nothing:
            return Measured(Evaluation(None, None, f"nothing was measured: {nothing}"), None, -1)
        return Measured(whole, answers, pairs)


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
    pairs: int | None = None,
) -> HeldOut:
    """Return the held-out rows of a training; those of a causal model are checked where they are measured on."""
    if pairs != 0 and pairs is not None:
        check_pairs(pairs)
    teacher, student = networks
    rows = eval_data
    if isinstance(training.rows, Rows):
        known, reads = student if teacher is None else teacher, tokenizer_among(given_preprocessors(tokenizer))
        rows = rows_to_measure(eval_data, data_of(data), task, training.rows, known, student, tokenizer=reads)
        if rows is not None and has_classes(rows):
            check(None, student, rows)
    elif isinstance(teacher, CausalModel) and eval_data is not None:
        rows = given(teacher, eval_data)
    return HeldOut(training, teacher, student, rows, mapping, answers, pairs)


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
