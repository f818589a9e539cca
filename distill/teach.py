"""Teachers: loaded, fine-tuned, or trained on first use and cached; checked before anything is distilled."""

import hashlib
import json
import os
import shutil
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console
from safetensors.torch import load_model as load_weights
from torch import nn

from distill.data.seeds import seed_of
from distill.data.task import Task
from distill.errors import DistillError, checked
from distill.evaluation.intervals import Share
from distill.evaluation.metrics import accuracy
from distill.fit import fit
from distill.models.class_names import class_names, real_names
from distill.models.pretrained import hide_progress_bars, save_model
from distill.objectives import Labels
from distill.objectives.processes import process_state
from distill.results import FitResult
from distill.storage.files import damage
from distill.storage.locks import LOCK, locked
from distill.training.fingerprints import versions
from distill.training.run_folder import Interrupted, Resume
from distill.training.schedule import Schedule


def cache_folder() -> Path:
    """Where teachers that were trained on first use are kept: `DISTILL_CACHE`, else `~/.cache/causal-distillation`.

    Raises:
        DistillError: there is no home directory, and nobody said where else.
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

    `answers` says what of its output is its answer, as for `fit`.
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
    """The teacher network of an embedded task: from the cache, or trained now and put there.

    The cache is keyed by the task's name, network, recipe and seed, and the versions of torch and of this package. Two
    processes that ask for the same teacher train it once: the second waits. One that is damaged is trained again.

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
    if _is_whole(network, folder):
        return _loaded(network, folder).eval()
    state, name = process_state(), f".{folder.name}{LOCK}"
    _made(cache)
    # Several processes of one run train it together: the first holds the lock for all, and says what is there.
    waiting = locked(cache, name=name, waiting=partial(_say_waiting, console, task))
    with waiting if state.is_main_process else nullcontext():
        there = [_is_whole(network, folder), _training(folder).exists()]  # somebody may have made it meanwhile
        whole, begun = broadcast_object_list(there) if state.num_processes > 1 else there
        if not whole:
            _train_into(folder, network, task, seed, console, begun=begun)
        state.wait_for_everyone()
        return _loaded(network, folder).eval()


def check_teacher(teacher: nn.Module, task: Task) -> Share | None:
    """The accuracy of a teacher on the held-out rows; None where they have no labels.

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


def _made(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DistillError(
            f"teachers cannot be kept in {cache} ({error.strerror}); say where: DISTILL_CACHE=/path/of/a/folder."
        ) from None


def _training(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.training")


def _train_into(
    folder: Path, network: nn.Module, task: Task, seed: int, console: Console | None, *, begun: bool
) -> None:
    """Train and save a network in `folder`; one that was begun goes on where it stopped."""
    training, state = _training(folder), process_state()
    try:
        teach(network, task, seed=seed, output_dir=training, resume=begun, console=console)
    except Interrupted as stop:
        raise Interrupted(f"the teacher {str(stop).split('; go on')[0]}; go on with the same command.") from None
    except DistillError as error:
        if not begun:
            raise
        warnings.warn(f"{error} The teacher is trained anew.", stacklevel=3)
        state.wait_for_everyone()
        if state.is_main_process:
            shutil.rmtree(training)
        state.wait_for_everyone()
        made = task.network(seed) if task.network else network
        return _train_into(folder, made, task, seed, console, begun=False)
    if state.is_main_process:
        save_model(network, folder)
        shutil.rmtree(training)


def _is_whole(network: Any, folder: Path) -> bool:
    """Whether a network was saved in a folder and is there as it was written; of one that is not, it is said."""
    if not _saved(network, folder).exists():
        return False
    found = damage(folder)
    if found is not None:
        warnings.warn(f"{found}; the teacher is trained again.", stacklevel=3)
    return found is None


def _say_waiting(console: Console | None, task: Task, holder: str) -> None:
    (console or Console()).print(
        f"teacher of {task.name}: waiting for {holder}, which trains it", markup=False, highlight=False
    )


def _saved(network: Any, folder: Path) -> Path:
    """The file that shows that a network was saved in `folder` by `save_model`."""
    return folder / ("config.json" if hasattr(network, "save_pretrained") else "model.safetensors")


def _loaded(network: Any, folder: Path) -> nn.Module:
    """The network that was saved in `folder`; one that is not from transformers gets its weights back in place."""
    if hasattr(network, "save_pretrained"):
        with hide_progress_bars():
            return type(network).from_pretrained(folder)
    load_weights(network.cpu(), _saved(network, folder), strict=True)
    return network


def _key(task: Task, network: Any, seed: int) -> str:
    config = network.config.to_dict() if hasattr(network, "config") else str(network)
    facts = [task.name, asdict(task.recipe), config, seed, torch.__version__, versions().get("causal-distillation")]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]
