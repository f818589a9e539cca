"""The figures of all students, and their differences to the first one, from the sums over the same pairs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf

from torch import Tensor

from distill.comparison.compared_figure import OF_KINDS, OVERALL, WITHOUT, ComparedFigure, group_of
from distill.comparison.labelled_rows import LabelledRows
from distill.comparison.samples import Sample, mean_over_kinds
from distill.statistics.figures import Figure
from distill.statistics.intervals import Estimate, share_of
from distill.statistics.over_runs import OverRuns, difference_of_runs, of_runs
from distill.statistics.sharing import Sharing

SHARES = {
    "iia": ("agree", "total"),
    "effective": ("agree_on_effect", "effect"),
    "agreement": ("agree_on_base", "total"),
}
"""Figures that are shares, with the sums that they are made of: one run has their Wilson interval."""
BOUNDS = dict.fromkeys(("accuracy", *SHARES), (0.0, 1.0)) | dict.fromkeys(("base_kl", "kl", "error"), (0.0, inf))
"""The least and the largest value of figures that have any."""
Trained = Mapping[tuple[str, str], bool | None]
"""Whether a student was trained on a kind, by its name and that of the kind."""


def compared_figures(
    samples: Sequence[Sample], labelled: LabelledRows | None, trained: Trained
) -> Iterator[ComparedFigure]:
    """Yield the figures of all students, kind by kind, with their differences to the first one.

    Args:
        samples: the sums of each kind; of the first one are the figures on the bases.
        labelled: which answers to labelled rows are right.
        trained: which student was trained on which kind.
    """
    if labelled is not None:
        figures = {name: labelled.figures(name) for name in labelled.right}
        for each in _compared("accuracy", WITHOUT, OVERALL, figures, labelled.sharing):
            yield _with_share(each, labelled.sharing, labelled.sums(each.student)[0])
    for name in ("agreement", "base_kl"):
        yield from _of_sample(samples[0], name, WITHOUT, {})
    for sample in samples:
        for name in OF_KINDS:
            yield from _of_sample(sample, name, sample.kind, trained)
            for number in range(len(sample.entries)):
                yield from _of_sample(sample, name, sample.kind, trained, number)
    for name in OF_KINDS:
        yield from _means(name, [each for each in samples if _is_defined(name, each)], trained)


def _compared(
    name: str, kind: str, entry: str, figures: Mapping[str, Sequence[Figure]], sharing: Sharing
) -> Iterator[ComparedFigure]:
    """Yield one figure of all students, with the difference to that of the first."""
    first = next(iter(figures.values()))
    for number, (student, runs) in enumerate(figures.items()):
        difference = difference_of_runs(runs, first, sharing) if number else None
        yield ComparedFigure(name, kind, entry, student, _bounded(name, of_runs(runs, sharing)), difference)


def _bounded(name: str, found: OverRuns) -> OverRuns:
    """Return a figure with its interval inside the values that it can have."""
    least, most = BOUNDS.get(name, (-inf, inf))
    value, low, high = vars(found.estimate).values()
    return replace(found, estimate=Estimate(value, max(low, min(least, value)), min(high, max(most, value))))


def _of_sample(sample: Sample, name: str, kind: str, trained: Trained, *entries: int) -> Iterator[ComparedFigure]:
    """Yield one figure of all students over some entries, all without any, if it is defined for all."""
    figures = {student: sample.figures(name, student, *entries) for student in sample.tallies}
    known = {student: each for student, each in figures.items() if each is not None}
    if len(known) < len(figures):
        return
    entry = sample.entries[entries[0]] if entries else OVERALL
    for each in _compared(name, kind, entry, known, sample.sharing):
        found = replace(each, trained=trained.get((each.student, kind)))
        if name in SHARES:
            tally = sample.tallies[each.student][0].of(*(entries or range(len(sample.entries))))
            right, total = (tally[part].sum(1) for part in SHARES[name])
            found = _with_share(found, sample.sharing, (right, total))
        yield found


def _with_share(found: ComparedFigure, sharing: Sharing, sums: tuple[Tensor, Tensor]) -> ComparedFigure:
    """Return a figure that is a share, of one run, whose sums are given, with Wilson's interval."""
    if len(found.value.runs) > 1:
        return found
    share = share_of(*sums, sharing)
    ends = min(share.low, share.value), max(share.high, share.value)  # rounding puts an end of 1 below it
    return replace(found, value=OverRuns(Estimate(share.value, *ends), (share.value,)))


def _is_defined(name: str, sample: Sample) -> bool:
    return all(sample.figures(name, student) is not None for student in sample.tallies)


def _means(name: str, samples: Sequence[Sample], trained: Trained) -> Iterator[ComparedFigure]:
    """Yield the mean of a figure over kinds that students were trained on, and over others, with its differences."""
    students = list(samples[0].tallies) if samples else []
    for student in students[1:]:
        groups: dict[str, list[Sample]] = {}
        for sample in samples:
            known = (trained.get((name, sample.kind)) for name in (students[0], student))
            groups.setdefault(group_of(known), []).append(sample)
        for group, of in groups.items():
            sharing, figures = mean_over_kinds(name, of, (students[0], student))
            *_, found = _compared(name, group, OVERALL, figures, sharing)
            yield found
