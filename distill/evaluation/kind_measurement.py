"""Several kinds of interchange, measured in one pass: kinds with the same sources share the runs of base and source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from distill.data.rows import Rows
from distill.errors import DistillError, NothingToMeasure
from distill.evaluation.drawn_positions import PositionDraws
from distill.evaluation.example_pairs import effective_examples, examples_of_rows
from distill.evaluation.interchange_result import InterchangeAccuracy
from distill.evaluation.measurement import NOTHING_SEEN, Examples, Measurement, accuracy_of, measuring
from distill.evaluation.network_interchanges import NetworkInterchanges
from distill.interchange.answer import resolved
from distill.interchange.kinds import Kind
from distill.interchange.mapping import Entry
from distill.models.inputs import common_vocabulary, device_of, evaluating, inputs_of, students, teachers
from distill.statistics.tally import Tally
from distill.teachers.verbs import run_of, shape_of
from interventions import InterventionError, Location

PROBED = 32
"""How many examples show what networks answer, and which positions their answers depend on."""


@dataclass(frozen=True, eq=False)
class PlacedKind:
    """A kind of interchange at places of two networks.

    Attributes:
        name: of the kind.
        kind: the kind.
        entries: those of the mapping, at the kind's site.
        draws: the rule that draws the positions of each entry.
    """

    name: str
    kind: Kind
    entries: tuple[Entry, ...]
    draws: tuple[PositionDraws, ...]


@dataclass(frozen=True, eq=False)
class MeasuredKind:
    """A kind of interchange, with the pairs that it was measured on and their sums.

    Attributes:
        placed: the kind at its places.
        measurement: of this kind alone.
        tally: its sums; in a measurement of effective pairs alone 0 for those of other entries.
        tried: how many pairs were tried for each entry, where only effective ones were taken; else None.
    """

    placed: PlacedKind
    measurement: Measurement
    tally: Tally
    tried: tuple[int, ...] | None = None

    def accuracy(self, settings: Mapping[str, Any], controls: Sequence[str] = ()) -> InterchangeAccuracy:
        """Return the figures of this kind, and of its controls.

        Args:
            settings: of the whole measurement, kept with the figures.
            controls: the names of the controls to measure.
        """
        kind, examples = self.placed.kind, self.measurement.examples
        rules = {"kind": repr(kind), "sources": repr(kind.sources), "positions": repr(kind.positions)}
        own = {name: value for name in ("site", "dims") if (value := getattr(kind, name)) is not None}
        found = accuracy_of(self.tally, self.placed.entries, examples.sharing, {**settings, **rules, **own}, self.tried)
        return replace(found, controls=self.measurement.controls(controls))


@dataclass(frozen=True, eq=False)
class KindMeasurement:
    """A measurement of several kinds of interchange between two networks, on the same rows.

    Attributes:
        teacher, student: the networks.
        mapped: the entries of the mapping.
        rows: each is a base in turn.
        pairs: how many pairs of base and source; of effective ones alone, how many of each entry.
        seed: of all draws.
        batch_size: pairs of a forward.
        effective_only: take only pairs whose interchange changes the teacher's answer.
    """

    teacher: Any
    student: Any
    mapped: tuple[Entry, ...]
    rows: Rows
    pairs: int
    seed: int
    batch_size: int
    effective_only: bool = False
    _drawn: list[tuple[Any, Examples]] = field(default_factory=list, repr=False)

    def place(self, name: str, kind: Kind) -> PlacedKind:
        """Return a kind at its places in both networks.

        Raises:
            DistillError: a side that lacks the site, or a rule that finds no positions in this model.
        """
        few = self.few(kind)
        entries = kind.entries(self.mapped, self.teacher, self.student)
        if kind.dims is not None:
            entries = self._with_dims(entries, kind.dims, few[0])
        with torch.inference_mode(False):
            rule = resolved(kind.positions, self.student, few[0], entries[0].student)
        aligned = kind.sources.aligned
        draws = tuple(PositionDraws(rule, aligned, self.seed, number) for number in range(len(entries)))
        return PlacedKind(name, kind, entries, draws)

    def why_not(self, placed: PlacedKind) -> str:
        """Return why a kind cannot be measured on these networks, found on a few pairs; empty if it can."""
        interchanges, few = self._interchanges([placed]), self.few(placed.kind)
        try:
            with measuring(interchanges):
                interchanges.count(*few, None, torch.arange(len(next(iter(few[0].values())))))
        except (DistillError, InterventionError) as reason:
            return str(reason)
        return ""

    def measure(self, kinds: Sequence[PlacedKind]) -> list[MeasuredKind]:
        """Return the sums of several kinds, in order.

        Raises:
            NothingToMeasure: with `effective_only`, no pair changes the teacher's answer at the first kind. Where there
                is none at another kind, nothing is counted of that.
            DistillError: with `effective_only`, answers that are real-valued.
        """
        if self.effective_only:
            self._refuse_real_values()
        found: dict[int, MeasuredKind] = {}
        for sources in _different([each.kind.sources for each in kinds]):
            group = [number for number, each in enumerate(kinds) if each.kind.sources == sources]
            found |= dict(zip(group, self._measure_group([kinds[number] for number in group]), strict=True))
            tried = found[0].tried
            if tried is not None and not bool((found[0].tally["wanted"] > 0).any()):
                raise NothingToMeasure(
                    f"effective_only=True found no pair that changes the teacher's answer among {max(tried)} tried; "
                    "map another place, use positions=Span(0.5), or give rows that differ more."
                    if any(tried)
                    else NOTHING_SEEN
                )
        return [found[number] for number in range(len(kinds))]

    def _refuse_real_values(self) -> None:
        """Raise DistillError for a teacher that answers by real values, of which every interchange changes some."""
        few = self.rows.batch([0])
        with evaluating(self.teacher), torch.no_grad():
            logits = run_of(self.teacher, inputs_of(self.teacher, teachers(few)), resumable=False).logits
        if logits.shape[-1] == 1:
            raise DistillError(
                "effective_only=True takes pairs that change the class of the teacher's answer, and it answers by real "
                "values; leave it out: their errors and the correlation of shifts are over all pairs."
            )

    def _measure_group(self, kinds: Sequence[PlacedKind]) -> list[MeasuredKind]:
        """Return the sums of kinds that share their sources, from the same runs."""
        if self.effective_only:
            return self._measure_effective(kinds)
        examples = self.examples(kinds[0].kind)
        tally = self._measurement(kinds, examples).tally()
        found, first = [], 0
        for each in kinds:
            numbers = range(first, first + len(each.entries))
            first = numbers.stop
            found.append(MeasuredKind(each, self._measurement([each], examples), tally.of(*numbers)))
        return found

    def _measure_effective(self, kinds: Sequence[PlacedKind]) -> list[MeasuredKind]:
        """Return the sums of kinds that share their sources, each on the pairs that are effective there."""
        examples, marks, tried = effective_examples(
            self._interchanges(kinds), self.rows, self.pairs, kinds[0].kind.sources, self._vocabulary,
            seed=self.seed, batch_size=self.batch_size,
        )  # fmt: skip
        found, first = [], 0
        for each in kinds:
            numbers = list(range(first, first + len(each.entries)))
            first, wanted = first + len(numbers), marks[:, numbers]
            chosen = wanted.any(1).nonzero()[:, 0]
            if not len(chosen):
                chosen = torch.tensor([0])  # of which nothing is counted
            measurement = self._measurement([each], examples.take(chosen))
            counts = tuple(tried[numbers].tolist())
            found.append(MeasuredKind(each, measurement, measurement.tally().where(wanted[chosen]), counts))
        return found

    def _measurement(self, kinds: Sequence[PlacedKind], examples: Examples) -> Measurement:
        """Return the measurement of kinds with the same sources on these pairs."""
        return Measurement(self._interchanges(kinds), examples, self.seed, self.batch_size)

    def _interchanges(self, kinds: Sequence[PlacedKind]) -> NetworkInterchanges:
        """Return the interchanges of several kinds with the same sources, their entries one after another."""
        entries = tuple(entry for each in kinds for entry in each.entries)
        draws = tuple(draw for each in kinds for draw in each.draws)
        return NetworkInterchanges(self.teacher, self.student, entries, draws, self.few(kinds[0].kind))

    @property
    def _vocabulary(self) -> int | None:
        """The number of token ids that sources may be made of: those that both networks know."""
        return common_vocabulary(self.teacher, self.student)

    def examples(self, kind: Kind) -> Examples:
        """Return the pairs of a kind, drawn once for all kinds with the same sources."""
        known = next((examples for sources, examples in self._drawn if sources == kind.sources), None)
        if known is None:
            known = examples_of_rows(self.rows, self.pairs, kind.sources, self._vocabulary, self.seed)
            self._drawn.append((kind.sources, known))
        return known

    def few(self, kind: Kind) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return the first pairs of a kind."""
        return self.examples(kind).first(PROBED, device_of(self.student))

    def _with_dims(self, entries: tuple[Entry, ...], share: float, few: Mapping[str, Any]) -> tuple[Entry, ...]:
        """Return the entries with the first share of the dims of each place, at least one."""
        sides = []
        for model, columns, name in (
            (self.teacher, teachers(few), "teacher"), (self.student, students(few), "student")
        ):  # fmt: skip
            places = list(dict.fromkeys(at.whole for entry in entries for at in getattr(entry, name)))
            with evaluating(model), torch.no_grad():
                ran = run_of(model, inputs_of(model, columns), places)
            sides.append({at: max(1, int(shape_of(ran, at)[-1] * share + 1e-6)) for at in places})

        def cut(at: Location, widths: Mapping[Location, int]) -> Location:
            return replace(at.whole, dims=range(widths[at.whole]))

        return tuple(
            replace(entry, **{
                name: tuple(cut(at, widths) for at in getattr(entry, name))
                for name, widths in zip(("teacher", "student"), sides, strict=True)
            })
            for entry in entries
        )  # fmt: skip


def refuse_nothing(tally: Tally) -> None:
    """Raise NothingToMeasure where every counterfactual is left out."""
    if not bool(tally.kept.any()):
        raise NothingToMeasure(NOTHING_SEEN)


def _different(values: Sequence[Any]) -> list[Any]:
    """Return the different ones, in order; they may not be hashable."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
