"""Interchange intervention accuracy (IIA): how far a student computes like its teacher."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distill.causal.model import CausalModel
from distill.data.rows import Rows, batches
from distill.data.seeds import seed_of
from distill.data.seen_rows import SeenRows, seen_of
from distill.errors import DistillError, NothingToMeasure, checked
from distill.evaluation.controls import ANOTHER, controls_of, random_parts
from distill.evaluation.outcome import InterchangeAccuracy, Tally, outcome_of
from distill.evaluation.variable_accuracy import variables_accuracy
from distill.interchange.attention_keys import over_keys
from distill.interchange.mapping import Pair, Sides, pairs_of
from distill.interchange.positions import Span
from distill.interchange.sources import Pairs, Shuffle
from distill.interchange.vacuous import Answers, Whole, touched, unpadded, visible
from distill.losses import kd
from distill.models.class_names import check_alike
from distill.models.finite import check_answers
from distill.models.inputs import (
    decoder_masked,
    device_of,
    evaluating,
    inputs_of,
    network_of,
    real_tokens,
    students,
    teachers,
    to_device,
    uncompiled,
    vocabulary_of,
)
from distill.models.loss_masks import TOKENS, LabelPlace, label_place, loss_masks
from distill.models.outputs import answered, same_answers
from distill.models.reinitialised import reinitialised
from distill.models.trials import answer_of, translated
from distill.tasks.loading import held_out
from distill.teachers.served import Served, ServedRun
from distill.teachers.verbs import grid_of, interchanged, run_of
from interventions import Location, Model, Run, architecture, run, shown

Batch = dict[str, Tensor]
DRAWN = Span(0.3)


@checked
def interchange_accuracy(
    teacher: Model | Served | CausalModel,
    student: Model,
    mapping: Sides | tuple[Pair, ...] | str,
    data: Any = None,
    *,
    pairs: int = 2000,
    sources: Pairs | None = None,
    positions: Any = DRAWN,
    seed: Any = 0,
    batch_size: int = 128,
    controls: str | Sequence[str] = (),
    exclude: Any = None,
    answers: Any = None,
) -> InterchangeAccuracy:
    """How often the same interchange makes student and teacher give the same answer.

    Every pair of a base and a source is interchanged at every entry of the mapping, in both models, at the same
    positions; what is
    drawn depends on `seed` alone, not on the batch size. A write that replaces all that one of the outputs can see, or
    nothing of it, is left out: it would compare answers, not computation. The output of a block is all that comes after
    it can see; that of its feed-forward part is not, which the residual stream goes past.

    Args:
        teacher: a network, here or `Served`, or a causal model, which samples its own inputs where there is no `data`.
        student: a network; of a causal model a torch model, else one of nnsight too.
        mapping: {teacher side: student side}, "full", "middle", "late" or "single", as for `fit`.
        data: a Task, or the name of one (its test rows), or held-out rows in any form that `Rows.of` takes. For a
            causal model {name: tensor} of its inputs; columns of other variables are checked.
        pairs: how many pairs of base and source.
        sources: `Shuffle()` (another row, the default) or `InContext(share)`.
        positions: the rule that draws positions, `Span(0.3)` by default; None writes all of them. For a causal model
            the tokens of the places: one choice for all, or {variable or location: choice}, as `CausalModel.select`
            takes them; by default those of the mapping, if that is an Alignment, else all.
        controls: the same measurement where nothing was learned: `"subspace"` (random ones of the same size),
            `"labels"` (the teacher is told of other sources), `"network"` (a student with new weights), or `"all"`.
            Where an alignment was learned, also learn one for `distill.reinitialised(network)`.
        exclude: the result of `fit`: data may not hold rows that it was trained on, and of sampled pairs the share that
            it was trained on is reported.
        answers: what of a model's output is its answer, as for `fit`.

    Raises:
        NothingToMeasure: a mapping whose every write is left out, or of places with different positions.
        DistillError: fewer than two rows, or positions=None for rows of different lengths.

    Geiger et al. 2021 (arXiv:2106.02997), section 3; Geiger et al. 2021 (arXiv:2112.00826).
    """
    teacher, student = uncompiled(teacher), uncompiled(student)
    with (
        answered((teacher, student), answers),
        translated(),
        torch.inference_mode(False),
    ):  # what is seen is told by gradients
        return _measured(
            teacher, student, mapping, data, pairs=pairs, sources=sources, positions=positions, seed=seed_of(seed),
            batch_size=batch_size, controls=controls, seen=seen_of(exclude),
        )  # fmt: skip


def _measured(
    teacher: Model | Served | CausalModel,
    student: Model,
    mapping: Sides | tuple[Pair, ...] | str,
    data: Any,
    *,
    pairs: int,
    sources: Pairs | None,
    positions: Any,
    seed: int,
    batch_size: int,
    controls: str | Sequence[str],
    seen: SeenRows | None,
) -> InterchangeAccuracy:
    """What `interchange_accuracy` returns."""
    if isinstance(teacher, CausalModel):
        if not isinstance(student, nn.Module):
            raise DistillError(
                f"a {type(student).__name__} of nnsight cannot be measured against a causal model yet; give the torch "
                "model itself: interventions.architecture(model).model."
            )
        if sources is not None:
            raise DistillError("a causal model has its sources from where its bases are; leave sources out.")
        return variables_accuracy(
            teacher,
            student,
            mapping,
            data,
            positions=None if positions is DRAWN else positions,
            pairs=pairs,
            seed=seed,
            batch_size=batch_size,
            controls=controls,
            exclude=seen,
        )
    if data is None:
        raise DistillError("the teacher is a network and no data was given; pass data='pvr', a Task or held-out rows.")
    check_alike(teacher, student)
    entries = pairs_of(mapping, teacher, student)
    _refuse_rules(sources, positions)
    taken: Pairs = Shuffle() if sources is None else sources
    rows, names = held_out(data, student), controls_of(controls)
    few = rows.batch(range(min(PROBED, len(rows))))
    for name, model, columns in (("the teacher", teacher, teachers(few)), ("the student", student, students(few))):
        with evaluating(model), torch.no_grad():
            answer_of(name, model, columns, run_of)
    overlap = None if seen is None else _refuse_seen(rows, seen)
    base, source, clusters = _examples(rows, pairs, taken, vocabulary_of(student), seed)
    study = _Study((teacher, student), entries, positions, taken.aligned, seed)
    tally = _tallied(study, base, source, batch_size)
    if not bool(tally.kept.any()):
        raise NothingToMeasure(
            "every write of this mapping replaces all that an output can see, or nothing that it can see, so there "
            "is nothing to "
            "measure; map a block below the last one, or dims=range(...) of it, or choose positions=Span(0.3)."
        )
    outcome = partial(outcome_of, clusters=clusters, seed=seed, regression=study.regression)
    compared = {}
    for name in names:
        other = _controlled(name, study, base)
        if other is not None:
            told = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed)) if name == "labels" else None
            with same_answers(network_of(other.models[1]), student):
                compared[name] = outcome(_tallied(other, base, source, batch_size, told))
    settings = {"pairs": pairs, "sources": repr(taken), "positions": repr(positions), "seed": seed}
    per_pair = {str(entry): outcome(tally.of(i)) for i, entry in enumerate(entries)}
    return InterchangeAccuracy(outcome(tally), per_pair, settings, compared, overlap)


def _refuse_rules(sources: Any, positions: Any) -> None:
    """Raise for what is no rule of sources or positions, also where the models have no tokens to draw."""
    if sources is not None and (isinstance(sources, type) or not hasattr(sources, "aligned")):
        raise DistillError(f"sources={shown(sources)} draws no sources; use sources=Shuffle() or InContext(0.3).")
    if positions is not None and (isinstance(positions, type) or not hasattr(positions, "eligible")):
        raise DistillError(f"positions={shown(positions)} draws no tokens; use positions=Span(0.3), or None for all.")


def _refuse_seen(rows: Rows, seen: SeenRows) -> float:
    found = seen.among(rows.table)
    if bool(found.any()):
        raise DistillError(
            f"{int(found.sum())} of the {len(rows)} rows were trained on (first: row {int(found.nonzero()[0])}); "
            "measure on others: rows.take((~result.seen.among(rows.table)).nonzero()[:, 0])."
        )
    return 0.0


def _controlled(name: str, study: "_Study", base: Rows) -> "_Study | None":
    """The study of a control: of other places, of another student, or the same one; None where there is none."""
    teacher, student = study.models
    if name == "network":
        return replace(study, models=(teacher, reinitialised(network_of(student), study.seed + ANOTHER)))
    if name == "labels":
        return study
    few = inputs_of(student, to_device(base.batch(range(min(2, len(base)))), device_of(student)))
    with torch.no_grad(), evaluating(student):
        ran = run(student, few, [at.whole for entry in study.entries for at in entry.student])
        parts = random_parts(study.entries, ran, study.seed)
    return None if parts is None else replace(study, entries=parts)


def _tallied(study: "_Study", base: Rows, source: Rows, batch_size: int, told: Tensor | None = None) -> Tally:
    """The sums of all pairs; `told` says for each pair of which one's source the teacher takes."""
    device = device_of(study.models[1])
    with ExitStack() as modes, torch.no_grad():
        for module in (*study.models, *study.subspaces):
            modes.enter_context(evaluating(module))
        few = range(min(PROBED, len(base)))
        study.probe(*(to_device(each.batch(few), device) for each in (base, source)))
        tallies = []
        for rows in batches(len(base), batch_size):
            here, there = (to_device(each.batch(rows), device) for each in (base, source))
            other = None if told is None else to_device(source.batch(told[rows]), device)
            tallies.append(study.measure(here, there, rows, other))
    return Tally(torch.cat([each.sums for each in tallies]))


