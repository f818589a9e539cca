"""Distillation by interchange interventions (DIITO): one interchange in teacher and student should have one effect.

In every step an entry of the mapping is drawn, L_t of the teacher M_t and L_s of the student M_s, and a source s for
each base b. Both models run on b with the activations at their location, at some positions, replaced by those of their
run on s. The two counterfactual runs are compared by another objective, by default knowledge distillation,

    L = KD(M_s(b; L_s ← M_s(s)), M_t(b; L_t ← M_t(s))).

Wu et al. 2021 (arXiv:2112.02505), section 3; Geiger et al. 2021 (arXiv:2112.00826). Instead of the swap, Mixup and
Noise write random vectors, the same in both models, without a source: "Two Improvements to Causal Distillation".
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.errors import DistillError, checked, refuse_unless_positive
from distill.interchange.answer import Answer, resolved
from distill.interchange.attention_keys import over_keys
from distill.interchange.choices import Choice, choices_of, kinds_of
from distill.interchange.kinds import Kind
from distill.interchange.mapping import Entry
from distill.interchange.positions import PositionRule, Span
from distill.interchange.random_vectors import Attended, is_pattern, narrow
from distill.interchange.sources import Crossway, Shuffle, Sources
from distill.interchange.visible_kinds import can_be_seen
from distill.models.host_copies import host_columns, host_generator, rows_of_columns
from distill.models.inputs import MASKED, decoder_masked, device_of, inputs_of, real_tokens, to_device, vocabulary_of
from distill.models.outputs import logits_if_any
from distill.objectives.objective import About, Objective, matching, terms_of
from distill.objectives.response import KD
from distill.objectives.step import Reads, Step
from distill.teachers.served import ServedRun
from distill.teachers.verbs import answering, grid_of, interchanged, run_of, run_to, unit_of
from interventions import Location, Mixup, Noise, Run, Swap, architecture, renamed

Operator = Swap | Mixup | Noise
LOOKED_AT = 8
"""The number of rows on which the token of `Answer()`, and what can be seen of an interchange, is found."""
Positions = tuple[Tensor | None, Tensor | None]
"""The positions that are written in the base and read in the source, `[batch, position]`; None for all of them."""


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """An interchange of one entry of a mapping in teacher and student, on the rows of a batch.

    Attributes:
        entry: the entry.
        teacher, student: the counterfactual runs.
        positions: those that were written in the bases, and read in the sources.
        drawn: the sources, as row numbers of the batch or as a batch of new inputs; None for an operator without one.
    """

    entry: Entry
    teacher: Run
    student: Run
    positions: Positions
    drawn: Tensor | Mapping[str, Tensor] | None = None


@renamed(pairs="sources")
@checked
class DIITO(Objective):
    """Distillation by interchange interventions. Terms: those of `match`, with `_cf` behind the name, e.g. `kd_cf`.

    Every step draws one entry of the mapping, interchanges it in teacher and student with the same sources and
    positions, and compares the two counterfactual runs. Gradients flow through the student's base and source runs.

    Wu et al. 2021 (arXiv:2112.02505), section 3; Geiger et al. 2021 (arXiv:2112.00826); for InContext and Mixup "Two
    Improvements to Causal Distillation".

    At a site with heads, the random vector of a position is that of all heads, concatenated.

    Args:
        sources: where sources come from: `Shuffle()` (the default), `Crossway()`, `InContext(0.3)`, or None for an
            operator without a source.
        op: `Swap()`; or `Mixup(σ)` or `Noise(σ)`, which need no source: the same random vectors are used in every
            location of both models, projected from the wider to the narrower by a fixed semi-orthogonal map.
        positions: the rule that draws the positions, the same in both models: `Span(0.3)`, `Scattered(2)`, `Answer()`;
            None is all of them. Of several, `[Span(0.3), Answer()]`, one is drawn a step.
        at: sites that take the place of those of the mapping, of which one is drawn a step, e.g. `["block_output",
            "attention_heads"]`; None keeps the places of the mapping.
        match: how the counterfactual runs are compared: by one objective or several, e.g. `[KD(2.0), Cosine()]`.
        detach_source: cut the student's source run off from the graph.
        vacuous: `"drop"` leaves entries out at which no interchange can be seen, as it replaces all that the answers
            depend on or nothing of it; they are found on a few rows. `"keep"` draws them too, as published.
        pairs_per_step: how many pairs of counterfactual runs a step compares, each with its own draws, 1 as published.
            The terms are their means. The base runs are shared, so one more pair costs the blocks above its places, and
            in-context sources a run up to them.

    Raises:
        DistillError: sources for an operator that takes none, positions that are no rule, a site that layers lack, or
            fewer than one pair.
    """

    about = About(
        ("kd_cf",),
        "KD(M_s(b; L_s ← M_s(s)), M_t(b; L_t ← M_t(s))), one entry of the mapping drawn a step",
        "Wu et al. 2021, arXiv:2112.02505",
        "both, for each of pairs_per_step: a resumed counterfactual run; in-context sources: a run up to the swap too",
    )

    compares_runs = False

    def __init__(
        self,
        sources: Sources | None = None,
        *,
        op: Operator | None = None,
        positions: Any = Span(0.3),  # noqa: B008 (frozen)
        at: str | Sequence[str] | None = None,
        match: Objective | Sequence[Objective] | None = None,
        detach_source: bool = False,
        vacuous: Literal["drop", "keep"] = "drop",
        pairs_per_step: int = 1,
    ) -> None:
        super().__init__()
        refuse_unless_positive("DIITO", pairs_per_step=pairs_per_step)
        self.op = Swap() if op is None else op
        if sources is not None and not self.op.needs_source:
            raise DistillError(f"{self.op} needs no source, and sources={sources} was given; leave sources out.")
        self.sources = Shuffle() if sources is None and self.op.needs_source else sources
        self.positions, self.at, self.detach_source, self.vacuous = positions, at, detach_source, vacuous
        self.pairs_per_step = pairs_per_step
        self._dropped: tuple[Choice, ...] = ()
        shown = Shuffle() if self.sources is None else self.sources  # noise has none, and no kinds
        self._named = self._kinds = kinds_of("DIITO", positions, at, shown)
        self.match: Any = matching(KD() if match is None else match, "DIITO", "counterfactual runs")

    @property
    def interchanges(self) -> bool:
        """True: its counterfactual runs resume from the base runs."""
        return True

    @property
    def weights(self) -> Mapping[str, float]:
        """The weights of the objectives in `match`."""
        return {f"{name}_cf": weight for each in self.match for name, weight in each.weights.items()}

    def reads(self, mapping: Sequence[Entry]) -> Reads:
        """Return the locations that `match` compares and the mapped ones; not block outputs, which runs keep anyway."""
        matched = [objective.reads(mapping) for objective in self.match]
        entries = [entry for _, entry in choices_of(self._kinds, mapping)]
        return Reads(
            tuple(dict.fromkeys([*_besides_blocks(entries, "teacher"), *(at for r in matched for at in r.teacher)])),
            tuple(dict.fromkeys([*_besides_blocks(entries, "student"), *(at for r in matched for at in r.student)])),
        )

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of interchange that are trained on, one of which is drawn a step; none for noise and mixup."""
        return self._named if self.op.needs_source else ()

    @property
    def dropped(self) -> tuple[Choice, ...]:
        """The kinds and entries that are not drawn, as no interchange there can be seen; known once training began."""
        return self._dropped

    def prepare(self, step: Step, rows: int) -> None:
        """Find the token that `Answer()` names in this student, and the entries at which nothing can be seen."""
        self._dropped, self._kinds = (), self._named
        if step.teacher is None or not step.mapping:
            return
        for kind in self._named:
            kind.entries(step.mapping, answering(step.teacher), step.network)  # raises for a site that a side lacks
        choices, unknown = (
            choices_of(self._named, step.mapping),
            any(kind.positions == Answer() for kind in self._named),
        )
        if not unknown and (len(choices) < 2 or self.vacuous == "keep"):
            return
        few = step.batch  # where an objective masks tokens, rows of the data have none that are masked
        if step.data is not None and MASKED not in few:
            few = to_device(step.data.batch(range(min(rows, LOOKED_AT))), device_of(step.network))
        student, places = step.network, choices[0][1].student
        self._kinds = tuple(replace(k, positions=resolved(k.positions, student, few, places)) for k in self._named)
        if self.vacuous == "drop":
            self._dropped = self._unseen(step, few)

    def _unseen(self, step: Step, few: Mapping[str, Tensor]) -> tuple[Choice, ...]:
        """Return the choices at which no interchange can be seen; none, with a warning, if that is all of them."""
        choices = choices_of(self._kinds, step.mapping)
        if len(choices) < 2:
            return ()
        model = answering(step.taught)
        teacher = model if isinstance(model, nn.Module) else None
        place, has_source = step.label_place or "none", self.op.needs_source
        seen = can_be_seen(choices, teacher, step.network, few, place=place, has_source=has_source)
        if any(seen):
            return tuple(choice for choice, found in zip(choices, seen, strict=True) if not found)
        warnings.warn(
            "DIITO: no interchange of this mapping can be seen, as each replaces all that the answers depend on, or "
            "nothing of it; all entries are drawn. Map a block below the last one, or use positions=Span(0.3).",
            stacklevel=2,
        )
        return ()

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return the terms of `match` on the counterfactual runs of drawn entries of the mapping, their mean."""
        drawn = (self._draw(step) for _ in range(self.pairs_per_step))
        return self.compare(step, (each for kind, entry in drawn for each in self.counterfactuals(step, entry, kind)))

    def extra_repr(self) -> str:
        """Return the settings for printing."""
        settings = f"op={self.op}, positions={self.positions}, detach_source={self.detach_source}"
        settings += f", at={self.at!r}" if self.at is not None else ""
        settings += f", vacuous={self.vacuous!r}" if self.vacuous != "keep" else ""  # as all were when there was none
        settings += f", pairs_per_step={self.pairs_per_step}" if self.pairs_per_step != 1 else ""
        return f"{self.sources}, {settings}, match={list(self.match)}"

    def draw_pair(self, step: Step) -> Entry:
        """Draw one entry of the mapping, at one of the sites, uniformly among those that are drawn."""
        return self._draw(step)[1]

    def _draw(self, step: Step) -> Choice:
        """Draw a kind and an entry at its site, uniformly among those that are not dropped."""
        if not step.mapping:
            raise DistillError(
                "DIITO needs a mapping; give mapping='full' or distill.layer_mapping(teacher, student, 'full')."
            )
        choices = choices_of(self._kinds, step.mapping)
        kept = [choice for choice in choices if choice not in self._dropped]
        return kept[int(torch.randint(len(kept), (), generator=step.agreed(host_generator(step.generator))))]

    def counterfactuals(self, step: Step, entry: Entry, kind: Kind | None = None) -> Iterator[Counterfactual]:
        """Yield the counterfactual runs of one entry; with crossway sources also those in the other direction.

        Args:
            step: the step.
            entry: the entry, at the site that is interchanged.
            kind: draws the positions; None is the first kind.
        """
        rule = (kind or self._kinds[0]).positions
        if self.sources is None:
            yield self._with_noise(step, entry, rule)
            return
        drawn = self.sources.draw(step.batch, vocabulary_of(step.student.model), host_generator(step.generator))
        written, read = self._draw_positions(step, entry, rule, drawn)
        yield self._interchange(step, entry, drawn, (written, read))
        if isinstance(self.sources, Crossway) and isinstance(drawn, Tensor):
            back = drawn.argsort()  # row drawn[i] is now the base of row i, written where row i was read
            turned = [None if mask is None else mask[back.to(mask.device)] for mask in (read, written)]
            yield self._interchange(step, entry, back, (turned[0], turned[1]))

    def compare(self, step: Step, found: Iterable[Counterfactual]) -> dict[str, Tensor]:
        """Return the terms of `match` on counterfactual runs, with `_cf` behind the name; their mean over several."""
        steps = (replace(step, teacher=each.teacher, base=partial(_as_it_is, each.student)) for each in found)
        terms = [terms_of(self.match, each) for each in steps]
        return {f"{name}_cf": torch.stack([each[name] for each in terms]).mean(0) for name in terms[0]}

    def _compared_at(self, step: Step) -> tuple[Location, ...]:
        """Return the locations that are compared in the teacher's counterfactual run."""
        if isinstance(step.taught.model, nn.Module) and not isinstance(step.taught, ServedRun):
            return step.reads.teacher
        return tuple(dict.fromkeys(at for each in self.match for at in each.reads(step.mapping).teacher))

    def _interchange(
        self,
        step: Step,
        entry: Entry,
        drawn: Tensor | Mapping[str, Tensor],
        positions: Positions,
    ) -> Counterfactual:
        """Return the counterfactual runs of teacher and student for drawn sources, rows of the batch or new inputs."""
        here = host_columns(step.batch)
        columns = [decoder_masked(step.student.model, each) for each in (here, _source_columns(here, drawn))]
        with torch.no_grad():
            source = over_keys(step.taught, _run_source(step.taught, drawn, entry.teacher), entry.teacher, *columns)
            teacher = interchanged(step.taught, source, entry.teacher, positions, self._compared_at(step))
        with nullcontext() if not self.detach_source else torch.no_grad():
            source = _run_source(step.student, drawn, entry.student, step.ends)
            source = over_keys(step.student, source, entry.student, *columns)
        source = source.detach() if self.detach_source else source
        student = interchanged(step.student, source, entry.student, positions, step.reads.student)
        return Counterfactual(entry, teacher, student, positions, drawn)

    def _draw_positions(
        self, step: Step, entry: Entry, rule: PositionRule | None, drawn: Tensor | Mapping[str, Tensor] | None
    ) -> Positions:
        """Draw the positions of base and source on the host, as masks `[batch, position]`; None where all are written.

        Args:
            step: the step.
            entry: the entry that is interchanged.
            rule: the rule of positions; None takes all.
            drawn: the sources; None for an operator without one.
        """
        grid = _grid(step, entry)
        if rule is None or len(grid) < 2:
            return None, None
        (rows, width), generator = grid, host_generator(step.generator)
        column = architecture(step.student.model).place(entry.student[0]).mask
        here = host_columns(step.batch)
        there = here if drawn is None else _source_columns(here, drawn)
        eligible = [
            rule.eligible(masked, real_tokens(masked, rows, width, generator.device, column=column))
            for masked in (decoder_masked(step.student.model, columns) for columns in (here, there))
        ]
        uniform = torch.rand(rows, 2, width, generator=generator)
        aligned = self.sources is None or self.sources.aligned
        return rule.draw(eligible[0], eligible[1], uniform, aligned=aligned)

    def _with_noise(self, step: Step, entry: Entry, rule: PositionRule | None) -> Counterfactual:
        """Return the runs of teacher and student with the same random vectors written into both."""
        chosen, _ = self._draw_positions(step, entry, rule, None)
        models = ((step.taught, entry.teacher), (step.student, entry.student))
        units = {(id(run), place): unit_of(run, place) for run, places in models for place in places}
        vectors = _grid(step, entry) if chosen is None else (int(chosen.sum()),)
        widest, device = max(map(prod, units.values())), step.generator.device
        normal = torch.randn(*vectors, widest, generator=step.generator, device=device)

        def write(run: Run, locations: tuple[Location, ...], record: tuple[Location, ...]) -> Run:
            at = {place: self._operator(normal, units[id(run), place], run, place) for place in locations}
            return interchanged(run, None, at, (chosen, None), record)

        with torch.no_grad():
            teacher = write(step.taught, entry.teacher, self._compared_at(step))
        student = write(step.student, entry.student, step.reads.student)
        return Counterfactual(entry, teacher, student, (chosen, None))

    def _operator(self, normal: Tensor, unit: tuple[int, ...], run: Run, place: Location) -> Any:
        """Return the operator of a location with its part, `[…, *unit]`, of the random vectors of all, `[…, dims]`."""
        if isinstance(self.op, Swap):
            raise DistillError("Swap() draws nothing; this is an error in DIITO.")
        own = narrow(normal, prod(unit)).reshape(*normal.shape[:-1], *unit)
        op = replace(self.op, normal=own)
        return Attended(op) if is_pattern(run, place) else op


