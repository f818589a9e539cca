"""What a training is given, in its checked form: rows, objectives, pairs; and that they belong together."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import nn

from distill.causal.feed import SAMPLED_STEPS, Feed, Given, Samples, given
from distill.causal.model import CausalModel
from distill.data.rows import Rows
from distill.data.seen_rows import SeenRows
from distill.errors import DistillError
from distill.interchange.mapping import Pair, Sides, pairs_of
from distill.models.inputs import NEVER, device_of, inputs_of, students, to_device
from distill.objectives import DIITO, IIT, KD, MaskedLM, Objective
from distill.tasks.loading import training_rows
from distill.teachers.served import Served
from distill.training.checks import name_of
from distill.training.schedule import Schedule, order
from interventions import Model


def objectives_of(
    objective: Objective | Sequence[Objective] | None, teacher: Model | Served | CausalModel | None
) -> list[Objective]:
    """The objectives as a list; by default KD and DIITO, for a causal model IIT."""
    if objective is None and isinstance(teacher, CausalModel):
        return [IIT()]
    if objective is None:
        if teacher is None:
            raise DistillError(
                "without a teacher there is nothing to imitate; pass objective=Labels() to train on labels."
            )
        return [KD(), DIITO()]
    chosen = [objective] if isinstance(objective, Objective) else list(objective)
    _refuse_two_masks(chosen)
    wrong = next((each for each in chosen if not isinstance(each, Objective)), None)
    if wrong is not None or not chosen:
        raise DistillError(f"objective={objective!r} is not an objective; use e.g. [KD(temperature=2.0), DIITO()].")
    return chosen


def _refuse_two_masks(objectives: Sequence[Any]) -> None:
    """Refuse objectives that would mask text differently: one mask serves all."""
    found = [part for each in objectives if isinstance(each, Objective) for part in each.modules()]
    masks = {repr(part) for part in found if isinstance(part, MaskedLM) and part.mask_token is not None}
    if len(masks) > 1:
        raise DistillError(
            f"two objectives mask the text in two ways, {' and '.join(sorted(masks))}, and one mask serves both; give "
            "both the same settings."
        )


def supported(objectives: Sequence[Objective], rows: Rows | Feed) -> tuple[list[Objective], tuple[str, ...]]:
    """The objectives that the columns of the data are enough for, and the terms of those that are left out.

    Left out, with a warning, is what needs labels where there are none: a transfer set need not have any.

    Raises:
        DistillError: a column is missing, and it is not that of the labels or nothing else remains.
    """
    if not isinstance(rows, Rows):
        return list(objectives), ()
    lacking = {each: [name for name in each.needs if name not in rows.columns] for each in objectives}
    kept = [each for each in objectives if not lacking[each]]
    for objective, missing in lacking.items():
        if not missing:
            continue
        name = name_of(objective)
        if missing != ["labels"] or not kept:
            raise DistillError(
                f"{name}() needs a column {missing[0]!r} and the data has {', '.join(rows.columns)}; add it, or use "
                "objective=[KD()], which needs the teacher alone."
            )
        warnings.warn(
            f"the data has no labels, so {name}() is left out; what remains: {', '.join(map(name_of, kept))}.",
            stacklevel=2,
        )
    dropped = [each.about.terms for each in objectives if lacking[each] and each.about is not None]
    return kept, tuple(term for terms in dropped for term in terms)


def fed(teacher: Model | Served | CausalModel | None, student: nn.Module, data: Any, schedule: Schedule) -> Rows | Feed:
    """What the steps are given: rows of the data, or what a causal model samples."""
    if isinstance(data, Feed) and not isinstance(data, Rows):
        return data
    if not isinstance(teacher, CausalModel):
        return training_rows(data, student if teacher is None else teacher, schedule.seed, student)
    return feed_of(teacher, data, schedule)


def feed_of(model: CausalModel, data: Any, schedule: Schedule) -> Feed:
    """Rows of data that a causal model takes, or what it samples."""
    if data is not None:
        return given(model, data)
    return Samples(model, schedule.seed, (schedule.steps or SAMPLED_STEPS) * schedule.batch_size)


def mapped(
    teacher: Model | Served | CausalModel | None,
    student: nn.Module,
    mapping: Sides | tuple[Pair, ...] | str | None,
    objectives: Sequence[Objective],
) -> tuple[Pair, ...]:
    """The mapping as checked pairs; by default "full" if an objective interchanges, else empty."""
    if teacher is None or (mapping is None and not any(objective.interchanges for objective in objectives)):
        return ()
    if isinstance(teacher, CausalModel):
        positions = next((each.positions for each in objectives if isinstance(each, IIT)), None)
        return () if mapping in (None, {}, ()) else pairs_of(cast(Sides, mapping), teacher, student, positions)
    if isinstance(mapping, tuple) or mapping == {}:
        return tuple(cast(tuple[Pair, ...], mapping))
    return pairs_of("full" if mapping is None else mapping, teacher, student)


def seen(teacher: Any, student: nn.Module, data: Any, schedule: Schedule, processes: int = 1) -> SeenRows:
    """What `steps` trains on: all rows of data as they are now, or of what a causal model samples the bases drawn."""
    rows = fed(teacher, student, data, schedule)
    if isinstance(rows, Rows):
        return SeenRows.of(rows.table, _read(student, rows))
    if isinstance(rows, Given):
        return SeenRows.of(rows.batch(range(len(rows))))

    def batches() -> Iterator[Mapping[str, Any]]:
        numbers = range(schedule.total(len(rows), processes))
        for process in range(processes):
            for chosen in order(len(rows), schedule, numbers, process, processes):
                yield rows.batch(chosen)

    return SeenRows(batches)


def _read(student: nn.Module, rows: Rows) -> list[str] | None:
    """The columns that the student is called with; None where that is not known."""
    batch = students(rows.batch([0]))
    try:
        given = inputs_of(student, to_device(batch, device_of(student)))
    except DistillError:
        return None
    return list(given) if isinstance(given, Mapping) else [name for name in batch if name not in NEVER]
