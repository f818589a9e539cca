"""Headroom: what the causal term of a distillation could add, measured before hours are spent on it.

A student that has learned from its teacher's answers is run with and without interchanges. The two losses, their ratio,
and the angle between their gradients say whether the causal term asks for something that the base loss does not,

    ratio = L_cf / L,    cosine = ⟨∇L_cf, ∇L⟩ / (‖∇L_cf‖ ‖∇L‖),

both by the student's parameters, on the same rows. A loss many times that of the base with a gradient across its own is
another constraint; a gradient in the same direction is the base loss again, on changed inputs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from distill.causal.model import CausalModel
from distill.data.rows import Rows
from distill.data.seeds import seed_from, seed_of
from distill.errors import DistillError, checked, refuse_negative
from distill.evaluation.kind_measurement import KindMeasurement
from distill.fit import choose_schedule, read_task
from distill.interchange.mapping import Entry, Sides, entries_of, names_of
from distill.models.finite import check_answers
from distill.models.inputs import device_of, evaluating, to_device, vocabulary_of
from distill.models.outputs import answered, same_answers
from distill.models.trials import translated
from distill.objectives import Moment, Objective
from distill.objectives.objective import terms_of
from distill.objectives.step import Step
from distill.prospects.causal_terms import Causal, causal_terms, terms_beside
from distill.prospects.figures import EntryHeadroom, Headroom, Spread
from distill.prospects.gradients import Gradient, cosine, gradient_of, length
from distill.prospects.void_rows import FEW, counted_in, effects, moved, sides_of, void_rows, wholes_of
from distill.teachers.served import Served
from distill.teachers.without_adapters import teacher_and_student
from distill.training.computation import Computation, alter_batch, weights_of
from distill.training.loop import train
from distill.training.resolve import objectives_of, training_of
from distill.training.schedule import Schedule, drawing, weigh
from interventions import Model

LATE = Moment(epoch=1.0)
"""The point of a training at which objectives that warm up are measured: after one epoch of one."""


@checked
def headroom(
    teacher: Model | Served | CausalModel,
    student: nn.Module,
    data: Any,
    mapping: Sides | tuple[Entry, ...] | str = "full",
    *,
    objective: Objective | Sequence[Objective] | None = None,
    kinds: Any = None,
    steps: int = 200,
    batches: int = 8,
    batch_size: int | None = None,
    schedule: Schedule | None = None,
    tolerance: float = 0.01,
    seed: Any = 0,
    answers: Any = None,
) -> Headroom:
    """Measure what the causal term of a distillation could add to its base loss, for each entry of a mapping.

    A copy of the student is first trained by the base loss alone for `steps` steps, as all losses of a new student
    point one way. Then, with dropout off, both losses and both gradients by its parameters are taken on `batches`
    batches of the training rows. The student itself stays as it is, bit for bit.

    That a large ratio and a small cosine foretell a gain by interchange is a hypothesis, from two tasks: after 250
    steps on `pvr` the ratio was 34 and the cosine −.01, and interchange made students compute more like their teacher;
    on sentiment 5 and +.41, and it did not. A small cosine alone says little, as the gradients of one loss on two
    batches may be as far apart: `Headroom.across` is that cosine.

    Args:
        teacher: a network, here or served. A causal model is none: it has no run to compare without interchange.
        student: the network to be trained; it is copied.
        data: as for `fit`; of a task its training rows.
        mapping: as for `fit`.
        objective: as for `fit`, `[KD(), DIITO()]` by default. Each `DIITO` is measured: its counterfactual loss against
            the same comparison, its `match`, of the base runs. The others train the copy, or the `match` of the first
            `DIITO` if there are none. Objectives with weights of their own are measured with new ones.
        kinds: other kinds of interchange to measure beside those of the `DIITO`, with the `match` of the first, as for
            `interchange_accuracy`: `"usual"`, or `{name: Kind(…)}`.
        steps: how many steps the copy is trained for; 0 measures the student as it is.
        batches: how many batches are measured on.
        batch_size: rows of a batch, in training too; that of the schedule by default.
        schedule: of the training; by default that of the task, as for `fit`.
        tolerance: an interchange that moves no logit of the teacher by as much is nearly void.
        seed: of the training, the rows and the draws of interchanges.
        answers: as for `fit`.

    Raises:
        DistillError: a causal model as teacher, no objective that interchanges, fewer rows than one batch of two, or a
            loss that is not finite.

    Wu et al. 2021 (arXiv:2112.02505), section 3, for the loss whose headroom it is.
    """
    if isinstance(teacher, CausalModel):
        raise DistillError(
            "headroom compares a loss with and without interchange, and a causal model is taught from by IIT(), which "
            "has no such pair; see how often its interchanges change the answer: "
            "interchange_accuracy(model, network, mapping).overall.effect_rate."
        )
    _check_counts(steps, batches, tolerance)
    teacher, student = teacher_and_student(teacher, student)
    copied = deepcopy(student)
    with answered((teacher, student), answers), translated(), torch.inference_mode(False), torch.enable_grad():
        task = read_task(teacher, student, data, None)
        given = data if task is None else task
        overrides = {
            "epochs": None,
            "lr": None,
            "steps": steps or None,
            "batch_size": batch_size,
            "seed": seed_of(seed),
        }
        schedule = choose_schedule(schedule, overrides, teacher, given)
        trained = [deepcopy(each) for each in objectives_of(objective, teacher)]
        entries = entries_of(mapping, teacher, student)
        causal = causal_terms(trained, entries, teacher, student)
        plain = [each for each in trained if not each.interchanges] or list(causal[0].diito.match)
        with same_answers(copied, student):
            training = training_of(teacher, copied, entries, given, objective=plain, weights=None, schedule=schedule)
            for _ in train(training) if steps else ():
                pass
            assert isinstance(training.rows, Rows)
            size, plain = schedule.batch_size, list(training.computation.objectives)
            places = KindMeasurement(teacher, copied, entries, training.rows, FEW, schedule.seed, size)
            others, missing = terms_beside(causal[0], kinds, places)
            measured = Measured(teacher, copied, training.rows, [*causal, *others], plain, schedule, tolerance)
            found = measured.headroom(batches, steps)
    return replace(found, settings={**found.settings, "missing": missing}) if missing else found


@dataclass(frozen=True, eq=False)
class Losses:
    """The losses and gradients of one entry on one batch, and which of its rows are void.

    Attributes:
        losses: of base and counterfactual runs.
        norms: the lengths of their gradients.
        cosine: of the angle between them; NaN where one is 0.
        rows, void, near: how many rows there are, and how many of them are void or nearly void.
        predictions, effects: how many predictions count, and how many of the teacher's the interchange changes.
    """

    losses: tuple[float, float]
    norms: tuple[float, float]
    cosine: float
    rows: int
    void: int
    near: int
    predictions: int
    effects: int | None


@dataclass(frozen=True, eq=False)
class Measured:
    """The models, the rows and the losses of a measurement.

    Attributes:
        teacher, student: the networks; the student is a copy.
        rows: those that are measured on.
        causal: the causal terms.
        plain: the objectives that the student was trained by.
        schedule: decides the rows of a batch, and the seed.
        tolerance: an interchange that moves no logit by as much is nearly void.
    """

    teacher: Any
    student: nn.Module
    rows: Rows
    causal: Sequence[Causal]
    plain: Sequence[Objective]
    schedule: Schedule
    tolerance: float
    found: dict[tuple[str, int], list[Losses]] = field(default_factory=dict)
    across: dict[str, list[float]] = field(default_factory=dict)

    def headroom(self, batches: int, steps: int) -> Headroom:
        """Measure on this many batches, and return the figures."""
        chosen = self._chosen(batches)
        with ExitStack() as modes:
            for model in (self.teacher, self.student):
                modes.enter_context(evaluating(model))
            modes.enter_context(
                torch.backends.cudnn.flags(enabled=False)
            )  # its recurrent nets learn in train mode only
            for causal in self.causal:
                self._measure(causal, chosen)
        size = self.schedule.batch_size
        settings = {
            "batches": len(chosen), "batch_size": min(size, len(self.rows)), "tolerance": self.tolerance,
            "seed": self.schedule.seed,
        }  # fmt: skip
        names = dict.fromkeys(name for causal in self.causal for name in causal.compared)
        return Headroom(
            tuple(self._figures()), {name: Spread.of(each) for name, each in self.across.items()},
            " + ".join(name.removesuffix("_cf") for name in names), " + ".join(map(repr, self.plain)), steps, settings,
        )  # fmt: skip

    def _chosen(self, batches: int) -> list[Tensor]:
        """Return the numbers of the rows of each batch: no row twice, in an order that the seed decides."""
        size, count = self.schedule.batch_size, len(self.rows)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed_from(self.schedule.seed, 1)))
        whole = max(1, min(batches, count // size))
        if min(size, count) < 2:
            raise DistillError(
                f"headroom pairs the rows of a batch, and {min(size, count)} of {count} makes none; use batch_size=32 "
                "and more rows."
            )
        return list(order[: whole * size].split(size))

    def _measure(self, causal: Causal, chosen: Sequence[Tensor]) -> None:
        """Measure one causal term on all batches."""
        entries, diito = causal.entries, causal.diito
        computation = Computation(self.teacher, self.student, entries, [*self.plain, diito])
        device, seed, before = device_of(self.student), self.schedule.seed, None
        wholes = None
        self.across[causal.name] = []
        for number, numbers in enumerate([chosen[0][:2], *chosen], -1):
            batch: Mapping[str, Tensor] = to_device(self.rows.batch(numbers), device)
            moment = replace(LATE, rows=numbers.to(device))
            with drawing(seed_from(seed, 2), number, device) as generator:
                batch = alter_batch(computation.objectives, batch, generator)
                if number < 0:  # two rows, by which the objectives prepare
                    computation.prepare(batch, generator, self.rows, moment)
                    computation.objectives.to(device)
                    continue
                step = computation.step(batch, generator, moment)
                if wholes is None:
                    wholes = wholes_of(step, diito, entries, vocabulary_of(self.student))
                gradient = self._measure_batch(step, causal, wholes, entries)
            if before is not None:
                self.across[causal.name].append(cosine(gradient, before))
            before = gradient

    def _measure_batch(self, step: Step, causal: Causal, wholes: Any, entries: tuple[Entry, ...]) -> Gradient:
        """Measure all entries on one batch, and return the gradient of the base loss."""
        diito, parameters = causal.diito, [each for each in self.student.parameters() if each.requires_grad]
        counted, sides = counted_in(step), sides_of(step, entries, wholes)
        for name, each in (("teacher", step.taught), ("student", step.student)):
            check_answers(each.logits[counted], f"the headroom of the {name}")
        base = weigh(terms_of(diito.match, step), None, default=weights_of(diito.match))
        gradient = gradient_of(base, parameters)
        for number, entry in enumerate(entries):
            runs = list(diito.counterfactuals(step, entry))
            loss = weigh(diito.compare(step, runs), None, default=diito.weights)
            changed = gradient_of(loss, parameters)
            void = torch.cat([void_rows(sides, each, counted).cpu() for each in runs])
            near = torch.cat([moved(each, step.taught, counted).cpu() < self.tolerance for each in runs])
            effect = [effects(each, step.taught, counted) for each in runs]
            self.found.setdefault((causal.name, number), []).append(
                Losses(
                    losses=(_value(base, entry), _value(loss, entry)),
                    norms=(length(gradient), length(changed)),
                    cosine=cosine(gradient, changed),
                    rows=len(void),
                    void=int(void.sum()),
                    near=int((near & ~void).sum()),
                    predictions=len(runs) * int(counted.sum()),
                    effects=None if None in effect else sum(each or 0 for each in effect),
                )
            )
        return gradient

    def _figures(self) -> Iterator[EntryHeadroom]:
        """Yield the figures of every kind and entry."""
        for causal in self.causal:
            for number, name in enumerate(names_of(causal.entries)):
                yield _summed(causal.name, name, self.found[causal.name, number])


def _summed(kind: str, entry: str, found: Sequence[Losses]) -> EntryHeadroom:
    """Return the figures of an entry over all batches."""
    rows, predictions = sum(each.rows for each in found), sum(each.predictions for each in found)
    effect = None
    if all(each.effects is not None for each in found) and predictions:
        effect = sum(each.effects or 0 for each in found) / predictions
    base, changed = ([each.losses[side] for each in found] for side in (0, 1))
    norms = [sum(each.norms[side] for each in found) / len(found) for side in (0, 1)]
    return EntryHeadroom(
        kind, entry, effect, sum(each.void for each in found) / rows, sum(each.near for each in found) / rows,
        sum(base) / len(base), sum(changed) / len(changed), Spread.of_ratio(changed, base), norms[0], norms[1],
        Spread.of([each.cosine for each in found]), rows,
    )  # fmt: skip


def _check_counts(steps: int, batches: int, tolerance: float) -> None:
    """Raise DistillError for numbers of steps or batches that are none, or a tolerance below 0."""
    if steps < 0 or batches < 1:
        raise DistillError(
            f"headroom(steps={steps}, batches={batches}) measures nothing; use 0 steps or more, and 1 batch or more: "
            "headroom(…, steps=200, batches=8)."
        )
    refuse_negative("headroom", tolerance=tolerance)


def _value(loss: Tensor, entry: Entry) -> float:
    """Return a loss as a number.

    Raises:
        DistillError: it is not finite.
    """
    value = float(loss.detach())
    if not isfinite(value):
        raise DistillError(
            f"a loss of {entry} is {value}, so there is no gradient to compare; see whether the weights are finite: "
            "[name for name, each in student.named_parameters() if not each.isfinite().all()]."
        )
    return value