def _as_it_is(run: Run) -> Run:
    """Return a run that was made before."""
    return run


def _source_columns(batch: Mapping[str, Tensor], drawn: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the columns of the sources on the host: those of other rows of the batch, or of a batch of their own."""
    return host_columns(drawn) if isinstance(drawn, Mapping) else rows_of_columns(batch, drawn)


def _run_source(
    run: Run,
    drawn: Tensor | Mapping[str, Tensor],
    locations: tuple[Location, ...],
    ends: list[Tensor | None] | None = None,
) -> Run:
    """Return the source run: other rows of the base run, or a run on new inputs up to the last location read.

    Args:
        run: the base run.
        drawn: the sources.
        locations: the locations that are read.
        ends: takes the answers of a run on new inputs, which is then run to its end; None stops it.
    """
    if isinstance(drawn, Tensor):
        return replace(run, output=None).take(drawn)  # of a language model the output is larger than all that is read
    model, inputs, places = answering(run), inputs_of(run.model, drawn), [location.whole for location in locations]
    if ends is None:
        return run_to(model, inputs, places)
    whole = run_of(model, inputs, places, resumable=False)
    ends.append(logits_if_any(whole))
    return whole


def _grid(step: Step, entry: Entry) -> tuple[int, ...]:
    """Return `(batch, positions)` of the mapped locations, `(batch,)` where there are no positions.

    Raises:
        DistillError: the locations of teacher and student differ in it.
    """
    grids = [
        grid_of(run, place)
        for run, places in ((step.taught, entry.teacher), (step.student, entry.student))
        for place in places
    ]
    if len(set(grids)) > 1:
        raise DistillError(
            f"the locations of {entry} have different positions: [batch, position] = {grids[0]} and "
            f"{next(grid for grid in grids if grid != grids[0])}; map places of the same grid, or use models of one "
            "tokenizer."
        )
    return grids[0]


def _besides_blocks(mapping: Sequence[Entry], side: str) -> list[Location]:
    """Return the mapped locations of one side that are not block outputs, with all heads and dims."""
    places = [place.whole for entry in mapping for place in getattr(entry, side)]
    return [place for place in places if place.module is not None or place.site != "block_output"]
