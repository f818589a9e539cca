"""Teacher assistants: distillation in several steps, in which each student is the teacher of the next.

Of networks N_0, …, N_k, step i trains N_i as the student of N_(i−1), by the objectives of `fit`. Assistants of sizes
between those of teacher and student make the gap of each step smaller.

Mirzadeh et al. 2019 (arXiv:1902.03393), section 3.
"""

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from distill.errors import DistillError, checked
from distill.fit import fit
from distill.interchange.mapping import Sides
from distill.models.inputs import uncompiled
from distill.models.preprocessors import given_preprocessors, preprocessors_for, tokenizer_among
from distill.objectives import Objective
from distill.results import FitResult
from distill.tasks.loading import as_read, task_of
from distill.teachers.without_adapters import refuse_shared
from distill.training.run_folder import Resume
from distill.training.schedule import Schedule
from interventions import renamed


@renamed("data", "mapping")
@checked
def chain(
    networks: Sequence[Any],
    *,
    mapping: Sides | str | Sequence[Sides | str | None] | None = None,
    data: Any = None,
    objective: Objective | Sequence[Objective] | None = None,
    schedule: Schedule | Sequence[Schedule] | None = None,
    output_dir: str | Path | None = None,
    resume: Resume = False,
    answers: Any = None,
    **settings: Any,
) -> tuple[FitResult, ...]:
    """Distil a teacher into an assistant, that into the next, and the last into the student, each in place.

    `chain([teacher, student], data=data)` is `fit(teacher, student, data=data)`, bit for bit.

    Mirzadeh et al. 2019 (teacher assistants, arXiv:1902.03393), section 3; with several assistants section 4.3.

    Args:
        networks: from the teacher to the student; each step leaves its teacher as it was.
        mapping: as `fit` takes it; a list has one for each step.
        data: as `fit` takes it.
        objective: as `fit` takes it; every step has a copy of its own.
        schedule: as `fit` takes it; a list has one for each step.
        output_dir: a new folder, with one in it for each step: `1`, `2`, …
        resume: resume a chain that was stopped, as `fit` does. A step that was finished is resumed from its newest
            checkpoint too; the results are those of an uninterrupted chain.
        answers: which part of the output of a network is its answer, as `fit` takes it; a list has one for each
            network.
        settings: the others of `fit`, the same in every step; a `cache` has a folder in it for each step: `1`, `2`, …

    Returns:
        The result of each step.

    Raises:
        DistillError: fewer than two networks, one twice, or a list of another length; and as `fit`.
    """
    _check(networks)
    count = len(networks) - 1
    networks = [uncompiled(each) for each in networks]
    refuse_shared(networks, "chain", but=(0, 1))  # `fit` lets a student be its teacher with adapters
    rules = _one_per_network(answers, len(networks))
    mappings = _one_per_step(mapping, count, "mapping")
    schedules = _one_per_step(schedule, count, "schedule")
    if resume and output_dir is None:
        raise DistillError("resume=True needs the folder to go on from; pass output_dir='runs/…'.")
    tokenizer = settings.pop("tokenizer", None)
    reads = tokenizer_among(given_preprocessors(tokenizer))
    task = None if data is None else task_of(data, networks[0], reads)  # read once, with the tokenizer of the teacher
    read = as_read(data, networks[0], reads) if task is None else task
    results = []
    for number, (teacher, student) in enumerate(pairwise(networks)):
        folder = None if output_dir is None else Path(output_dir) / str(number + 1)
        result = fit(
            teacher,
            student,
            mappings[number],
            read,
            objective=copy.deepcopy(objective),
            schedule=schedules[number],
            output_dir=folder,
            resume=resume if folder is not None and folder.exists() else False,
            answers=None if answers is None else (rules[number], rules[number + 1]),
            tokenizer=preprocessors_for(tokenizer, task, networks[0], student) or None,
            **{"title": f"step {number + 1} of {count}", **settings, **_cache_of(settings, number)},
        )
        results.append(result)
    return tuple(results)


def _cache_of(settings: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return the folder of the answers of the teacher of a step, which is another one in each."""
    cache = settings.get("cache")
    return {} if cache is None else {"cache": Path(cache) / str(number + 1)}


def _check(networks: Sequence[Any]) -> None:
    """Raise DistillError for fewer than two networks, one that is none, or one twice."""
    wrong = next((each for each in networks if not isinstance(each, nn.Module)), None)
    if wrong is not None:
        raise DistillError(
            f"chain was given {type(wrong).__name__}, which is no network; give torch modules. A causal model is the "
            "teacher of fit."
        )
    if len(networks) < 2:
        raise DistillError(
            f"chain has {len(networks)} network{'s' * (len(networks) != 1)}; give a teacher and a student at least, "
            "chain([teacher, assistant, student], data=data)."
        )
    if len({id(each) for each in networks}) < len(networks):
        raise DistillError(
            "chain has one network twice, which would teach itself; make another, e.g. copy.deepcopy(network)."
        )


def _one_per_step(values: Any, count: int, name: str) -> list[Any]:
    """Return a value for each step: those of a list, or one value for all.

    Raises:
        DistillError: a list of another length.
    """
    if not isinstance(values, list | tuple):
        return [values] * count
    if len(values) != count:
        raise DistillError(
            f"{name} is a list of {len(values)} and the chain has {count} step{'s' * (count != 1)}; give one for each, "
            "or one for all."
        )
    return list(values)


def _one_per_network(answers: Any, count: int) -> list[Any]:
    """Return the rule of answers of each network: those of a list, or one rule for all.

    Raises:
        DistillError: a list of another length.
    """
    if not isinstance(answers, list | tuple):
        return [answers] * count
    if len(answers) != count:
        raise DistillError(
            f"answers has {len(answers)} rules and the chain {count} networks; give one for each, or one for all: "
            "answers='logits'."
        )
    return list(answers)
