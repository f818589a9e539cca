"""Interchanges at every place of a teacher and at every place of a student, each run once and compared with all others.

The same pairs and positions serve all places, so the counterfactual of a teacher's place under a pair is compared with
those of all places of the student under that pair: of n places and m places n + m counterfactual runs are made, not
n · m. Each resumes from the run on the base, and the runs on base and source are shared by all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from distill.evaluation.drawn_positions import DrawnPositions, PositionDraws
from distill.evaluation.measurement import Batch, Interchanges
from distill.evaluation.network_interchanges import NetworkInterchanges, answers_at
from distill.evaluation.network_runs import NetworkRuns
from distill.losses import kd
from distill.models.finite import check_answers
from distill.statistics.shifts import log_odds, moments_of
from distill.statistics.tally import Tally, compare_classes, stacked, sum_predictions
from distill.teachers.verbs import grid_of
from interventions import Location, architecture

Grid = tuple[tuple[int, ...], str]
"""The numbers of examples and positions of a place, and the column that says which positions are padding."""


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """The answers of one network after an interchange at one place.

    Attributes:
        grid: of the place; only places of one grid are interchanged at the same positions.
        logits: the answers.
        classes: the classes that they are.
        shift: of the log-odds of the teacher's answer to the base, by the interchange.
        kept: for each pair, whether the interchange replaces something that the answer depends on, but not everything.
    """

    grid: Grid
    logits: Tensor
    classes: Tensor
    shift: Tensor
    kept: Bool[Tensor, " batch"]


@dataclass(frozen=True, eq=False)
class Before:
    """The runs and answers of a batch before any interchange.

    Attributes:
        teacher, student: the runs of both networks.
        on_source: the classes that the student answers to the sources.
        weights: 1 for predictions that count, else 0.
    """

    teacher: NetworkRuns
    student: NetworkRuns
    on_source: Tensor
    weights: Tensor

    @cached_property
    def classes(self) -> tuple[Tensor, Tensor]:
        """The classes that teacher and student answer to the bases."""
        return self.teacher.base.logits.argmax(-1), self.student.base.logits.argmax(-1)

    @cached_property
    def odds(self) -> dict[str, Tensor]:
        """The log-odds that each network gives to the teacher's answer to the base."""
        return {side.name: log_odds(side.base.logits, self.classes[0]) for side in (self.teacher, self.student)}

    @cached_property
    def divergence(self) -> Tensor:
        """KL(teacher ‖ student) of the answers to the bases [nats]."""
        return kd(self.student.base.logits, self.teacher.base.logits, reduction="none")

    def draws(
        self, rule: PositionDraws, side: NetworkRuns, places: Sequence[Location], pairs: Int[Tensor, " batch"]
    ) -> dict[Grid, DrawnPositions]:
        """Return the positions of each grid of the student's places, in the bases and in the sources of one network."""
        drawn: dict[Grid, DrawnPositions] = {}
        for at in places:
            grid = _grid(self.student, at)
            if grid not in drawn:
                drawn[grid] = side.draw_at(at, self.student.base, rule, pairs)
        return drawn

    def interchanged(
        self, side: NetworkRuns, at: Location, drawn: Mapping[Grid, DrawnPositions]
    ) -> Counterfactual | None:
        """Return what a network answers after an interchange at one place; None where the student has no such grid."""
        grid, counted = _grid(side, at), self.weights > 0
        if grid not in drawn:
            return None
        after = side.interchanged((at,), drawn[grid])
        check_answers(after.logits[counted], f"search_mapping, of the {side.name} after an interchange,")
        kept = side.is_informative(after, (at,), drawn[grid], counted)
        shift = log_odds(after.logits, self.classes[0]) - self.odds[side.name]
        return Counterfactual(grid, after.logits, after.logits.argmax(-1), shift, kept)

    def compared(self, wanted: Counterfactual | None, after: Counterfactual | None) -> dict[str, Tensor]:
        """Return what the predictions of each pair add to the sums of one entry, those of `NetworkInterchanges`.

        Nothing is counted where the grids of the two places differ.
        """
        if wanted is None or after is None or wanted.grid != after.grid:
            some = wanted or after
            return {name: torch.zeros_like(each) for name, each in self._sums(some, some, 0 * self.weights).items()}
        kept = wanted.kept & after.kept
        return self._sums(wanted, after, self.weights * kept.view(-1, *[1] * (self.weights.ndim - 1)))

    def _sums(self, wanted: Any, after: Any, counted: Tensor) -> dict[str, Tensor]:
        shifts = moments_of(wanted.shift, after.shift)
        if after.logits.shape[-1] == 1:
            return sum_predictions({"error": (wanted.logits - after.logits).abs()[..., 0], **shifts}, counted)
        compared = compare_classes(wanted.classes, self.classes[0], after.classes, self.classes[1], self.on_source)
        divergences = {
            "divergence": kd(after.logits, wanted.logits, reduction="none"),
            "divergence_on_base": self.divergence,
        }
        return sum_predictions(compared | divergences | shifts, counted)


