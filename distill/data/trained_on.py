"""Rows that a saved network was trained on, and the seed of the split that they come from, kept beside it."""

from dataclasses import replace
from pathlib import Path

from distill.data.rows import Rows
from distill.data.seen_rows import SeenRows
from distill.data.task import Task
from distill.errors import DistillError
from distill.storage.files import read_json, write_json

SPLIT = "split.json"


def save_split(folder: Path, split_seed: int) -> None:
    """Keep the seed by which rows were held out of what a network was trained on."""
    write_json(folder / SPLIT, {"split_seed": split_seed})


def split_seed_of(folder: Path) -> int | None:
    """The seed of the split of the data that a network in a folder was trained on; None where it is not known."""
    path = folder / SPLIT
    if not path.is_file():
        return None
    told = read_json(path, f"say it: --split-seed N, and delete {path}").get("split_seed")
    if isinstance(told, bool) or not isinstance(told, int):
        raise DistillError(f"{path} names no seed but {told!r}; say it: --split-seed N, and delete {path}.")
    return told


def without_trained_on(task: Task, folder: Path, whose: str) -> tuple[Task, str]:
    """A task without the held-out rows that a network in a folder was trained on, and a line that says how many.

    Args:
        task: its test rows are looked at.
        folder: where the network is saved; one that does not say what it was trained on leaves all.
        whose: for the line.

    Raises:
        DistillError: none is left.
    """
    seen = SeenRows.load(folder)
    if seen is None or seen.marks is None or not set(seen.marks) & set(task.test.columns):
        return task, ""
    known = seen.among(task.test.table)
    count = int(known.sum())
    if not count:
        return task, ""
    if count == len(task.test):
        raise DistillError(
            f"{whose} was trained on all {count} held-out rows of {task.name}, so nothing can be measured on them; "
            "give others: --eval-data FILE."
        )
    kept: Rows = task.test.take((~known).nonzero()[:, 0])
    return replace(task, test=kept), (
        f"{count} of {len(task.test)} held-out rows are left out, as {whose} was trained on them"
    )
