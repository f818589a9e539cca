"""Interchanges in two networks at once, with the same positions and sources on both sides of a mapping.

An interchange that replaces everything that an output depends on, or nothing of it, is left out: it would compare
answers, not computation. The predictions of token models count where they have a label, or without labels where they
are no padding.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from distill.evaluation.drawn_positions import PositionDraws
from distill.evaluation.measurement import Batch, Examples, Interchanges
from distill.evaluation.network_runs import NAMES, Bases, Masks, NetworkRuns
from distill.evaluation.shared_runs import Runs, SharedRuns, planned
from distill.interchange.real_positions import columns_of_answers, real_answers, real_positions
from distill.interchange.vacuous import Whole, unpadded, visible
from distill.losses import kd
from distill.models.finite import LateChecks, check_answers
from distill.models.inputs import decoder_masked, device_of, inputs_of, students, teachers
from distill.models.loss_masks import TOKENS, LabelPlace, label_place, loss_masks
from distill.statistics.shifts import log_odds, moments_of
from distill.statistics.tally import Tally, compare_classes, stacked, sum_predictions
from distill.teachers.verbs import run_of
from interventions import Location, Run


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
        bases, checks = self.bases(base), LateChecks()
        sources = (self._runs(source), source)
        others = sources if teacher_source is None else (self._runs(teacher_source), teacher_source)
        counted = self._compare(bases, sources, others, pairs, checks)
        checks.check()
        return counted

    def tallies(
        self, examples: Examples, size: int, teacher_sources: Int[Tensor, " pairs"] | None = None
    ) -> Iterator[tuple[Int[Tensor, " batch"], Tally]]:
        """Yield the places of some pairs after the other, with what they add to the sums of each entry.

        Rows that pairs share run once. Whether all answers are finite is looked at after the first batch and at the
        end, so that no batch waits for the device.
        """
        plan, checks = planned(examples.sharing.base, size), LateChecks()
        ready = replace(self, draws=tuple(each.beforehand(examples.numbers) for each in self.draws))
        wholes = [list(dict.fromkeys(at.whole for at in self._places(number))) for number in range(2)]
        runs = SharedRuns(examples, plan, size, device_of(self.student), ready.bases, ready._runs, wholes)
        runs.keep(twice=teacher_sources is not None)
        for number, batch in enumerate(plan.batches):
            sources = others = runs.sources(batch.places)
            if teacher_sources is not None:
                others = runs.sources(teacher_sources[batch.places])
            numbers = examples.numbers[batch.places]
            yield batch.places, ready._compare(runs.bases(batch), sources, others, numbers, checks)
            if number == 0:
                checks.check()
        checks.check()

    def bases(self, base: Batch) -> Bases:
        """Return the runs of both networks on bases, with what all interchanges of them are compared with."""
        runs = self._runs(base)
        seen = tuple(self._seen(number, ran, base) for number, ran in enumerate(runs))
        return Bases(runs, base, seen, self.weights(runs[1].logits, base))

    def _compare(
        self,
        bases: Bases,
        sources: tuple[Runs, Batch],
        others: tuple[Runs, Batch],
        pairs: Int[Tensor, " batch"],
        checks: LateChecks,
    ) -> Tally:
        """Return what pairs add to the sums of each entry.

        Args:
            bases: the runs on their bases.
            sources: the runs of both networks on their sources, and the columns of these.
            others: the same for the sources that the teacher takes.
            pairs: their numbers, by which their positions are drawn.
            checks: notes answers that are none.
        """
        teacher, student = sides = self._sides(bases, sources, others)
        weights, sums = bases.weights, []
        counts = weights > 0
        for side in sides:
            checks.note(side.base.logits, counts, _what(side.name))
            checks.note(side.source.logits, self._counted(side, counts), _what(side.name))
        on_source = answers_at(student.source.logits, student.answers)
        for number, entry in enumerate(self.entries):
            bases.check_grid(entry)
            drawn = student.draw_at(entry.student[0], student.base, self.draws[number], pairs)
            draws = [drawn, drawn]
            if others is not sources:
                draws[0] = teacher.draw_at(entry.student[0], student.base, self.draws[number], pairs)
            after, kept = [], torch.ones(len(weights), dtype=torch.bool, device=weights.device)
            for side, places, chosen in zip(sides, (entry.teacher, entry.student), draws, strict=True):
                after.append(side.interchanged(places, chosen))
                checks.note(after[-1].logits, counts, _what(f"{side.name} after an interchange"))
                kept &= side.is_informative(after[-1], places, chosen, counts)
            counted = weights * kept.view(-1, *[1] * (weights.ndim - 1))
            sums.append(sum_predictions(_compare(after, bases, on_source), counted))
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
        answers = columns_of_answers(other.logits, self._masked(source), before.logits, self._masked(base))
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
    def seen_whole(self) -> tuple[frozenset[Location], ...]:
        """The locations of each network at which outputs depend on every real token of the few examples.

        There batches need no gradients.
        """
        few, found = self.few[0], []
        for number, ran in enumerate(self._runs(few)):
            seen = self._visible(number, ran, few).items()
            found.append(frozenset(at for at, mask in seen if torch.equal(mask, real_positions(ran, at, few))))
        return tuple(found)

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
        return (real_answers(logits, batch) if mask is None or mask.shape != logits.shape[:2] else mask).double()

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
            check_answers(side.base.logits[counted], _what(side.name))
            check_answers(side.source.logits[self._counted(side, counted)], _what(side.name))

    def sides(self, base: Batch, source: Batch, teacher_source: Batch) -> tuple[NetworkRuns, NetworkRuns]:
        """Return the runs of both networks on these pairs."""
        sources = (self._runs(source), source)
        others = sources if teacher_source is source else (self._runs(teacher_source), teacher_source)
        return self._sides(self.bases(base), sources, others)

    def _sides(
        self, bases: Bases, sources: tuple[Runs, Batch], others: tuple[Runs, Batch]
    ) -> tuple[NetworkRuns, NetworkRuns]:
        """Return the two sides of pairs from the runs on their bases and sources, and on the teacher's sources."""
        own = bases.runs[1].logits

        def side(number: int, ran: Sequence[Run], batch: Batch) -> NetworkRuns:
            answers = columns_of_answers(ran[number].logits, self._masked(batch), own, self._masked(bases.columns))
            runs = (bases.runs[number], ran[number], bases.columns, batch, ran[1])
            return NetworkRuns(NAMES[number], *runs, bases.seen[number], self.wholes[number], answers)

        return side(0, *others), side(1, *sources)

    def _masked(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return the batch with the padding masks that the student's decoder takes."""
        return decoder_masked(self.student, batch)

    def _counted(self, side: NetworkRuns, counted: Tensor) -> Tensor:
        """Return which answers to the source must be finite."""
        logits = side.source.logits
        return counted if logits.ndim == 2 else real_answers(logits, self._masked(side.source_columns))

    def _seen(self, number: int, base: Run, batch: Batch) -> Masks:
        """Return the positions of each location of a network that its outputs depend on."""
        places = self._places(number)
        known = self.seen_whole[number] if base.logits.ndim == 2 else frozenset()
        found = {at: real_positions(base, at, batch) for at in places if at in known}
        return found | self._visible(number, base, batch, [at for at in places if at not in known])

    def _visible(self, number: int, base: Run, batch: Batch, places: Sequence[Location] | None = None) -> Masks:
        """Return the same by gradients, of all locations or of some."""
        places = self._places(number) if places is None else places
        return visible(base, places, self.weights(base.logits, batch)) if places else {}


def _what(owner: str) -> str:
    """Return the name of what is measured of a network, for errors."""
    return f"the interchange accuracy of the {owner}"


def answers_at(source: Tensor, columns: Tensor | None) -> Tensor:
    """Return the classes that the source run answers; of token models those at the columns, −1 where there is none."""
    answers = source.argmax(-1)
    return answers if columns is None else answers.gather(1, columns.clamp(min=0)).where(columns >= 0, -1)


def _compare(after: Sequence[Run], bases: Bases, on_source: Tensor) -> Batch:
    """Compare the predictions of teacher and student, and return what each adds, by the names of a tally.

    Args:
        after: the counterfactual runs of teacher and student.
        bases: the runs before the interchange.
        on_source: the student's answers to the source.
    """
    teacher, student = (each.logits for each in after)
    moved = (log_odds(each.logits, bases.classes[0]) - odds for each, odds in zip(after, bases.odds, strict=True))
    shifts = moments_of(*moved)
    if teacher.shape[-1] == 1:
        return {"error": (teacher - student).abs()[..., 0], **shifts}
    unchanged, base = bases.classes
    compared = compare_classes(teacher.argmax(-1), unchanged, student.argmax(-1), base, on_source)
    divergences = {
        "divergence": kd(student, teacher, reduction="none"),
        "divergence_on_base": bases.divergence,
    }
    return compared | divergences | shifts