PROBED = 32
NAMES = ("teacher", "student")


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Where a base is written and a source read: masks `[batch, position]`, None for all of them.

    Attributes:
        alike: whether both have as many tokens, and those of the same numbers are interchanged.
    """

    written: Bool[Tensor, "batch _"] | None
    read: Bool[Tensor, "batch _"] | None
    alike: Bool[Tensor, " batch"]


@dataclass(eq=False)
class _Study:
    """The models, the mapping and the draws of one measurement."""

    models: tuple[Model | Served, Model]
    entries: tuple[Pair, ...]
    positions: Span | None
    aligned: bool
    seed: int
    sees_all: bool = False
    regression: bool = False
    place: LabelPlace = "none"
    _few: tuple[Batch, Batch] = field(default=({}, {}), init=False)

    @property
    def subspaces(self) -> list[nn.Module]:
        """Those of the places."""
        places = (at for entry in self.entries for at in (*entry.teacher, *entry.student))
        return [at.subspace for at in places if isinstance(at.subspace, nn.Module)]

    def probe(self, base: Batch, source: Batch) -> None:
        """See on a few examples where labels stand, and if outputs depend on all real tokens, so that none is asked."""
        self._few = (base, source)
        bases = self._runs(base)
        self.place = label_place(self.models[1], bases[1].logits, base)
        self.sees_all = bases[1].logits.ndim == 2 and all(
            torch.equal(mask, real[at])
            for seen, real in zip(self._visible(bases, base), self._real(bases, base), strict=True)
            for at, mask in seen.items()
        )

    @cached_property
    def wholes(self) -> list[Whole]:
        """What tells, for each model, which places are all that it computes with."""
        bases, sources = (self._runs(batch) for batch in unpadded(*self._few))
        return [Whole(base, source) for base, source in zip(bases, sources, strict=True)]

    def measure(self, base: Batch, source: Batch, rows: Int[Tensor, " batch"], told: Batch | None = None) -> Tally:
        """The sums of these pairs of examples, for each entry of the mapping; `told` is the teacher's own source."""
        bases, sources = self._runs(base), self._runs(source)
        others = sources if told is None else self._runs(told)
        given, theirs = [others[0], sources[1]], (source if told is None else told, source)
        seen = self._real(bases, base) if self.sees_all else self._visible(bases, base)
        self.regression = bases[1].logits.shape[-1] == 1
        weights = self._weights(bases[1].logits, base)
        masked = [dict(decoder_masked(self.models[1], batch)) for batch in (base, *theirs)]
        for side, name in enumerate(NAMES):
            told_of, real = given[side].logits, weights > 0
            _check(name, bases[side].logits, real)
            _check(name, told_of, real if told_of.ndim == 2 else _real_answers(told_of, masked[1 + side]))
        columns = [_columns(r.logits, b, bases[1].logits, masked[0]) for r, b in zip(given, masked[1:], strict=True)]
        sums = []
        for number, entry in enumerate(self.entries):
            sides, draws = (
                (entry.teacher, entry.student),
                [self._drawn(number, (bases, sources), (base, source), rows)] * 2,
            )
            if told is not None:
                draws[0] = self._drawn(number, (bases, others), (base, told), rows)
            after = [
                interchanged(b, over_keys(b, s, places, base, other), places, (drawn.written, drawn.read))
                for b, s, other, places, drawn in zip(bases, given, theirs, sides, draws, strict=True)
            ]
            for name, ran in zip(NAMES, after, strict=True):
                _check(f"{name} after an interchange", ran.logits, weights > 0)
            kept = torch.ones(len(weights), dtype=torch.bool, device=weights.device)
            for side, places in enumerate(sides):
                answers = Answers(bases[side], given[side], after[side], columns[side], weights > 0)
                kept &= self._says_something(side, places, answers, seen[side], draws[side])
            counted = weights * kept.view(-1, *[1] * (weights.ndim - 1))
            replaced = _answers_at(sources[1].logits, columns[1])
            sums.append(_compared(after, bases[1].logits, replaced, bases[0].logits, counted))
        return Tally(torch.stack(sums, 1).cpu())

    def _says_something(
        self,
        side: int,
        places: tuple[Location, ...],
        answers: Answers,
        seen: dict[Location, Tensor],
        drawn: "_Drawn",
    ) -> Bool[Tensor, " batch"]:
        """Whether a write reaches what the output can see, and leaves something of the base."""
        reached = touched(places, seen, drawn.written)
        if not isinstance(answers.base, ServedRun):  # whose answers come from several requests: they differ in rounding
            reached = reached | answers.changed()
        whole = self.wholes[side].replaced(places, seen, drawn.written)
        return reached & ~whole & ~(answers.are_the_sources() & drawn.alike)

    def _places(self, side: int) -> list[Location]:
        return list(dict.fromkeys(at for entry in self.entries for at in (entry.teacher, entry.student)[side]))

    def _visible(self, bases: list[Run], batch: Batch) -> list[dict[Location, Tensor]]:
        return [visible(b, self._places(i), self._weights(b.logits, batch)) for i, b in enumerate(bases)]

    def _weights(self, logits: Tensor, batch: Batch) -> Tensor:
        """Which predictions count: one an example, or the tokens with a label (else the real ones) of token models."""
        if logits.ndim == 2:
            return torch.ones(len(logits), dtype=torch.float64, device=logits.device)
        mask = loss_masks(self.models[1], batch, self.place)[TOKENS] if self.place != "none" else None
        return (_real_answers(logits, batch) if mask is None or mask.shape != logits.shape[:2] else mask).double()

    def _real(self, bases: list[Run], batch: Batch) -> list[dict[Location, Tensor]]:
        return [{at: _real(b, at, batch) for at in self._places(i)} for i, b in enumerate(bases)]

    def _runs(self, batch: Batch) -> list[Run]:
        runs = []
        for side, model in enumerate(self.models):
            places = self._places(side)
            if isinstance(model, nn.Module):  # its run keeps what every block returned
                places = [at for at in places if at.module is not None or at.site != "block_output"]
            given = students(batch) if side else teachers(batch)
            runs.append(run_of(model, inputs_of(model, given), list(dict.fromkeys(at.whole for at in places))))
        return runs

    def _drawn(
        self, number: int, runs: tuple[list[Run], list[Run]], batch: tuple[Batch, Batch], rows: Int[Tensor, " batch"]
    ) -> "_Drawn":
        """Positions in base and source; what is drawn for an example does not depend on its batch."""
        entry = self.entries[number]
        device = runs[0][1].logits.device
        if len(self._grid(entry, runs[0])) < 2:
            return _Drawn(None, None, torch.ones(len(rows), dtype=torch.bool, device=device))
        real = [_real(ran[1], entry.student[0], columns) for ran, columns in zip(runs, batch, strict=True)]
        if self.positions is None:
            if not torch.equal(*real):
                raise DistillError(
                    "positions=None interchanges every position, and the rows of the data differ in length; use "
                    "positions=Span(1.0) for all that base and source both have."
                )
            return _Drawn(None, None, torch.ones(len(rows), dtype=torch.bool, device=device))
        eligible = [self.positions.eligible(columns, mask) for columns, mask in zip(batch, real, strict=True)]
        width = 1 if self.positions.consecutive else max(mask.shape[1] for mask in real)
        uniform = torch.stack([_uniform(width, self.seed, int(row), number) for row in rows]).to(device)
        written, read = self.positions.draw(eligible[0], eligible[1], uniform, aligned=self.aligned)
        return _Drawn(written, read, _alike((real[0], written), (real[1], read)))

    def _grid(self, entry: Pair, bases: list[Run]) -> tuple[int, ...]:
        """`[batch, position]` of the places of an entry."""
        sides = zip(("teacher", "student"), bases, (entry.teacher, entry.student), strict=True)
        grids = [(name, grid_of(ran, at)) for name, ran, places in sides for at in places]
        (_, first), other = grids[0], next((each for each in grids if each[1] != grids[0][1]), None)
        if other is not None:
            raise NothingToMeasure(
                f"the locations of {entry} have different [batch, position]: {first} in the teacher and {other[1]} in "
                f"the {other[0]}; map places of the same grid."
            )
        return first


