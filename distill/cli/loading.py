"""The task and the teacher that a command names, loaded, and checked before anything is trained or measured."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from torch import Tensor, nn

from distill.cli.options.groups import LANGUAGE, DataOptions
from distill.data.task import Task
from distill.data.trained_on import without_trained_on
from distill.errors import DistillError
from distill.models.inputs import vocabulary_of
from distill.models.numbering import numbered_as
from distill.models.pretrained import load_classifier, load_language_model, load_tokenizer
from distill.teach import teacher_of
from distill.training.checks import check


def load_task_and_teacher(
    source: DataOptions,
    teacher: str | None,
    seed: int,
    console: Console,
    check_fits: Callable[[nn.Module, Task], None],
) -> tuple[Task, nn.Module, Any]:
    """Return the task, its teacher, and the tokenizer that both read with, or None.

    Args:
        source: the rows.
        teacher: a classifier, or for texts and chats a language model, by its folder or its name on the hub; None
            trains the network of the task.
        seed: of the rows and of a teacher that is trained.
        console: shows the progress, and notes about the data.
        check_fits: raises DistillError where the command cannot be carried out with a teacher and a task; the teacher
            is not trained yet where the task has one of its own.
    """
    if teacher is None:
        if source.task in ("sst2", *LANGUAGE) or (source.task is None and source.data is not None):
            _refuse_without_teacher(source)
        task = source.load(None, seed)
        if task.network is not None:
            check_fits(task.network(seed), task)
        return task, teacher_of(task, seed=seed, console=console), None
    model = load_language_model(teacher) if source.is_language else load_classifier(teacher)
    tokenizer = None if vocabulary_of(model) is None or source.name == "agreement" else load_tokenizer(teacher)
    with warnings_as_notes(console):
        task = numbered_as(source.split_as(Path(teacher)).load(tokenizer, seed, model), model)
    _refuse_values_of_classes(source, task, model)
    task = drop_trained_on(task, Path(teacher), "the teacher", console)
    check(None, model, task.train)
    check(None, model, task.test)
    check_fits(model, task)
    return task, model, tokenizer


def drop_trained_on(task: Task, folder: Path, owner: str, console: Console) -> Task:
    """Return the task without the held-out rows that a saved network was trained on, and print how many they are."""
    task, note = without_trained_on(task, folder, owner)
    if note:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    return task


@contextmanager
def warnings_as_notes(console: Console) -> Iterator[None]:
    """Print what the packages warn of inside the block as notes, each on one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for message in dict.fromkeys(str(each.message) for each in caught if each.category is UserWarning):
        console.print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)


def _refuse_values_of_classes(source: DataOptions, task: Task, teacher: nn.Module) -> None:
    """Raise DistillError for labels that are real values of rows whose teacher tells classes apart."""
    labels = task.train.table.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim > 1 or not labels.is_floating_point():
        return
    config = getattr(teacher, "config", None)
    classes = getattr(config, "num_labels", 1)
    if classes > 1 and getattr(config, "problem_type", None) != "regression":
        raise DistillError(
            f"{source.data} has real values as labels, as {labels[0].item():.4g}, and the teacher tells {classes} "
            "classes apart; name the column of classes: --label COLUMN, or make a teacher of values: distill teach "
            f"--data {source.data} --from ENCODER."
        )


def _refuse_without_teacher(source: DataOptions) -> NoReturn:
    """Raise DistillError for data that no network is trained for on first use."""
    if source.data is not None and not Path(source.data).exists():
        raise DistillError(f"--data {source.data} does not exist; name a file or folder that does.")
    if source.is_language:
        raise DistillError(
            f"--task {source.task} has no teacher of its own; give a language model: --teacher NAME_OR_FOLDER."
        )
    option = f"--task {source.task}" if source.task else f"--data {source.data}"
    raise DistillError(
        f"{option} has no teacher of its own; give a classifier trained on it (--teacher NAME_OR_FOLDER), or make one: "
        f"distill teach {option} --from ENCODER --output teacher."
    )
