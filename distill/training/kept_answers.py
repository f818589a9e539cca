"""The teacher of a training whose answers are kept in a folder."""

from pathlib import Path
from typing import Any

from distill.data.task import Task
from distill.models.outputs import answers_of_teacher
from distill.teachers.served import Served
from distill.teachers.uncacheable import refuse_uncacheable
from distill.training.checks import softened_by
from distill.training.resolve import objectives_of


def keeping(
    teacher: Any,
    cache: Path | str | None,
    top_k: int | None,
    data: Any,
    task: Task | None,
    *,
    objective: Any,
    mapping: Any,
    answers: Any,
) -> Any:
    """Return the teacher that a student learns from: with a cache one whose answers are kept, else the teacher.

    Args:
        teacher, cache, top_k, data, objective, mapping, answers: as `fit` takes them.
        task: that of the data, if it is one; its tokenizer is known to the folder.

    Raises:
        DistillError: a teacher or data whose answers cannot be kept, or `top_k` without a cache.
    """
    if cache is None and top_k is None:
        return teacher
    refuse_uncacheable(teacher, cache, top_k, data)
    return Served(
        teacher, cache=cache, top_k=top_k, answers=answers_of_teacher(teacher, answers),
        temperature=softened_by(objectives_of(objective, teacher, mapping)),
        tokenizer=None if task is None else task.tokenizer,
    )  # fmt: skip