def _alike(base: tuple[Tensor, Tensor], source: tuple[Tensor, Tensor]) -> Bool[Tensor, " batch"]:
    """Whether two pairs of masks, of what is real and of what is chosen of it, are equal token by token."""
    width = max(base[0].shape[1], source[0].shape[1])

    def by_number(real: Tensor, chosen: Tensor) -> Tensor:
        order = torch.argsort((~real).int(), dim=1, stable=True)
        found = torch.stack([real.gather(1, order), chosen.gather(1, order)])
        return nn.functional.pad(found, (0, width - real.shape[1]))

    return (by_number(*base) == by_number(*source)).all(2).all(0)


def _real(base: Run, at: Location, batch: Batch) -> Bool[Tensor, "batch _"]:
    """Which positions of a place are no padding; one that counts where there are no positions."""
    rows, *width = grid_of(base, at)
    if not width:
        return torch.ones(rows, 1, dtype=torch.bool)
    masked, column = decoder_masked(base.model, batch), architecture(base.model).place(at).mask
    return real_tokens(masked, rows, width[0], base.logits.device, column=column)


def _examples(
    rows: Rows, pairs: int, sources: Pairs, vocabulary: int | None, seed: int
) -> tuple[Rows, Rows, Int[Tensor, " pairs"]]:
    """Bases and sources of a measurement, and the number of each base."""
    if len(rows) < 2:
        raise DistillError(f"interchange accuracy needs at least 2 rows to pair, and the data has {len(rows)}.")
    if pairs < 1:
        raise DistillError(f"pairs={pairs} measures nothing; use e.g. pairs=2000.")
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-pairs // len(rows))
    base = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(rounds)])[:pairs]
    other = (base + torch.randint(1, len(rows), (pairs,), generator=generator)) % len(rows)
    bases = rows.take(base)
    if isinstance(sources, Shuffle):
        return bases, rows.take(other), base
    drawn = [
        sources.draw(bases.batch([i]), vocabulary, torch.Generator().manual_seed(_number(seed, i)))
        for i in range(pairs)
    ]
    if not all(isinstance(each, dict) for each in drawn):
        raise DistillError(f"sources={sources!r} gives rows of a batch; use Shuffle() or InContext(0.3).")
    changed = [each["input_ids"][0] for each in drawn if isinstance(each, dict)]
    column = torch.stack(changed) if isinstance(bases.table["input_ids"], Tensor) else changed
    return bases, Rows({**bases.table, "input_ids": column}, bases.pad_id, bases.padding_side), base


