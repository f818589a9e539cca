"""Which rows of a batch an interchange says nothing about: it changes nothing that counts, or replaces everything.

What decides is what `interchange_accuracy` leaves out, see `distill.interchange.vacuous`: in teacher and student, the
positions that an output depends on, and whether the places are the whole state of the network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distill.interchange.mapping import Entry
from distill.interchange.vacuous import Places, Whole, touched, unpadded, visible
from distill.models.inputs import inputs_of, students, teachers
from distill.objectives.diito import DIITO, Counterfactual
from distill.objectives.step import Step
from distill.teachers.served import ServedRun
from distill.teachers.verbs import answering, run_of
from interventions import Location, Run

Masks = Mapping[Location, Tensor]
FEW = 32
"""How many rows show which places are the whole state of a network."""


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two networks, and what its answers to the rows of a batch depend on.

    Attributes:
        base: the run of the rows.
        seen: for each place, the positions that the measured predictions depend on, `[batch, position]`.
        whole: finds the places that hold all of the network's state; None where there are no sources.
    """

    base: Run
    seen: Masks
    whole: Whole | None

    def is_void(
        self, after: Run, places: Places, written: Tensor | None, counted: Bool[Tensor, "batch ..."]
    ) -> Bool[Tensor, " batch"]:
        """Return which rows of a counterfactual run say nothing about the network.

        Args:
            after: the run.
            places: the places that were written.
            written: the positions that were written, None for all.
            counted: which predictions count.
        """
        reached = touched(places, self.seen, written)
        if not isinstance(self.base, ServedRun):  # the requests of a served run differ in rounding
            reached = reached | _any((after.logits != self.base.logits).any(-1) & counted)
        if self.whole is None:
            return ~reached
        return ~reached | self.whole.replaced(places, self.seen, written).to(reached.device)


def counted_in(step: Step) -> Bool[Tensor, "batch ..."]:
    """Return which predictions of the student count: of tokens those with a label, or that are no padding."""
    logits = step.student.logits
    mask = step.mask(logits)
    return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device) if mask is None else mask.bool()


def sides_of(step: Step, entries: Sequence[Entry], wholes: Sequence[Whole | None]) -> tuple[Side, Side]:
    """Return teacher and student with what their answers depend on, at all places of these entries."""
    weights = counted_in(step).double()
    found = []
    for number, base in enumerate((step.taught, step.student)):
        found.append(Side(base, visible(base, places_of(entries, number), weights), wholes[number]))
    return found[0], found[1]


def wholes_of(step: Step, objective: DIITO, entries: Sequence[Entry], vocabulary: int | None) -> list[Whole | None]:
    """Return for teacher and student what finds the whole of their state, on the first rows of a batch."""
    if objective.sources is None:
        return [None, None]
    few = {name: column[:FEW] for name, column in step.batch.items()}
    drawn = objective.sources.draw(few, vocabulary, torch.Generator(step.generator.device).manual_seed(0))
    source = (
        drawn if isinstance(drawn, Mapping) else {name: column[drawn.to(column.device)] for name, column in few.items()}
    )
    found: list[Whole | None] = []
    for number, (run, columns) in enumerate(((step.taught, teachers), (step.student, students))):
        model, places = answering(run), [at.whole for at in places_of(entries, number)]
        base, other = (run_of(model, inputs_of(model, columns(each)), places) for each in unpadded(few, source))
        found.append(Whole(base, other))
    return found


def void_rows(sides: tuple[Side, Side], found: Counterfactual, counted: Tensor) -> Bool[Tensor, " batch"]:
    """Return which rows of an interchange say nothing, because of the teacher or because of the student."""
    written, entry = found.positions[0], found.entry
    teacher = sides[0].is_void(found.teacher, entry.teacher, written, counted)
    return teacher | sides[1].is_void(found.student, entry.student, written, counted).to(teacher.device)


def moved(found: Counterfactual, base: Run, counted: Bool[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """Return how far the interchange moves the teacher's logits: the largest difference of those that count."""
    far = (found.teacher.logits - base.logits).abs().float().amax(-1).masked_fill(~counted, 0)
    return far if far.ndim == 1 else far.flatten(1).amax(1)


def effects(found: Counterfactual, base: Run, counted: Bool[Tensor, "batch ..."]) -> int | None:
    """Return how many of the teacher's counted predictions the interchange changes; None for regression."""
    if base.logits.shape[-1] == 1:
        return None
    return int(((found.teacher.logits.argmax(-1) != base.logits.argmax(-1)) & counted).sum())


def places_of(entries: Sequence[Entry], number: int) -> list[Any]:
    """Return the places of the teacher (0) or of the student (1), each once."""
    return list(dict.fromkeys(at for entry in entries for at in (entry.teacher, entry.student)[number]))


def _any(mask: Bool[Tensor, "batch ..."]) -> Bool[Tensor, " batch"]:
    return mask if mask.ndim == 1 else mask.flatten(1).any(1)
