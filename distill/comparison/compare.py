"""Compare students of one teacher over the same pairs: how much more one of them computes like the teacher.

Two intervals that overlap do not say that two students are alike, and one student on each side does not say what their
trainings are. So every figure is measured for all students on the same rows, the same pairs of base and source and the
same positions, and what is reported is the difference, whose interval is that of the pairs' own differences,

    figure(b) − figure(a) = Σ over pairs of (influence of the pair on figure(b) − on figure(a)),

over what pairs share (`distill.statistics.sharing`), and over the runs of each student where there are several
(`distill.statistics.over_runs`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distill.causal.model import CausalModel
from distill.comparison.compared_kinds import compared_figures
from distill.comparison.comparison import Comparison
from distill.comparison.labelled_rows import labelled_rows
from distill.comparison.samples import Sample, sample_of
from distill.comparison.trained_students import TrainedStudent, mappings_of, teacher_and_runs
from distill.data.seeds import seed_of
from distill.errors import DistillError, NothingToMeasure, checked
from distill.evaluation.interchange_accuracy import DRAWN, MAPPED, kind_of, measurement_of, placed_kinds
from distill.evaluation.kind_measurement import MeasuredKind, refuse_nothing
from distill.evaluation.measurement import counted
from distill.interchange.kinds import Kind, kinds_of
from distill.interchange.sources import Shuffle, Sources
from distill.models.inputs import vocabulary_of
from distill.models.outputs import answered
from distill.models.trials import translated
from distill.tasks.loading import as_read, held_out
from distill.teachers.served import Served
from interventions import Model

Measured = tuple[list[MeasuredKind], dict[str, str]]
"""The sums of one run under every kind, and why some of the usual kinds are not among them."""


@checked
def compare(
    teacher: Model | Served | CausalModel,
    students: Any,
    mapping: Any,
    data: Any = None,
    *,
    kinds: Any = None,
    pairs: int = 2000,
    sources: Sources | None = None,
    positions: Any = DRAWN,
    seed: Any = 0,
    batch_size: int = 128,
    effective_only: bool = False,
    exclude: Any = None,
    answers: Any = None,
) -> Comparison:
    """Measure how students of one teacher differ, in accuracy and in how they compute, over the same rows and pairs.

    The first student is what every other one is compared with: `comparison.sentence` says in words what was found,
    `print(comparison)` shows its figures, `comparison.plot()` a picture, `comparison.to_pandas()` all figures of all
    kinds and entries. A counterfactual that is left out for one student is left out for all.

    An interval of a difference is at 95 % and knows which pairs share rows or clusters of rows. Several runs of a
    student, as trained with other seeds, are given as a list; the interval is then about other seeds and other pairs.
    Runs of two students are paired by their place where they are as many, and else compared by their means, as Welch
    does. From one run each an interval says nothing of other seeds.

    Args:
        teacher: a network, here or `Served`.
        students: {name: student}, at least two: each a network, what `fit` returned, or a list of them (its seeds).
            What `fit` returned knows which kinds of interchange it was trained on, and may not be measured on the rows
            that it was trained on.
        mapping: {teacher side: student side}, "full", "middle", "late" or "single", as for `fit`; or, for students that
            differ in depth, {name: mapping}, whose entries are matched by their place.
        data: a Task, or the name of one (its test rows), or held-out rows in any form that `Rows.of` takes. With labels
            the accuracies are compared too.
        kinds: other kinds of interchange to compare beside the mapped one, as for `interchange_accuracy`: {name:
            `Kind`}, or `"usual"`.
        pairs: how many pairs of base and source.
        sources: `Shuffle()` (another row, the default) or `InContext(share)`.
        positions: the rule that draws positions, `Span(0.3)` by default; None writes all of them.
        seed: of the pairs and the positions.
        batch_size: pairs of a forward; no figure depends on it.
        effective_only: take only pairs whose interchange changes the teacher's answer, until there are `pairs` of each
            entry.
        exclude: the result of `fit`: data may not hold rows that it was trained on, as those of the students.
        answers: which part of a model's output is its answer, as for `fit`.

    Raises:
        NothingToMeasure: a mapping under which every interchange is left out, or of which no pair is common to all.
        DistillError: fewer than two students, rows that one of them was trained on, models whose classes differ, or
            mappings of different numbers of entries.

    McNemar 1947, Psychometrika 12 (accuracy); Efron, Tibshirani 1993, An Introduction to the Bootstrap, chapter 21
    (influences); Welch 1947, Biometrika 34.
    """
    if isinstance(teacher, CausalModel):
        raise DistillError(
            "compare(teacher=CausalModel(…)) has no kinds of interchange to compare, as variables have places of their "
            "own; measure each network: interchange_accuracy(causal_model, network, mapping)."
        )
    teacher, runs = teacher_and_runs(teacher, students)
    data = as_read(data, teacher)
    mappings, own = mappings_of(mapping, list(runs)), kind_of(sources, positions)
    _refuse_other_sources([each.model for of in runs.values() for each in of], {MAPPED: own, **kinds_of(kinds)})
    settings = {"pairs": pairs, "seed": seed, "batch_size": batch_size, "effective_only": effective_only}
    with torch.inference_mode(False), translated():
        measure = _Measure(teacher, data, own, kinds, exclude, answers, settings)
        found = {name: [measure(each, mappings[name]) for each in of] for name, of in runs.items()}
        first = next(iter(runs.values()))[0]
        with answered((teacher, first.model), answers):
            rows = held_out(data, first.model)
        labelled = labelled_rows(runs, rows, teacher, answers, batch_size)
    samples, missing = _samples(found)
    trained = {
        (name, sample.kind): _was_trained(runs[name], _kind_in(found[name][0][0], sample.kind))
        for name in runs
        for sample in samples
    }
    return Comparison(
        tuple(compared_figures(samples, labelled, trained)),
        {name: len(of) for name, of in runs.items()},
        {} if labelled is None else {name: labelled.discordance(next(iter(runs)), name) for name in list(runs)[1:]},
        _settings(settings, samples, missing, labelled is not None),
    )


@dataclass(frozen=True, eq=False)
class _Measure:
    """Measure every run: the arguments of `compare`, by their names there; `own` is the mapped kind."""

    teacher: Any
    data: Any
    own: Kind
    kinds: Any
    exclude: Any
    answers: Any
    settings: Mapping[str, Any]

    def __call__(self, student: TrainedStudent, mapping: Any) -> Measured:
        """Return the sums of one run under every kind, and why usual kinds are not among them."""
        with answered((self.teacher, student.model), self.answers):
            trained_on = None if student.seen is None else student.result
            refused = [each for each in (trained_on, self.exclude) if each is not None]
            for exclude in refused or [None]:
                measurement = measurement_of(
                    self.teacher, student.model, mapping, self.data, exclude=exclude, **self.settings
                )
            placed, missing = placed_kinds(measurement, self.own, self.kinds)
            return measurement.measure(placed), missing


def _samples(
    found: Mapping[str, Sequence[Measured]],
) -> tuple[list[Sample], dict[str, str]]:
    """Return the sums of each kind that was measured for all students, and why the others were not.

    Raises:
        DistillError: mappings of different numbers of entries.
    """
    every = [each for runs in found.values() for each in runs]
    missing = {kind: why for _, lacking in every for kind, why in lacking.items()}
    lengths = {name: len(runs[0][0][0].placed.entries) for name, runs in found.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{count} for {name!r}" for name, count in lengths.items())
        raise DistillError(
            f"the mappings of the students have different numbers of entries ({listed}), which are matched by their "
            "place; give each as many: mapping={name: {Location(2): Location(1)}}."
        )
    samples = []
    for kind in [each.placed.name for each in every[0][0] if each.placed.name not in missing]:
        of_kind = {name: [_of_kind(measured, kind) for measured, _ in runs] for name, runs in found.items()}
        samples.append(sample_of(kind, of_kind))
    _refuse_nothing(found, samples[0])
    return samples, missing


def _refuse_nothing(found: Mapping[str, Sequence[Measured]], mapped: Sample) -> None:
    """Raise NothingToMeasure where no counterfactual of the mapped kind is counted for a student, or for all."""
    for name, runs in found.items():
        try:
            for measured, _ in runs:
                refuse_nothing(measured[0].tally)
        except NothingToMeasure as nothing:
            raise NothingToMeasure(f"student {name!r}: {nothing}") from None
    if not bool(next(iter(mapped.tallies.values()))[0].kept.any()):
        raise NothingToMeasure(
            "every interchange of this mapping is left out for one student or another, as it replaces all that its "
            "answer depends on, or nothing; map a place that all of them read: {Location(2): Location(1)}."
        )


def _of_kind(measured: Sequence[MeasuredKind], kind: str) -> MeasuredKind:
    return next(each for each in measured if each.placed.name == kind)


def _kind_in(measured: Sequence[MeasuredKind], kind: str) -> Kind:
    return _of_kind(measured, kind).placed.kind


def _was_trained(runs: Sequence[TrainedStudent], kind: Kind) -> bool | None:
    """Return whether any run was trained on a kind; None where that is not known of any."""
    known = [found for each in runs if (found := each.was_trained_on(kind)) is not None]
    return any(known) if known else None


def _refuse_other_sources(models: Sequence[Any], kinds: Mapping[str, Kind]) -> None:
    """Raise DistillError where sources are made of the tokens of students with different vocabularies."""
    sizes = sorted({str(vocabulary_of(each)) for each in models})
    made = next((name for name, kind in kinds.items() if not isinstance(kind.sources, Shuffle)), None)
    if made is not None and len(sizes) > 1:
        raise DistillError(
            f"kind {made!r} makes sources of other tokens for each vocabulary, and those of the students have the "
            f"sizes {', '.join(sizes)}; leave it out: kinds={{'one token': Kind(Scattered(1))}}."
        )


def _settings(
    settings: Mapping[str, Any], samples: Sequence[Sample], missing: Mapping[str, str], labelled: bool
) -> dict[str, Any]:
    """Return what the comparison is over, as plain data."""
    kept = {each.kind: int(next(iter(each.tallies.values()))[0].kept.any(1).sum()) for each in samples}
    more: dict[str, Any] = {"missing": dict(missing)} if missing else {}
    return {
        **settings, "seed": seed_of(settings["seed"]), "shared": counted(samples[0].sharing), "counted": kept,
        "labelled": labelled, **more,
    }  # fmt: skip