def _number(*parts: int) -> int:
    return hash(parts) % 2**63


def _uniform(width: int, *parts: int) -> Float[Tensor, "2 width"]:
    # Drawn position by position, so that a longer batch leaves the first ones as they are.
    return torch.rand(width, 2, generator=torch.Generator().manual_seed(_number(*parts))).T.contiguous()


def _real_answers(logits: Tensor, batch: Batch) -> Bool[Tensor, "batch token"]:
    """Which tokens of a token model's answer are no padding."""
    decodes = {"decoder_input_ids", "decoder_attention_mask"} & batch.keys()
    column = "decoder_attention_mask" if decodes else "attention_mask"
    rows, width = logits.shape[:2]
    return real_tokens(batch, rows, width, logits.device, column=column)


def _check(whose: str, logits: Tensor, counted: Tensor) -> None:
    check_answers(logits[counted], f"the interchange accuracy of the {whose}")


def _columns(source: Tensor, source_batch: Batch, base: Tensor, base_batch: Batch) -> Tensor | None:
    """Of token models, for each token of the base the column of the source's token of its number, −1 without one."""
    if base.ndim == 2:
        return None
    theirs, ours = (_real_answers(*each) for each in ((source, source_batch), (base, base_batch)))
    columns = torch.argsort((~theirs).int(), dim=1, stable=True)
    rank = (ours.cumsum(1) - 1).clamp(min=0)
    found = columns.gather(1, rank.clamp(max=columns.shape[1] - 1))
    return found.where(rank < theirs.sum(1, keepdim=True), -1)