def _grid(side: NetworkRuns, at: Location) -> Grid:
    return grid_of(side.base, at), architecture(side.base.model).place(at).mask


@dataclass(frozen=True, eq=False)
class CrossedInterchanges(Interchanges):
    """Entries of mappings between two networks, each of one place of the teacher and one of the student.

    Attributes:
        draws: the rule that draws the positions of each entry; those of one kind of interchange have one.
        few: a few bases and sources, as for `NetworkInterchanges`.
    """

    draws: tuple[PositionDraws, ...]
    few: tuple[Batch, Batch]

    @property
    def networks(self) -> tuple[Any, ...]:
        """The teacher and the student."""
        return self.teacher, self.student

    def inputs(self, batch: Batch) -> Any:
        """Return the inputs that the student is called with."""
        return self.pairwise.inputs(batch)

    @cached_property
    def pairwise(self) -> NetworkInterchanges:
        """The same entries, one by one; it runs both networks on bases and sources."""
        return NetworkInterchanges(self.teacher, self.student, self.entries, self.draws, self.few)

    def count(self, base: Batch, source: Batch, teacher_source: Batch | None, pairs: Int[Tensor, " batch"]) -> Tally:
        """Return what these pairs add to the sums of each entry."""
        sides = self.pairwise.sides(base, source, source if teacher_source is None else teacher_source)
        teacher, student = sides
        weights = self.pairwise.weights(student.base.logits, base)
        self.pairwise.check(sides, weights > 0)
        before = Before(teacher, student, answers_at(student.source.logits, student.answers), weights)
        sums: dict[int, dict[str, Tensor]] = {}
        for rule, numbers in self._by_rule():
            own = list(dict.fromkeys(self.entries[i].student[0] for i in numbers))
            drawn = before.draws(rule, student, own, pairs)
            others = drawn if teacher_source is None else before.draws(rule, teacher, own, pairs)
            after = {at: before.interchanged(student, at, drawn) for at in own}
            for at in dict.fromkeys(self.entries[i].teacher[0] for i in numbers):
                wanted = before.interchanged(teacher, at, others)  # one at a time: logits of a language model are large
                mine = [i for i in numbers if self.entries[i].teacher[0] == at]
                sums |= {i: before.compared(wanted, after[self.entries[i].student[0]]) for i in mine}
        return stacked([sums[i] for i in range(len(self.entries))])

    def _by_rule(self) -> list[tuple[PositionDraws, list[int]]]:
        """Return the different rules, each with the numbers of its entries; they may not be hashable."""
        found: list[tuple[PositionDraws, list[int]]] = []
        for number, rule in enumerate(self.draws):
            known = next((numbers for other, numbers in found if other == rule), None)
            if known is None:
                found.append((rule, [number]))
            else:
                known.append(number)
        return found
