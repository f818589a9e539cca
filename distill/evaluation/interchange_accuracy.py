"""Interchange intervention accuracy (IIA): how far a student computes like its teacher.

A base and a source run in both models. In the run of the base, the values at the teacher's locations (or of a causal
model's variables) are replaced with those of the source, and so are the values at the student's locations. IIA is the
share of such counterfactuals on which the two answer alike,

    IIA = Σ 1[student(base ← source) = teacher(base ← source)] / Σ 1.

Geiger et al. 2021 (arXiv:2106.02997), section 3; Geiger et al. 2021 (arXiv:2112.00826).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.causal.model import CausalModel
from distill.data.rows import Rows
from distill.data.seeds import seed_from, seed_of
from distill.data.seen_rows import SeenRows, seen_of
from distill.errors import DistillError, NothingToMeasure, checked
from distill.evaluation.controls import controls_of
from distill.evaluation.drawn_positions import PositionDraws
from distill.evaluation.measurement import Examples, Measurement, check_pairs, paired, refuse_seen
from distill.evaluation.network_interchanges import NetworkInterchanges
from distill.evaluation.outcome import InterchangeAccuracy
from distill.evaluation.variable_accuracy import variables_accuracy
from distill.interchange.answer import resolved
from distill.interchange.mapping import Entry, Sides, entries_of
from distill.interchange.positions import Span
from distill.interchange.sources import Shuffle, Sources
from distill.models.class_names import check_alike
from distill.models.inputs import device_of, evaluating, students, teachers, uncompiled, vocabulary_of
from distill.models.outputs import answered
from distill.models.trials import answer_of, translated
from distill.tasks.loading import held_out
from distill.teachers.served import Served
from distill.teachers.verbs import run_of
from interventions import Model, shown

DRAWN = Span(0.3)
PROBED = 32
"""How many examples show what networks answer, and which positions their answers depend on."""


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
    batch_size: int = 128,
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
        seed: of the pairs, the positions and the controls.
        batch_size: pairs of a forward.
        exclude: the result of `fit`: data may not hold rows that it was trained on; of pairs sampled by a causal model
            the share that it was trained on is reported.
        answers: which part of a model's output is its answer, as for `fit`.

    Raises:
        NothingToMeasure: a mapping under which every interchange is left out, or of locations with different positions.
        DistillError: fewer than two rows, or positions=None for rows of different lengths.

    Geiger et al. 2021 (arXiv:2106.02997), section 3; Geiger et al. 2021 (arXiv:2112.00826).
    """
    teacher, student = uncompiled(teacher), uncompiled(student)
    gradients = torch.inference_mode(False)  # they show which positions an output depends on
    with answered((teacher, student), answers), translated(), gradients:
        return _measure(
            teacher, student, mapping, data, pairs=pairs, sources=sources, positions=positions, seed=seed_of(seed),
            batch_size=batch_size, controls=controls, seen=seen_of(exclude),
        )  # fmt: skip


