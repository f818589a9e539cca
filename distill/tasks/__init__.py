from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from distill.data import files
from distill.data.classes import matched, stated
from distill.data.rows import Rows
from distill.data.task import Recipe, Task, share
from distill.errors import DistillError
from distill.models.numbering import numbered_as, renumbered
from distill.tasks import agreement, pvr, sst2
from distill.tasks.causal.arithmetic import addition
from distill.tasks.causal.equality import hierarchical_equality
from distill.tasks.causal.indirect_object import indirect_object
from distill.tasks.causal.mqnli import multiply_quantified
from distill.tasks.causal.pointers import pointer_values
from distill.tasks.causal.prompts import Prompts
from distill.tasks.causal.trees import boolean_tree
from distill.tasks.causal.verb_number import verb_number
from distill.tasks.digits import digits
from distill.tasks.minimal_pairs import MinimalPairs, minimal_pairs
from distill.tasks.mnist import mnist, mnist_digits

__all__ = [
    "MinimalPairs",
    "Prompts",
    "Recipe",
    "Rows",
    "Task",
    "addition",
    "boolean_tree",
    "digits",
    "hierarchical_equality",
    "indirect_object",
    "load",
    "minimal_pairs",
    "mnist",
    "mnist_digits",
    "multiply_quantified",
    "names",
    "numbered_as",
    "pointer_values",
    "verb_number",
]

EMBEDDED: dict[str, Callable[[], Task]] = {"pvr": pvr.task, "agreement": agreement.task, "digits": digits}


def names() -> tuple[str, ...]:
    """The tasks that have a name: embedded ones, and those whose data lie in a folder or on the Hugging Face hub."""
    return (*EMBEDDED, "mnist", "sst2")


def load(
    name: str | None = None,
    *,
    data: str | Path | None = None,
    eval_data: str | Path | None = None,
    tokenizer: Any = None,
    fraction: float = 1.0,
    seed: int = 0,
    text: str | None = None,
    label: str | None = None,
    classes: Sequence[str] | None = None,
    max_length: int | None = None,
    split_seed: int = 0,
) -> Task:
    """A task by name, or from a file of one's own.

    `load("pvr")`, `load("mnist", data=FOLDER)`, `load("sst2", data=FOLDER, tokenizer=...)`,
    `load(data="my.csv", tokenizer=...)`.

    `fraction` keeps a random share of the training rows, drawn by `seed`; the test rows stay. `text` and `label` name
    the columns of a file, `eval_data` its test file; without one a fifth is held out, drawn by `split_seed` whatever
    `seed` is, so that runs of other seeds are measured on the same rows. Text needs the teacher's `tokenizer`; that of
    a file is cut at `max_length` tokens, 128 by default, and that is said.

    `classes` states the labels of the data in the order of the model's outputs. Left out, `fit` and the measurements
    match them with the names that a model gives to its classes (`config.id2label`).

    Raises DistillError for an unknown name, settings that the task does not take, and data that cannot be used.
    """
    share(1, fraction, seed)  # raises before anything is read
    if name is None and data is not None:
        return files.task(
            data, tokenizer, eval_data=eval_data, fraction=fraction, seed=seed, text=text, label=label, classes=classes,
            max_length=max_length,
            split_seed=split_seed,
        )  # fmt: skip
    if name is None:
        raise DistillError(
            f"no task was named and no data given; use load(name) with one of {', '.join(names())}, or load(data=FILE)"
        )
    if name not in names():
        raise DistillError(_unknown(name))
    file = {"data": data} if name in EMBEDDED else {}
    _refuse(name, eval_data=eval_data, text=text, label=label, max_length=max_length, **file)
    if name == "sst2":
        task = sst2.task(data, tokenizer, fraction=fraction, seed=seed)
    else:
        task = mnist_digits(data) if name == "mnist" else EMBEDDED[name]()
        task = replace(task, train=task.train.take(share(len(task.train), fraction, seed)))
    if classes is None:
        return task
    told = stated(classes)
    return renumbered(task, matched(task.classes, told, "the names given"), told)


def _unknown(name: str) -> str:
    if name.removesuffix(".gz").endswith(files.SUFFIXES):
        return f"{name!r} is a file, not the name of a task; give it as data={name!r}, or --data {name}"
    near = get_close_matches(name, names(), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"there is no task {name!r}; {hint}tasks are {', '.join(names())}, and --data FILE takes your own"


def _refuse(name: str, **settings: Any) -> None:
    for setting, value in settings.items():
        if value is not None:
            raise DistillError(
                f"task {name!r} takes no {setting} (got {value!r}); "
                f"leave {setting} out, or leave the name out for a file of your own"
            )