def _answers_at(source: Tensor, columns: Tensor | None) -> Tensor:
    """The answers of the source run; for token models those at the columns, −1 where there is none."""
    answers = source.argmax(-1)
    return answers if columns is None else answers.gather(1, columns.clamp(min=0)).where(columns >= 0, -1)


def _compared(
    after: list[Run], student_base: Tensor, student_source: Tensor, teacher_base: Tensor, weights: Tensor
) -> Float[Tensor, "batch sums"]:
    """`SUMS` of each example; all but the answers of the student on the source are runs or logits."""
    teacher, student = (each.logits for each in after)
    if teacher.shape[-1] == 1:
        error, none = (teacher - student).abs()[..., 0], torch.zeros(())
        values = [torch.ones(()), *[none] * 6, error]
    else:
        target = teacher.argmax(-1)
        right, effect = student.argmax(-1) == target, target != teacher_base.argmax(-1)
        nothing, everything = student_base.argmax(-1) == target, student_source == target
        divergence = kd(student, teacher, reduction="none")
        values = [torch.ones(()), right, effect, right & effect, nothing, everything, divergence, torch.zeros(())]
    sums = [(value.to(weights) * weights) for value in values]
    return torch.stack([each if each.ndim == 1 else each.sum(-1) for each in sums], -1)
