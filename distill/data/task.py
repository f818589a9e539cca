"""Tasks: a data set with what is needed to train a teacher and a student on it."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from html import escape
from math import ceil, inf
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from distill.data.rows import Rows
from distill.data.sources.lazy_columns import CHUNK, parts_of_table
from distill.errors import DistillError, checked
from interventions import printable, printed


@checked
@dataclass(frozen=True)
class Recipe:
    """The settings with which a teacher is trained on a task by AdamW.

    The learning rate rises linearly over the first `warmup` share of the steps, then falls linearly to 0.
    """

    steps: int = 600
    batch_size: int = 32
    lr: float = 5e-5
    warmup: float = 0.06
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        sizes = {"steps": self.steps, "batch_size": self.batch_size}
        small = next((name for name, size in sizes.items() if size < 1), None)
        if small is not None:
            raise DistillError(f"Recipe({small}={sizes[small]}) trains nothing; use {small}=1 or more.")
        if not 0 < self.lr < inf:
            raise DistillError(f"Recipe(lr={self.lr}) is no learning rate; use a finite one above 0, e.g. lr=5e-5.")
        if not (0 <= self.warmup <= 1 and 0 <= self.weight_decay < inf):
            raise DistillError(
                f"Recipe(warmup={self.warmup}, weight_decay={self.weight_decay}) needs a warmup from 0 to 1 and a "
                "finite decay of 0 or more; use e.g. warmup=0.06, weight_decay=0.01."
            )


@checked
@dataclass(frozen=True, eq=False, repr=False)
class Task:
    """A data set with what is needed to train a teacher and a student on it.

    Attributes:
        name: the name on the command line and in reports.
        train, test: the rows to train on and to test on.
        classes: the names of the labels 0, 1, …, which the rows hold too.
        network: `network(seed)` makes the untrained teacher; None if a teacher must be given.
        recipe: the settings by which the teacher is trained.
        student: the settings by which students are distilled, those of the teacher if None.
        description: one sentence for reports.
        show: turns one row into text for `example`.
        tests: more rows to test on, each under the name of what differs in them.
        tokenizer: the tokenizer of the texts, saved beside the networks that are trained on them.
        clusters: what several rows share, as reports name it, e.g. "digit images"; which rows do, their `clusters` say.
            Empty where each row is independent of the others.
    """

    name: str
    train: Rows
    test: Rows
    classes: tuple[str, ...]
    network: Callable[[int], nn.Module] | None = None
    recipe: Recipe = Recipe()
    student: Recipe | None = None
    description: str = ""
    show: Callable[[dict[str, Tensor]], str] | None = None
    tests: Mapping[str, Rows] = field(default_factory=dict)
    tokenizer: Any = None
    clusters: str = ""

    def __post_init__(self) -> None:
        for name in ("train", "test"):
            object.__setattr__(self, name, self._with_classes(getattr(self, name)))
        object.__setattr__(self, "tests", {name: self._with_classes(rows) for name, rows in self.tests.items()})

    def _with_classes(self, rows: Rows) -> Rows:
        """Return the rows with the names of the classes."""
        if rows.classes is not None and rows.classes != self.classes and set(rows.classes) == set(self.classes):
            raise DistillError(
                f"task {self.name!r} has the classes {', '.join(self.classes)} and its rows {', '.join(rows.classes)}; "
                "give both one order."
            )
        is_same = not self.classes or (rows.classes == self.classes and type(rows.classes) is type(self.classes))
        return rows if is_same else replace(rows, classes=self.classes)

    @printed
    def __repr__(self) -> str:
        classes = f"{len(self.classes)} classes" if self.classes else "no classes"
        return f"Task({self.name!r}: {len(self.train):,} training rows, {len(self.test):,} test rows, {classes})"

    def _repr_html_(self) -> str:
        lines = (repr(self), printable(self.description), f"train: {self.train!r}")
        return f"<pre>{escape(chr(10).join(lines))}</pre>"

    @property
    def majority(self) -> float | None:
        """The share of the most common class among the labels of the test rows: the accuracy of a constant answer.

        None if they have no labels, or labels without classes, as the tokens of language models.
        """
        if "labels" not in self.test.columns or not self.classes:
            return None
        counts: Counter[int] = Counter()
        for part in parts_of_table({"labels": self.test.table["labels"]}, CHUNK):
            labels = torch.cat([row.reshape(-1) for row in part["labels"]])
            classes, found = labels[labels >= 0].unique(return_counts=True)
            counts.update(dict(zip(classes.tolist(), found.tolist(), strict=True)))
        return max(counts.values()) / counts.total() if counts else None

    def example(self, i: int = 0) -> str:
        """Return test row `i` as text, and its class if it has one.

        Raises:
            DistillError: a task that cannot show its rows.
        """
        if self.show is None:
            raise DistillError(f"task {self.name!r} cannot show its rows as text; look at task.test[{i}]")
        row = self.test[i]
        label = int(row["labels"]) if self.classes and "labels" in row else -1
        return f"{self.show(row)} → {self.classes[label]}" if label >= 0 else self.show(row)


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """Return `build()` under a seeded generator: its weights depend on `seed` only, and no later draw depends on it."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed, which would also reseed the accelerators, and those are not forked.
        torch.default_generator.manual_seed(seed)
        return build()


def share(rows: int, fraction: float, seed: int) -> Int[Tensor, " chosen"]:
    """Draw a random `fraction` of `rows` rows, at least one; return their indices, ascending.

    The rows of a smaller fraction are among those of a larger one.

    Raises:
        DistillError: unless 0 < fraction <= 1.

    >>> share(4, 1.0, seed=0)
    tensor([0, 1, 2, 3])
    """
    if not 0 < fraction <= 1:
        raise DistillError(
            f"fraction={fraction} is not a share of the training rows; "
            "use a number above 0 and up to 1, e.g. fraction=0.1"
        )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, round(rows * fraction))].sort().values


def fine_tuning(rows: int) -> Recipe:
    """Return the settings for fine-tuning a pretrained encoder on so many rows.

    One pass over the rows in batches of 32, and at least 200 steps: a much shorter run can leave the encoder near the
    majority class.
    """
    return Recipe(steps=max(200, ceil(rows / 32)), batch_size=32, lr=1e-4, warmup=0.06, weight_decay=0.01)
