"""Teachers: fine-tuned on a task, or trained on first use and cached; checked before anything is distilled."""

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_model as load_weights
from torch import nn

from distill.data.seeds import seed_of
from distill.data.task import Task
from distill.errors import DistillError, checked
from distill.evaluation.metrics import accuracy
from distill.fit import fit
from distill.models.class_names import class_names, real_names
from distill.models.pretrained import hide_progress_bars, save_model
from distill.objectives import Labels
from distill.processes import from_first
from distill.results import FitResult
from distill.statistics.intervals import Share
from distill.storage.files import damage
from distill.storage.locks import LOCK, held
from distill.training.fingerprints import versions
from distill.training.run_folder import Interrupted, Resume
from distill.training.schedule import Schedule


def cache_folder() -> Path:
    """Return the folder of teachers that were trained on first use: `DISTILL_CACHE`, or one in the home directory.

    That is `~/.cache/causal-distillation`.

    Raises:
        DistillError: there is no home directory, and `DISTILL_CACHE` is not set.
    """
    if "DISTILL_CACHE" in os.environ:
        return Path(os.environ["DISTILL_CACHE"])
    try:
        return Path.home() / ".cache" / "causal-distillation"
    except RuntimeError:
        raise DistillError(
            "teachers are kept in the home directory and there is none; say where: DISTILL_CACHE=/path/of/a/folder."
        ) from None


@checked
def teach(
    network: nn.Module,
    task: Task,
    *,
    schedule: Schedule | None = None,
    seed: int = 0,
    output_dir: Path | str | None = None,
    resume: Resume = False,
    console: Console | None = None,
    answers: Any = None,
) -> FitResult:
    """Train `network` in place on the labels of a task, by the recipe of the task unless a schedule is given.

    Args:
        network: any torch model with the classes of the task.
        task: its training rows, and held-out rows to measure on.
        schedule: of the training.
        seed: of the training, where no schedule is given.
        output_dir, resume, console, answers: as for `fit`.
    """
    return fit(
        None,
        network,
        data=task,
        objective=Labels(),
        schedule=schedule or Schedule.of(task.recipe, seed),
        output_dir=output_dir,
        resume=resume,
        console=console,
        title="teacher",
        answers=answers,
    )


@checked
def teacher_of(task: Task, *, seed: Any = 0, console: Console | None = None) -> nn.Module:
    """Return the teacher network of an embedded task: from the cache, or trained now and put there.

    The cache is keyed by the task's name, network, recipe and seed, and the versions of torch and of this package. Two
    processes that need the same teacher train it once: the second waits. A damaged one is trained again.

    Args:
        task: an embedded task, whose network is trained on its labels.
        seed: of the weights and the training.
        console: shows the progress, and which process is waited for.

    Raises:
        DistillError: a task that has no network of its own.
    """
    if task.network is None:
        raise DistillError(
            f"task {task.name!r} has no teacher of its own; give a classifier trained on it (--teacher "
            "NAME_OR_FOLDER), or make one: "
            f"distill teach --task {task.name} --from ENCODER --output DIR."
        )
    seed = seed_of(seed)
    network: Any = task.network(seed)
    cache = cache_folder()
    folder = cache / f"{task.name}-{seed}-{_key(task, network, seed)}"
    if from_first(lambda: _is_whole(network, folder)):
        return _load(network, folder).eval()
    _make_cache(cache)
    # Several processes of one run train it together.
    with held(cache, name=f".{folder.name}{LOCK}", waiting=partial(_print_waiting, console, task)):
        # Another run may have trained it, or begun to, since the first look.
        whole, begun = from_first(lambda: (_is_whole(network, folder), _training_folder(folder).exists()))
        if not whole:
            _train_into(folder, network, task, seed, console, begun=begun)
        return _load(network, folder).eval()


def check_teacher(teacher: nn.Module, task: Task) -> Share | None:
    """Measure the accuracy of a teacher on the held-out rows; return None where they have no labels.

    Raises:
        DistillError: it is no better than always answering the most common class.
    """
    if task.majority is None:
        return None
    measured = accuracy(teacher, task.test)
    if measured.value <= task.majority:
        unnamed = class_names(teacher) is not None and real_names(teacher) is None
        order = f"; or say in which order its classes are: --classes {','.join(task.classes)}" if unnamed else ""
        raise DistillError(
            f"the teacher is right on {measured.value:.3f} of the held-out rows, and always answering the most "
            "common class on "
            f"{task.majority:.3f}: there is nothing to learn from it; train it (distill teach), or pass "
            f"--any-teacher{order}."
        )
    return measured


def _make_cache(cache: Path) -> None:
    """Make the folder of the cache, or raise DistillError."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DistillError(
            f"teachers cannot be kept in {cache} ({error.strerror}); say where: DISTILL_CACHE=/path/of/a/folder."
        ) from None


def _training_folder(folder: Path) -> Path:
    """Return the folder of the training of a teacher that is to be saved in `folder`."""
    return folder.with_name(f"{folder.name}.training")


def _train_into(
    folder: Path, network: nn.Module, task: Task, seed: int, console: Console | None, *, begun: bool
) -> None:
    """Train a network and save it in `folder`; resume a training that was stopped."""
    training = _training_folder(folder)
    try:
        teach(network, task, seed=seed, output_dir=training, resume=begun, console=console)
    except Interrupted as stop:
        raise Interrupted(f"the teacher {str(stop).split('; go on')[0]}; go on with the same command.") from None
    except DistillError as error:
        if not begun:
            raise
        warnings.warn(f"{error} The teacher is trained anew.", stacklevel=3)
        from_first(lambda: shutil.rmtree(training))
        new = task.network(seed) if task.network else network
        return _train_into(folder, new, task, seed, console, begun=False)

    def save() -> None:
        save_model(network, folder)
        shutil.rmtree(training)

    from_first(save)


def _is_whole(network: Any, folder: Path) -> bool:
    """Return whether a network was saved in a folder and is there as it was written; warn of a damaged one."""
    if not _saved_file(network, folder).exists():
        return False
    found = damage(folder)
    if found is not None:
        warnings.warn(f"{found}; the teacher is trained again.", stacklevel=3)
    return found is None


def _print_waiting(console: Console | None, task: Task, holder: str) -> None:
    """Print which process is waited for."""
    (console or Console()).print(
        f"teacher of {task.name}: waiting for {holder}, which trains it", markup=False, highlight=False
    )


def _saved_file(network: Any, folder: Path) -> Path:
    """Return the file that `save_model` writes into `folder` for a network."""
    return folder / ("config.json" if hasattr(network, "save_pretrained") else "model.safetensors")


def _load(network: Any, folder: Path) -> nn.Module:
    """Return the network that was saved in `folder`; load weights in place for one that is not of transformers."""
    if hasattr(network, "save_pretrained"):
        with hide_progress_bars():
            return type(network).from_pretrained(folder)
    load_weights(network.cpu(), _saved_file(network, folder), strict=True)
    return network


def _key(task: Task, network: Any, seed: int) -> str:
    """Return the key of a teacher in the cache."""
    config = network.config.to_dict() if hasattr(network, "config") else str(network)
    facts = [task.name, asdict(task.recipe), config, seed, torch.__version__, versions().get("causal-distillation")]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]
