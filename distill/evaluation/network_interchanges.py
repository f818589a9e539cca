"""Interchanges in two networks at once, with the same positions and sources on both sides of a mapping.

An interchange that replaces everything that an output depends on, or nothing of it, is left out: it would compare
answers, not computation. The predictions of token models count where they have a label, or without labels where they
are no padding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from distill.errors import NothingToMeasure
from distill.evaluation.drawn_positions import DrawnPositions, PositionDraws
from distill.evaluation.measurement import Batch, Interchanges
from distill.interchange.attention_keys import over_keys
from distill.interchange.mapping import Entry
from distill.interchange.vacuous import Answers, Places, Whole, touched, unpadded, visible
from distill.losses import kd
from distill.models.finite import check_answers
from distill.models.inputs import decoder_masked, inputs_of, real_tokens, students, teachers
from distill.models.loss_masks import TOKENS, LabelPlace, label_place, loss_masks
from distill.statistics.shifts import moments
from distill.statistics.tally import Tally, compare_classes, stacked, sum_predictions
from distill.teachers.served import ServedRun
from distill.teachers.verbs import grid_of, interchanged, run_of
from interventions import Location, Run, architecture

NAMES = ("teacher", "student")
Masks = dict[Location, Bool[Tensor, "batch _"]]


@dataclass(frozen=True, eq=False)
class NetworkRuns:
    """The runs of one of the two networks on a batch of pairs.

    Attributes:
        name: "teacher" or "student".
        base, source: the runs.
        columns, source_columns: the columns of the bases and of the sources.
        student_source: the student's run on the same source.
        seen: for each location, the positions that the output depends on.
        whole: finds interchanges that replace everything that the network's answer depends on.
        answers: of token models, for each token of the base the column of the source's token of the same number, or −1.
    """

    name: str
    base: Run
    source: Run
    columns: Batch
    source_columns: Batch
    student_source: Run
    seen: Masks
    whole: Whole
    answers: Int[Tensor, "batch token"] | None

    def interchanged(self, places: Places, drawn: DrawnPositions) -> Run:
        """Return the counterfactual run: the base with the values at these locations taken from the source."""
        source = over_keys(self.base, self.source, places, self.columns, self.source_columns)
        return interchanged(self.base, source, places, (drawn.written, drawn.read))

    def draw_at(self, at: Location, base: Run, draws: PositionDraws, pairs: Int[Tensor, " batch"]) -> DrawnPositions:
        """Draw positions from the real ones of a location in the base and in the source.

        Args:
            at: the location.
            base: the run on the bases that has it: the student's, wherever the student runs.
            draws: the rule.
            pairs: the numbers of the pairs.
        """
        if len(grid_of(base, at)) < 2:
            return DrawnPositions.every(len(pairs), base.logits.device)
        real = [_real(base, at, self.columns), _real(self.student_source, at, self.source_columns)]
        return draws.of(pairs, (self.columns, self.source_columns), real)

    def is_informative(
        self, after: Run, places: Places, drawn: DrawnPositions, counted: Bool[Tensor, "batch ..."]
    ) -> Bool[Tensor, " batch"]:
        """Return whether an interchange replaces something that the output depends on, but not everything.

        Args:
            after: the counterfactual run.
            places: the locations that were interchanged.
            drawn: the positions that were interchanged.
            counted: which predictions count.
        """
        answers = Answers(self.base, self.source, after, self.answers, counted)
        reached = touched(places, self.seen, drawn.written)
        if not isinstance(self.base, ServedRun):  # the requests of a served run differ in rounding
            reached = reached | answers.changed()
        whole = self.whole.replaced(places, self.seen, drawn.written)
        return reached & ~whole & ~(answers.are_the_sources() & drawn.alike)


@dataclass(frozen=True, eq=False)
class NetworkInterchanges(Interchanges):
    """The entries of a mapping between two networks, each interchanged in both.

    Attributes:
        draws: the rule that draws the positions of each entry.
        few: a few bases and sources. On them it is found out which tokens have the labels, whether the outputs depend
            on every real token, and which locations hold everything that an output depends on.
    """

    draws: tuple[PositionDraws, ...]
    few: tuple[Batch, Batch]

    @property
    def networks(self) -> tuple[Any, ...]:
        """The teacher and the student."""
        return self.teacher, self.student

    def inputs(self, batch: Batch) -> Any:
        """Return the inputs that the student is called with."""
        return inputs_of(self.student, students(batch))

    def count(self, base: Batch, source: Batch, teacher_source: Batch | None, pairs: Int[Tensor, " batch"]) -> Tally:
        """Return what these pairs add to the sums of each entry."""
        teacher, student = sides = self.sides(base, source, source if teacher_source is None else teacher_source)
        weights, sums = self.weights(student.base.logits, base), []
        self.check(sides, weights > 0)
        on_source = answers_at(student.source.logits, student.answers)
        for number, entry in enumerate(self.entries):
            drawn = self._draw(number, student, sides, pairs)
            draws = (drawn if teacher_source is None else self._draw(number, teacher, sides, pairs), drawn)
            after, kept = [], torch.ones(len(weights), dtype=torch.bool, device=weights.device)
            for side, places, chosen in zip(sides, (entry.teacher, entry.student), draws, strict=True):
                after.append(side.interchanged(places, chosen))
                _check(f"{side.name} after an interchange", after[-1].logits, weights > 0)
                kept &= side.is_informative(after[-1], places, chosen, weights > 0)
            counted = weights * kept.view(-1, *[1] * (weights.ndim - 1))
            sums.append(sum_predictions(_compare(after, sides, on_source), counted))
        return stacked(sums)

    def teacher_changes(
        self, base: Batch, source: Batch, pairs: Int[Tensor, " batch"], entries: Sequence[int]
    ) -> Bool[Tensor, "batch entries"]:
        """Return at which of some entries the interchange of each pair changes an answer of the teacher that counts.

        An interchange that replaces everything that the teacher's answer depends on changes none. The student does not
        run.
        """
        before, other = (self._run(0, batch) for batch in (base, source))
        weights, found = self.weights(before.logits, base), []
        answers = _columns(other.logits, self._masked(source), before.logits, self._masked(base))
        seen = self._seen(0, before, base)
        side = NetworkRuns(NAMES[0], before, other, base, source, other, seen, self.wholes[0], answers)
        for number in entries:
            places = self.entries[number].teacher
            drawn = side.draw_at(places[0], before, self.draws[number], pairs)
            after = side.interchanged(places, drawn)
            changes = (after.logits.argmax(-1) != before.logits.argmax(-1)) & (weights > 0)
            informative = side.is_informative(after, places, drawn, weights > 0)
            found.append((changes if changes.ndim == 1 else changes.any(1)) & informative)
        return torch.stack(found, 1)

    @cached_property
    def label_place(self) -> LabelPlace:
        """The rule by which tokens of token models have labels."""
        few = self.few[0]
        return label_place(self.student, run_of(self.student, self.inputs(few), resumable=False).logits, few)

    @cached_property
    def sees_all(self) -> bool:
        """True where outputs depend on every real token of the few examples: then batches need no gradients."""
        few = self.few[0]
        return all(
            torch.equal(mask, _real(ran, at, few))
            for number, ran in enumerate(self._runs(few))
            for at, mask in self._visible(number, ran, few).items()
        )

    @cached_property
    def wholes(self) -> tuple[Whole, ...]:
        """The checks, one for each network, whether locations hold everything that its answer depends on."""
        bases, sources = (self._runs(batch) for batch in unpadded(*self.few))
        return tuple(Whole(base, source) for base, source in zip(bases, sources, strict=True))

    def weights(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return 1 for predictions that count, else 0: one of each example, or tokens with a label, or real tokens."""
        if logits.ndim == 2:
            return torch.ones(len(logits), dtype=torch.float64, device=logits.device)
        mask = loss_masks(self.student, batch, self.label_place)[TOKENS] if self.label_place != "none" else None
        return (_real_answers(logits, batch) if mask is None or mask.shape != logits.shape[:2] else mask).double()

    def _runs(self, batch: Batch) -> tuple[Run, ...]:
        """Return the runs of teacher and student on a batch."""
        return tuple(self._run(number, batch) for number in range(2))

    def _run(self, number: int, batch: Batch) -> Run:
        """Return the run of the teacher (0) or the student (1) on a batch."""
        model, places = self.networks[number], self._places(number)
        if isinstance(model, nn.Module):  # its run keeps what every block returned
            places = [at for at in places if at.module is not None or at.site != "block_output"]
        columns = students(batch) if number else teachers(batch)
        return run_of(model, inputs_of(model, columns), list(dict.fromkeys(at.whole for at in places)))

    def _places(self, number: int) -> list[Location]:
        """Return the locations of the teacher (0) or the student (1), each once."""
        return list(dict.fromkeys(at for entry in self.entries for at in (entry.teacher, entry.student)[number]))

    def check(self, sides: Sequence[NetworkRuns], counted: Bool[Tensor, "batch ..."]) -> None:
        """Raise DistillError for answers to bases or sources that count and are not finite."""
        for side in sides:
            _check(side.name, side.base.logits, counted)
            _check(side.name, side.source.logits, self._counted(side, counted))

    def sides(self, base: Batch, source: Batch, teacher_source: Batch) -> tuple[NetworkRuns, NetworkRuns]:
        """Return the runs of both networks on these pairs."""
        bases, sources = self._runs(base), self._runs(source)
        others = sources if teacher_source is source else self._runs(teacher_source)
        seen = [self._seen(i, each, base) for i, each in enumerate(bases)]

        def side(number: int, batch: Batch, ran: Sequence[Run]) -> NetworkRuns:
            answers = _columns(ran[number].logits, self._masked(batch), bases[1].logits, self._masked(base))
            runs = (bases[number], ran[number], base, batch, ran[1])
            return NetworkRuns(NAMES[number], *runs, seen[number], self.wholes[number], answers)

        return side(0, teacher_source, others), side(1, source, sources)

    def _masked(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return the batch with the padding masks that the student's decoder takes."""
        return decoder_masked(self.student, batch)

    def _counted(self, side: NetworkRuns, counted: Tensor) -> Tensor:
        """Return which answers to the source must be finite."""
        logits = side.source.logits
        return counted if logits.ndim == 2 else _real_answers(logits, self._masked(side.source_columns))

    def _seen(self, number: int, base: Run, batch: Batch) -> Masks:
        """Return the positions of each location of a network that its outputs depend on."""
        if base.logits.ndim == 2 and self.sees_all:
            return {at: _real(base, at, batch) for at in self._places(number)}
        return self._visible(number, base, batch)

    def _visible(self, number: int, base: Run, batch: Batch) -> Masks:
        """Return the same by gradients."""
        return visible(base, self._places(number), self.weights(base.logits, batch))

    def _draw(
        self, number: int, side: NetworkRuns, sides: Sequence[NetworkRuns], pairs: Int[Tensor, " batch"]
    ) -> DrawnPositions:
        """Draw the positions of one entry in the bases and in the sources of one network."""
        entry, student = self.entries[number], sides[1].base
        _check_grid(entry, [each.base for each in sides])
        return side.draw_at(entry.student[0], student, self.draws[number], pairs)


def _check_grid(entry: Entry, bases: Sequence[Run]) -> None:
    """Raise NothingToMeasure where the locations of an entry differ in the numbers of examples and positions."""
    sides = zip(NAMES, bases, (entry.teacher, entry.student), strict=True)
    grids = [(name, grid_of(ran, at)) for name, ran, places in sides for at in places]
    first, other = grids[0][1], next((each for each in grids if each[1] != grids[0][1]), None)
    if other is not None:
        raise NothingToMeasure(
            f"the locations of {entry} have different [batch, position]: {first} in the teacher and {other[1]} in "
            f"the {other[0]}; map places of the same grid."
        )


def _real(base: Run, at: Location, batch: Batch) -> Bool[Tensor, "batch _"]:
    """Return which positions of a location are no padding; one real position where the activations have none."""
    rows, *width = grid_of(base, at)
    if not width:
        return torch.ones(rows, 1, dtype=torch.bool)
    masked, column = decoder_masked(base.model, batch), architecture(base.model).place(at).mask
    return real_tokens(masked, rows, width[0], base.logits.device, column=column)


def _real_answers(logits: Tensor, batch: Mapping[str, Tensor]) -> Bool[Tensor, "batch token"]:
    """Return which tokens of a token model's answers are no padding."""
    decodes = {"decoder_input_ids", "decoder_attention_mask"} & batch.keys()
    column = "decoder_attention_mask" if decodes else "attention_mask"
    rows, width = logits.shape[:2]
    return real_tokens(batch, rows, width, logits.device, column=column)


def _check(owner: str, logits: Tensor, counted: Tensor) -> None:
    """Raise DistillError for logits that count and are not finite."""
    check_answers(logits[counted], f"the interchange accuracy of the {owner}")


def _columns(
    source: Tensor, source_batch: Mapping[str, Tensor], base: Tensor, base_batch: Mapping[str, Tensor]
) -> Tensor | None:
    """Return for each token of the base the column of the source's token of the same number; −1 where there is none."""
    if base.ndim == 2:
        return None
    there, here = _real_answers(source, source_batch), _real_answers(base, base_batch)
    columns = torch.argsort((~there).int(), dim=1, stable=True)
    rank = (here.cumsum(1) - 1).clamp(min=0)
    found = columns.gather(1, rank.clamp(max=columns.shape[1] - 1))
    return found.where(rank < there.sum(1, keepdim=True), -1)


def answers_at(source: Tensor, columns: Tensor | None) -> Tensor:
    """Return the classes that the source run answers; of token models those at the columns, −1 where there is none."""
    answers = source.argmax(-1)
    return answers if columns is None else answers.gather(1, columns.clamp(min=0)).where(columns >= 0, -1)


def _compare(after: Sequence[Run], sides: Sequence[NetworkRuns], on_source: Tensor) -> Batch:
    """Compare the predictions of teacher and student, and return what each adds, by the names of a tally.

    Args:
        after: the counterfactual runs of teacher and student.
        sides: the runs before the interchange.
        on_source: the student's answers to the source.
    """
    teacher, student = (each.logits for each in after)
    bases = [side.base.logits for side in sides]
    shifts = moments((teacher, bases[0]), (student, bases[1]))
    if teacher.shape[-1] == 1:
        return {"error": (teacher - student).abs()[..., 0], **shifts}
    wanted, (unchanged, base) = teacher.argmax(-1), (each.argmax(-1) for each in bases)
    compared = compare_classes(wanted, unchanged, student.argmax(-1), base, on_source)
    divergences = {
        "divergence": kd(student, teacher, reduction="none"),
        "divergence_on_base": kd(bases[1], bases[0], reduction="none"),
    }
    return compared | divergences | shifts
