"""The sums of several models over the same pairs: what one of them leaves out is left out of all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from distill.errors import NothingToMeasure
from distill.evaluation.kind_measurement import MeasuredKind
from distill.interchange.mapping import names_of
from distill.interchange.sources import Shuffle
from distill.statistics.figures import Figure, figure_of
from distill.statistics.sharing import Sharing
from distill.statistics.tally import Tally

Models = Mapping[str, Sequence[MeasuredKind]]
"""What was measured of one kind, by the names of students: for each of their runs."""


@dataclass(frozen=True, eq=False)
class Sample:
    """The sums of the models of every student over the same pairs, under one kind of interchange.

    Attributes:
        kind: its name.
        entries: those of the mapping, as text.
        sources: the rule of sources; kinds of one rule have the same pairs by their numbers.
        makes_sources: whether sources are made for each pair, and are no other rows.
        numbers: of the pairs, rising.
        sharing: what the pairs have in common.
        tallies: the sums of each student's runs, by its name.
    """

    kind: str
    entries: tuple[str, ...]
    sources: str
    makes_sources: bool
    numbers: Int[Tensor, " pairs"]
    sharing: Sharing
    tallies: Mapping[str, tuple[Tally, ...]]

    def figures(self, name: str, student: str, *entries: int) -> tuple[Figure, ...] | None:
        """Return a figure of each run of a student over some of the entries; None where it is not defined, or infinite.

        Args:
            name: of the figure.
            student: its name.
            entries: the numbers of the entries; all without any.
        """
        chosen = entries or range(len(self.entries))
        found = [figure_of(name, each.of(*chosen)) for each in self.tallies[student]]
        known = [each for each in found if each is not None and bool(each.influence.isfinite().all())]
        return tuple(known) if len(known) == len(found) else None


def sample_of(kind: str, measured: Models) -> Sample:
    """Return the sums over the pairs that were counted for all models.

    Args:
        kind: the name of the kind.
        measured: of each student, for each of its runs.

    Raises:
        NothingToMeasure: no pair was measured for all.
    """
    every = [each for runs in measured.values() for each in runs]
    numbers = every[0].measurement.examples.numbers
    for each in every[1:]:
        numbers = numbers[torch.isin(numbers, each.measurement.examples.numbers)]
    if not len(numbers):
        raise NothingToMeasure(
            f"{kind}: no pair was measured for all students, as the teacher's sides of their mappings differ and with "
            "effective_only=True each has other pairs; give mappings with the same teacher's sides, or leave it out."
        )
    places = {id(each): torch.isin(each.measurement.examples.numbers, numbers) for each in every}
    kept = torch.stack([each.tally.at(places[id(each)]).kept for each in every]).all(0)
    first, sources = every[0], every[0].placed.kind.sources
    return Sample(
        kind,
        _entry_names([next(iter(runs)) for runs in measured.values()]),
        repr(sources) if isinstance(sources, Shuffle) else f"{type(sources).__name__} {id(sources)}",
        not isinstance(sources, Shuffle),
        numbers,
        first.measurement.examples.sharing.take(places[id(first)]),
        {
            name: tuple(_masked(each.tally.at(places[id(each)]), kept) for each in runs)
            for name, runs in measured.items()
        },
    )


def _masked(tally: Tally, kept: Bool[Tensor, "pairs entries"]) -> Tally:
    """Return the sums with 0 for what is not kept, also where they are not finite."""
    return Tally({name: torch.where(kept, each, 0) for name, each in tally.sums.items() if name != "wanted"})


def _entry_names(measured: Sequence[MeasuredKind]) -> tuple[str, ...]:
    """Return the entries as text; by their numbers where those of students differ, who may differ in depth."""
    texts = [names_of(each.placed.entries) for each in measured]
    return tuple(
        names[0] if len(set(names)) == 1 else f"entry {number}"
        for number, names in enumerate(zip(*texts, strict=True), 1)
    )


def mean_over_kinds(
    name: str, samples: Sequence[Sample], students: Sequence[str]
) -> tuple[Sharing, dict[str, tuple[Figure, ...]]]:
    """Return the mean of a figure over kinds, for each run of some students, with what the pairs of all kinds share.

    Pairs of the same number and rule of sources are one pair, and their influences are added.

    Args:
        name: of a figure that is defined for all of these kinds.
        samples: one for each kind.
        students: the names of those to return.
    """
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.sources, []).append(sample)
    numbers = {key: torch.cat([each.numbers for each in group]).unique() for key, group in groups.items()}
    sharing = _joined([_sharing(group, numbers[key], place) for place, (key, group) in enumerate(groups.items())])
    found = {}
    for student in students:
        by_kind = {sample.kind: sample.figures(name, student) or () for sample in samples}
        runs = []
        for run in zip(*by_kind.values(), strict=True):
            each = dict(zip(by_kind, run, strict=True))
            parts = [_added(group, numbers[key], each) for key, group in groups.items()]
            runs.append(Figure(sum(f.value for f in run) / len(run), torch.cat(parts) / len(run)))
        found[student] = tuple(runs)
    return sharing, found


def _added(group: Sequence[Sample], numbers: Tensor, figures: Mapping[str, Figure]) -> Tensor:
    """Return the influence of each pair of a group, over all of its kinds."""
    added = torch.zeros(len(numbers), dtype=torch.float64)
    for sample in group:
        added[torch.isin(numbers, sample.numbers)] += figures[sample.kind].influence
    return added


def _sharing(group: Sequence[Sample], numbers: Tensor, place: int) -> Sharing:
    """Return what the pairs of a group share; sources that were made for it are those of no other group."""
    known = torch.zeros(len(numbers), dtype=torch.bool)
    order, parts = [], []
    for sample in group:
        there = torch.isin(numbers, sample.numbers)
        new = there & ~known
        if not bool(new.any()):
            continue
        parts.append(sample.sharing.take(torch.isin(sample.numbers, numbers[new])))
        order.append(new.nonzero()[:, 0])
        known |= there
    joined = _joined(parts).take(torch.cat(order).argsort())
    if not group[0].makes_sources:
        return joined
    return Sharing(joined.base, joined.source + place * 2**40, joined.base_clusters, joined.source_clusters)


def _joined(parts: Sequence[Sharing]) -> Sharing:
    """Return what the pairs of several have in common, in order."""
    columns = [
        [each for each in (part.base, part.source, part.base_clusters, part.source_clusters) if each is not None]
        for part in parts
    ]
    return Sharing(*(torch.cat(each) for each in zip(*columns, strict=True)))
