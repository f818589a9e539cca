"""Interchange intervention accuracy (IIA): how far a student computes like its teacher.

A base and a source run in both models. In the run of the base, the values at the teacher's locations (or of a causal
model's variables) are replaced with those of the source, and so are the values at the student's locations. IIA is the
share of such counterfactuals on which the two answer alike,

    IIA = Σ 1[student(base ← source) = teacher(base ← source)] / Σ 1.

Geiger et al. 2021 (arXiv:2106.02997), section 3; Geiger et al. 2021 (arXiv:2112.00826).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from distill.causal.model import CausalModel
from distill.data.rows import Rows
from distill.data.seeds import seed_of
from distill.data.seen_rows import seen_of
from distill.errors import DistillError, checked
from distill.evaluation.controls import controls_of
from distill.evaluation.interchange_result import InterchangeAccuracy
from distill.evaluation.kind_measurement import PROBED, KindMeasurement, MeasuredKind, PlacedKind, refuse_nothing
from distill.evaluation.measurement import refuse_seen
from distill.evaluation.shared_runs import fitting
from distill.evaluation.variable_accuracy import variables_accuracy
from distill.interchange.kinds import USUAL, Kind, kinds_of
from distill.interchange.mapping import Entry, Sides, entries_of
from distill.interchange.positions import Span, refuse_no_rule
from distill.interchange.sources import Shuffle, Sources
from distill.models.class_names import check_alike
from distill.models.inputs import device_of, evaluating, inputs_of, students, teachers, to_device
from distill.models.outputs import answered
from distill.models.trials import answer_of, translated
from distill.tasks.loading import held_out
from distill.teachers.served import Served
from distill.teachers.verbs import run_of
from distill.teachers.without_adapters import teacher_and_student
from interventions import InterventionError, Model, shown

DRAWN = Span(0.3)
MAPPED = "as mapped"
"""The name of the kind that the mapping, `sources` and `positions` themselves are."""


@checked
def interchange_accuracy(
    teacher: Model | Served | CausalModel,
    student: Model,
    mapping: Sides | tuple[Entry, ...] | str,
    data: Any = None,
    *,
    pairs: int = 2000,
    sources: Sources | None = None,
    positions: Any = DRAWN,
    seed: Any = 0,
    batch_size: int | None = None,
    kinds: Any = None,
    effective_only: bool = False,
    controls: str | Sequence[str] = (),
    exclude: Any = None,
    answers: Any = None,
) -> InterchangeAccuracy:
    """Measure how often the same interchange makes student and teacher give the same answer.

    Every pair of a base and a source is interchanged at every entry of the mapping, in both models, at the same
    positions. The draws depend on `seed` alone, not on the batch size. An interchange that replaces everything that an
    output depends on, or nothing of it, is left out: it would compare answers, not computation. Later blocks read
    nothing but the output of a block, so all positions of it are everything; the output of its feed-forward part is
    not, as the residual stream bypasses it.

    Args:
        teacher: a network, here or `Served`, or a causal model, which samples its own inputs where there is no `data`.
        student: a network; of a causal model a torch model, else one of nnsight too.
        mapping: {teacher side: student side}, "full", "middle", "late" or "single", as for `fit`.
        data: a Task, or the name of one (its test rows), or held-out rows in any form that `Rows.of` takes. For a
            causal model {name: tensor} of its inputs; columns of other variables are checked.
        pairs: how many pairs of base and source.
        sources: `Shuffle()` (another row, the default) or `InContext(share)`.
        positions: the rule that draws positions, `Span(0.3)` by default, or `Scattered(2)`, `Answer()`; None writes all
            of them. For a causal model
            the tokens of the locations: one choice for all, or {variable or location: choice}, as `CausalModel.select`
            takes them; by default those of the mapping, if that is an Alignment, else all.
        controls: the same measurement where nothing was learned: `"subspace"` (random ones of the same size),
            `"labels"` (the teacher takes the sources of other pairs), `"network"` (a student with new weights), or
            `"all"`.
            Where an alignment was learned, also learn one for `distill.reinitialized(network)`.
        kinds: other kinds of interchange to measure beside it, on the same layers: {name: `Kind`}, a list of them, or
            `"usual"`: one token at the same place, two tokens, the answering token, attention heads, the output of the
            feed-forward part, half of the dims, sources in context, as far as the models have them.
        effective_only: take only pairs whose interchange changes the teacher's answer, until there are `pairs` of each
            entry; the teacher alone runs to find them, on 20 times as many pairs at most.
        seed: of the pairs, the positions and the controls.
        batch_size: pairs of a forward; None takes as many as a share of the free memory holds, on a processor 512 at
            most. No figure depends on it, beyond rounding.
        exclude: the result of `fit`: data may not hold rows that it was trained on; of pairs sampled by a causal model
            the share that it was trained on is reported. It also says which kinds of interchange were trained on.
        answers: which part of a model's output is its answer, as for `fit`.

    Raises:
        NothingToMeasure: a mapping under which every interchange is left out, or of locations with different positions;
            with `effective_only` no pair that changes the teacher's answer.
        DistillError: fewer than two rows, positions=None for rows of different lengths, or a kind whose site one of the
            models lacks.

    Geiger et al. 2021 (arXiv:2106.02997), section 3; Geiger et al. 2021 (arXiv:2112.00826).
    """
    teacher, student = teacher_and_student(teacher, student)
    gradients = torch.inference_mode(False)  # they show which positions an output depends on
    with answered((teacher, student), answers), translated(), gradients:
        if isinstance(teacher, CausalModel):
            network = _torch_model(student)
            _refuse_for_variables(sources=sources, kinds=kinds, effective_only=effective_only)
            return variables_accuracy(
                teacher, network, mapping, data, positions=None if positions is DRAWN else positions, pairs=pairs,
                seed=seed_of(seed), batch_size=batch_size, controls=controls,
                exclude=seen_of(exclude),
            )  # fmt: skip
        names = controls_of(controls)
        measurement = measurement_of(
            teacher, student, mapping, data, pairs=pairs, seed=seed, batch_size=batch_size,
            effective_only=effective_only, exclude=exclude,
        )  # fmt: skip
        own = kind_of(sources, positions)
        placed, missing = placed_kinds(measurement, own, kinds)
        measured = measurement.measure(placed)
        refuse_nothing(measured[0].tally)
        return _result(measured, missing, names, exclude, {"pairs": pairs, "seed": measurement.seed})


def _torch_model(student: Any) -> nn.Module:
    """Return a student that is measured against a causal model; raise DistillError for one of nnsight."""
    if isinstance(student, nn.Module):
        return student
    raise DistillError(
        f"a {type(student).__name__} of nnsight cannot be measured against a causal model yet; give the torch "
        "model itself: interventions.architecture(model).model."
    )


def _refuse_for_variables(*, sources: Any, kinds: Any, effective_only: bool) -> None:
    """Raise DistillError for what cannot be measured against a causal model."""
    if sources is not None:
        raise DistillError("a causal model has its sources from where its bases are; leave sources out.")
    if kinds is not None or effective_only:
        given = f"kinds={shown(kinds)}" if kinds is not None else "effective_only=True"
        raise DistillError(
            f"{given} is for two networks, and the teacher is a causal model, whose variables have places of their "
            "own; leave it out, and map other places: {'variable': Location(2)}."
        )


def measurement_of(
    teacher: Model | Served,
    student: Model,
    mapping: Sides | tuple[Entry, ...] | str,
    data: Any,
    *,
    pairs: int,
    seed: Any,
    batch_size: int | None = None,
    effective_only: bool = False,
    exclude: Any = None,
) -> KindMeasurement:
    """Return the measurement of two networks on held-out rows; the arguments are those of `interchange_accuracy`.

    Raises:
        DistillError: models, a mapping or rows that do not fit together, or rows that were trained on.
    """
    if data is None:
        raise DistillError("the teacher is a network and no data was given; pass data='pvr', a Task or held-out rows.")
    check_alike(teacher, student)
    if batch_size is not None and batch_size < 1:
        raise DistillError(
            f"batch_size={batch_size} of {pairs} pairs measures nothing; use a whole number above 0, e.g. "
            "batch_size=128, or None, as many as memory holds."
        )
    entries, rows, seen = entries_of(mapping, teacher, student), held_out(data, student), seen_of(exclude)
    _try(teacher, student, rows)
    if seen is not None:
        refuse_seen(rows.table, seen, "rows.take((~result.seen.among(rows.table)).nonzero()[:, 0])")
    size = _fitting(teacher, student, rows) if batch_size is None else batch_size
    return KindMeasurement(teacher, student, entries, rows, pairs, seed_of(seed), size, effective_only)


def kind_of(sources: Sources | None, positions: Any) -> Kind:
    """Return the kind of interchange that a rule of sources and one of positions are."""
    refuse_no_rule("interchange_accuracy", positions)
    return Kind(positions, sources=Shuffle() if sources is None else sources)


def placed_kinds(measurement: KindMeasurement, own: Kind, kinds: Any) -> tuple[list[PlacedKind], dict[str, str]]:
    """Return the kinds at their places in the models, the own one first; and why some of the usual kinds are not there.

    Raises:
        DistillError: kinds that are none, or one of the user's that these models do not have.
    """
    wanted = kinds_of(kinds)
    if MAPPED in wanted:
        raise DistillError(
            f"kinds names a kind {MAPPED!r}, as the places and rules of the measurement itself are called; "
            "give it another name: {'heads': distill.Kind(site='attention_heads')}."
        )
    placed, missing = [measurement.place(MAPPED, own)], {}
    for name, kind in wanted.items():
        try:
            found = measurement.place(name, kind)
            reason = measurement.why_not(found)
        except (DistillError, InterventionError) as error:
            reason = str(error)
        if not reason:
            placed.append(found)
        elif kinds == USUAL:
            missing[name] = reason
        else:
            raise DistillError(f"kind {name!r}: {reason}")
    return placed, missing


def _result(
    measured: Sequence[MeasuredKind],
    missing: Mapping[str, str],
    controls: Sequence[str],
    exclude: Any,
    settings: Mapping[str, Any],
) -> InterchangeAccuracy:
    """Return the figures of all kinds, the first one with its controls; a `FitResult` says which were trained."""
    others = {each.placed.name: each.accuracy(settings) for each in measured[1:]}
    own = measured[0].accuracy({**settings, **({"missing": dict(missing)} if missing else {})}, controls)
    overlap = None if seen_of(exclude) is None else 0.0
    found = replace(own, kinds=others, overlap=overlap)
    return found.marked(getattr(exclude, "settings", {}).get("kinds"))


def _fitting(teacher: Model | Served, student: Model, rows: Rows) -> int:
    """Return how many pairs a forward takes by default."""
    device = device_of(student)
    few = to_device(rows.batch(range(min(PROBED, len(rows)))), device)
    here = [(model, side) for model, side in ((teacher, teachers(few)), (student, students(few))) if _is_here(model)]
    with torch.no_grad(), ExitStack() as modes:
        for model, _ in here:
            modes.enter_context(evaluating(model))
        return fitting([model for model, _ in here], [inputs_of(model, side) for model, side in here], device)


def _is_here(model: Any) -> bool:
    return isinstance(model, nn.Module)


def _try(teacher: Model | Served, student: Model, rows: Rows) -> None:
    """Raise DistillError where a network gives no answers to the first rows."""
    few = rows.batch(range(min(PROBED, len(rows))))
    for name, model, columns in (("the teacher", teacher, teachers(few)), ("the student", student, students(few))):
        with evaluating(model), torch.no_grad():
            answer_of(name, model, columns, run_of)