def _measure(
    teacher: Model | Served | CausalModel,
    student: Model,
    mapping: Sides | tuple[Entry, ...] | str,
    data: Any,
    *,
    pairs: int,
    sources: Sources | None,
    positions: Any,
    seed: int,
    batch_size: int,
    controls: str | Sequence[str],
    seen: SeenRows | None,
) -> InterchangeAccuracy:
    """Measure the interchange accuracy of models as they are; the arguments are those of `interchange_accuracy`."""
    if isinstance(teacher, CausalModel):
        if not isinstance(student, nn.Module):
            raise DistillError(
                f"a {type(student).__name__} of nnsight cannot be measured against a causal model yet; give the torch "
                "model itself: interventions.architecture(model).model."
            )
        if sources is not None:
            raise DistillError("a causal model has its sources from where its bases are; leave sources out.")
        return variables_accuracy(
            teacher, student, mapping, data, positions=None if positions is DRAWN else positions, pairs=pairs,
            seed=seed, batch_size=batch_size, controls=controls, exclude=seen,
        )  # fmt: skip
    if data is None:
        raise DistillError("the teacher is a network and no data was given; pass data='pvr', a Task or held-out rows.")
    check_alike(teacher, student)
    entries = entries_of(mapping, teacher, student)
    _refuse_rules(sources, positions)
    rule: Sources = Shuffle() if sources is None else sources
    rows, names = held_out(data, student), controls_of(controls)
    _try(teacher, student, rows)
    if seen is not None:
        refuse_seen(rows.table, seen, "rows.take((~result.seen.among(rows.table)).nonzero()[:, 0])")
    examples = examples_of_rows(rows, pairs, rule, vocabulary_of(student), seed)
    few = examples.first(PROBED, device_of(student))
    draws = PositionDraws(resolved(positions, student, few[0], entries[0].student), rule.aligned, seed)
    measurement = Measurement(NetworkInterchanges(teacher, student, entries, draws, few), examples, seed, batch_size)
    tally = measurement.tally()
    if not bool(tally.kept.any()):
        raise NothingToMeasure(
            "every write of this mapping replaces all that an output can see, or nothing that it can see, so there "
            "is nothing to measure; map a block below the last one, or dims=range(...) of it, or choose "
            "positions=Span(0.3)."
        )
    settings = {"pairs": pairs, "sources": repr(rule), "positions": repr(positions), "seed": seed}
    return measurement.accuracy(tally, settings, names, overlap=None if seen is None else 0.0)


def _refuse_rules(sources: Any, positions: Any) -> None:
    """Raise DistillError for values that are no rules of sources or positions, also where the models have no tokens."""
    if sources is not None and (isinstance(sources, type) or not hasattr(sources, "aligned")):
        raise DistillError(f"sources={shown(sources)} draws no sources; use sources=Shuffle() or InContext(0.3).")
    if positions is not None and (isinstance(positions, type) or not hasattr(positions, "eligible")):
        raise DistillError(f"positions={shown(positions)} draws no tokens; use positions=Span(0.3), or None for all.")


def _try(teacher: Model | Served, student: Model, rows: Rows) -> None:
    """Raise DistillError where a network gives no answers to the first rows."""
    few = rows.batch(range(min(PROBED, len(rows))))
    for name, model, columns in (("the teacher", teacher, teachers(few)), ("the student", student, students(few))):
        with evaluating(model), torch.no_grad():
            answer_of(name, model, columns, run_of)


def examples_of_rows(rows: Rows, pairs: int, sources: Sources, vocabulary: int | None, seed: int) -> Examples:
    """Return pairs of two rows, or of a row and the source that a rule makes from it.

    Args:
        rows: each is a base in turn.
        pairs: how many.
        sources: the rule: with `Shuffle` the source is another row.
        vocabulary: the number of token ids that may be drawn.
        seed: of all draws.

    Raises:
        DistillError: fewer than two rows, no pairs, or a rule that draws other rows of a batch.
    """
    if len(rows) < 2:
        raise DistillError(f"interchange accuracy needs at least 2 rows to pair, and the data has {len(rows)}.")
    check_pairs(pairs)
    base, other = paired(len(rows), pairs, torch.Generator().manual_seed(seed))
    bases = rows.take(base)
    if isinstance(sources, Shuffle):
        return Examples(bases, rows.take(other), base)
    drawn = [
        sources.draw(bases.batch([i]), vocabulary, torch.Generator().manual_seed(seed_from(seed, i)))
        for i in range(pairs)
    ]
    if not all(isinstance(each, dict) for each in drawn):
        raise DistillError(f"sources={sources!r} gives rows of a batch; use Shuffle() or InContext(0.3).")
    changed = [each["input_ids"][0] for each in drawn if isinstance(each, dict)]
    column = torch.stack(changed) if isinstance(bases.table["input_ids"], Tensor) else changed
    return Examples(bases, Rows({**bases.table, "input_ids": column}, bases.pad_id, bases.padding_side), base)
