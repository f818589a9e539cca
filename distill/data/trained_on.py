"""The rows that a saved network was trained on, and the seed of their split, in files beside the network."""

from dataclasses import replace
from pathlib import Path

from distill.data.rows import Rows
from distill.data.seen_rows import SeenRows
from distill.data.task import Task
from distill.errors import DistillError
from distill.storage.files import read_json, write_json

SPLIT = "split.json"


def save_split(folder: Path, split_seed: int) -> None:
    """Write the seed of the split into training and test rows to the folder of a network."""
    write_json(folder / SPLIT, {"split_seed": split_seed})


def split_seed_of(folder: Path) -> int | None:
    """Return the seed of the split of the data that a network in a folder was trained on; None if it is unknown.

    Raises:
        DistillError: a damaged file.
    """
    path = folder / SPLIT
    if not path.is_file():
        return None
    seed = read_json(path, f"state it: --split-seed N, and delete {path}").get("split_seed")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise DistillError(f"{path} names no seed but {seed!r}; state it: --split-seed N, and delete {path}.")
    return seed


def without_trained_on(task: Task, folder: Path, whose: str) -> tuple[Task, str]:
    """Return a task without the test rows that a network in a folder was trained on, and a sentence with their number.

    Args:
        task: the task.
        folder: the folder of the network; without a record of its training rows, all test rows stay.
        whose: the name of the network, for the sentence.

    Raises:
        DistillError: no test row is left.
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
