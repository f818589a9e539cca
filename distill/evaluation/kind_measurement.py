"""Several kinds of interchange, measured in one pass: kinds with the same sources share the runs of base and source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from distill.data.rows import Rows
from distill.errors import DistillError, NothingToMeasure
from distill.evaluation.drawn_positions import PositionDraws
from distill.evaluation.example_pairs import effective_examples, examples_of_rows, taken
from distill.evaluation.interchange_result import InterchangeAccuracy
from distill.evaluation.measurement import NOTHING_SEEN, Examples, Measurement, accuracy_of, measuring
from distill.evaluation.network_interchanges import NetworkInterchanges
from distill.interchange.answer import resolved
from distill.interchange.kinds import Kind
from distill.interchange.mapping import Entry
from distill.models.inputs import device_of, evaluating, inputs_of, students, teachers, vocabulary_of
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
        """Return the sums of several kinds, in order."""
        found: dict[str, MeasuredKind] = {}
        for sources in _different([each.kind.sources for each in kinds]):
            group = [each for each in kinds if each.kind.sources == sources]
            found |= {each.placed.name: each for each in self._measure_group(group)}
        return [found[each.name] for each in kinds]

    def _measure_group(self, kinds: Sequence[PlacedKind]) -> list[MeasuredKind]:
        """Return the sums of kinds that share their sources, from the same runs."""
        interchanges, kind = self._interchanges(kinds), kinds[0].kind
        marks = tried = None
        if self.effective_only:
            examples, marks, tried = effective_examples(
                interchanges, self.rows, self.pairs, kind.sources, vocabulary_of(self.student), seed=self.seed,
                batch_size=self.batch_size,
            )  # fmt: skip
        else:
            examples = self.examples(kind)
        tally = Measurement(interchanges, examples, self.seed, self.batch_size).tally()
        found, first = [], 0
        for each in kinds:
            numbers = range(first, first + len(each.entries))
            first = numbers.stop
            own, mine, counts = tally.of(*numbers), examples, None
            if marks is not None and tried is not None:
                wanted = marks[:, list(numbers)]
                chosen = wanted.any(1).nonzero()[:, 0]
                own, mine = own.where(wanted).at(chosen), taken(examples, chosen)
                counts = tuple(int(tried[i]) for i in numbers)
            alone = Measurement(self._interchanges([each]), mine, self.seed, self.batch_size)
            found.append(MeasuredKind(each, alone, own, counts))
        return found

    def _interchanges(self, kinds: Sequence[PlacedKind]) -> NetworkInterchanges:
        """Return the interchanges of several kinds with the same sources, their entries one after another."""
        entries = tuple(entry for each in kinds for entry in each.entries)
        draws = tuple(draw for each in kinds for draw in each.draws)
        return NetworkInterchanges(self.teacher, self.student, entries, draws, self.few(kinds[0].kind))

    def examples(self, kind: Kind) -> Examples:
        """Return the pairs of a kind, drawn once for all kinds with the same sources."""
        known = next((examples for sources, examples in self._drawn if sources == kind.sources), None)
        if known is None:
            known = examples_of_rows(self.rows, self.pairs, kind.sources, vocabulary_of(self.student), self.seed)
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
