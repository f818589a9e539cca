"""Rows of an iterable data set with a state of its own, which are read in order and step by step.

A step takes the next rows, an epoch ends with the data set, and the state after a step is a part of its checkpoint: a
resumed run continues at the next row. No more rows than those of a step, and a few at the beginning, are in memory.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from distill.data.draws import alike, named, seeded
from distill.data.labels import relabelled
from distill.data.seen_rows import PassedRows
from distill.data.sources.batched import is_batched
from distill.data.sources.lazy_columns import Column
from distill.data.sources.shuffle_buffers import is_iterable_of_hugging_face, plain, with_kept_buffers
from distill.data.sources.stream_states import as_bytes
from distill.errors import DistillError
from interventions import InterventionError, shown

FILE = "stream.pt"
"""The file of a checkpoint that holds the state of the stream."""
Read = Callable[[Sequence[Any], int], tuple[Mapping[str, Column], Sequence[int]]]
"""From rows that follow each other, and the number of the first, to their columns and the numbers of the rows in them,
among which are none that a model could learn nothing from."""


def is_stream(data: Any) -> bool:
    """Return whether data is iterated, and has a state that can be saved and loaded."""
    return (
        all(callable(getattr(data, name, None)) for name in ("__iter__", "state_dict", "load_state_dict"))
        and not isinstance(data, type | torch.nn.Module | Mapping)
        and not is_batched(data)
        and not (isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset))
        and (isinstance(data, IterableDataset | DataLoader) or not hasattr(data, "__getitem__"))
    )


def gives_batches(data: Any) -> bool:
    """Return whether data is a loader, each item of which is a batch of rows."""
    return hasattr(data, "dataset") and getattr(data, "batch_size", None) is not None


@dataclass(eq=False)
class Stream:
    """The rows of an iterable data set in order, and the place that was reached.

    Attributes:
        data: the data set; it has its state of before after `rewind`.
        read: makes columns of rows.
        classes: the number of classes of the labels, by which they are checked when they are read; None checks none.
        numbers: the number of each label in the order of the model's outputs; None leaves labels as they are.
        passed: records the rows that are taken, by their content; None records none.
        epoch: the number of the epoch, from 0.
        number: the number of rows that were taken in this epoch.
    """

    data: Any
    read: Read | None = None
    classes: int | None = None
    numbers: Sequence[int] | None = None
    passed: PassedRows | None = None
    epoch: int = field(default=0, init=False)
    number: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._owned = is_iterable_of_hugging_face(self.data)
        if self._owned:
            self.data = with_kept_buffers(self.data)
        self._start = self._state_at_start()
        self._first_epoch = int(self.data.epoch) if self._owned else 0
        self._batches = gives_batches(self.data)
        self._rows: Iterator[Any] | None = None
        self._waiting: deque[Any] = deque()
        self._mark, self._since, self._fruitful = self._start, 0, False
        if not (self._owned or self._batches):
            self._refuse_broken_state()

    @property
    def name(self) -> str:
        """The name of the data in errors."""
        return type(self.data).__name__

    @property
    def length(self) -> int | None:
        """The number of rows of an epoch; None where it is not known."""
        source = self.data.dataset if self._batches else self.data
        try:
            return len(source)
        except TypeError:
            return None

    def first(self, count: int) -> list[Any]:
        """Return the first rows without taking them: so many, or all where there are fewer.

        Raises:
            DistillError: there are none.
        """
        while len(self._waiting) < count and self._pull():
            pass
        if not self._waiting:
            raise DistillError(f"the {self.name} has no rows; give at least one.")
        return list(self._waiting)[:count]

    def take(self, count: int) -> Mapping[str, Column]:
        """Return the columns of the next rows of an epoch, `count` of them or those that are left of it.

        Raises:
            DistillError: a row that cannot be read, or an epoch without rows.
        """
        pieces, have = list[Mapping[str, Column]](), 0
        while have < count:
            start, rows = self.number, self._next(count - have)
            if rows:
                piece, numbers = self._columns(rows, start)
                have += len(numbers)
                if numbers:
                    pieces.append(piece)
                    self._fruitful = True
            elif have:
                break
            elif not self._fruitful:
                raise DistillError(
                    f"epoch {self.epoch + 1} of the {self.name} has no rows to learn from, so none follow row "
                    f"{self.number}; give rows, or a data set whose load_state_dict goes back to its beginning."
                )
            else:
                self._begin(self.epoch + 1)
        table = pieces[0] if len(pieces) == 1 else _joined(pieces)
        if self.passed is not None:
            self.passed.add(table)
        return table

    def renumber(self, numbers: Sequence[int]) -> None:
        """Replace label i by `numbers[i]` in all rows to come, after what it was replaced by before."""
        before = range(len(numbers)) if self.numbers is None else self.numbers
        self.numbers = tuple(numbers[each] for each in before)

    def rewind(self) -> None:
        """Return to the first row, and give the data set the state that it had."""
        self._begin(0)

    def state(self) -> dict[str, Any]:
        """Return the place that was reached, as plain data and tensors."""
        within = bool(self._waiting)
        found = {
            "epoch": self.epoch,
            "number": self.number,
            "fruitful": self._fruitful,
            "skipped": self._since if within else 0,
            "data": self._mark if within or self._rows is None else self._state_now(),
            "passed": {} if self.passed is None else self.passed.state(),
        }
        return plain(found)

    def move_to(self, state: Mapping[str, Any]) -> None:
        """Move to the place that a state describes."""
        self._begin(state["epoch"], state["data"])
        self.number = state["number"] - state["skipped"]
        self._mark = state["data"]
        self._next(state["skipped"])
        self._fruitful = state["fruitful"]
        if self.passed is not None:
            self.passed.load(state["passed"])

    def save(self, folder: Path) -> None:
        """Write the place that was reached into the folder of a checkpoint.

        Raises:
            DistillError: the state of the data set holds objects.
        """
        (folder / FILE).write_bytes(as_bytes(self.state(), self.name))

    def load(self, folder: Path) -> None:
        """Move to the place that the folder of a checkpoint describes.

        Raises:
            DistillError: the folder holds none.
        """
        file = folder / FILE
        if not file.is_file():
            raise DistillError(
                f"the checkpoint {folder} holds no state of a stream, as its run read its data otherwise; start anew "
                "in a new folder."
            )
        self.move_to(torch.load(file, weights_only=True))

    def _next(self, count: int) -> list[Any]:
        """Take the next rows: so many, or those that are left of the epoch."""
        found = list[Any]()
        while len(found) < count and (self._waiting or self._pull()):
            found.append(self._waiting.popleft())
            self.number += 1
            self._since += 1
        return found

    def _pull(self) -> bool:
        """Read the next item of the data set; return whether there was one."""
        if self._rows is None:
            self._rows = iter(self.data)
        elif self._batches and not self._waiting:
            self._mark, self._since = self._state_now(), 0
        place = self.number + len(self._waiting)
        try:
            with seeded(0, self.epoch, place):
                item = next(self._rows)
            rows = _rows_of(item) if self._batches else [item]
        except StopIteration:
            return False
        except (DistillError, InterventionError):
            raise
        except Exception as error:
            why = " ".join(str(error).split()).rstrip(".;")
            raise DistillError(
                f"row {place} of the {self.name} cannot be read: {type(error).__name__}: {why}; correct it, or leave "
                "it out, as with data.filter(…)."
            ) from error
        self._waiting.extend(rows)
        return True

    def _columns(self, rows: list[Any], start: int) -> tuple[Mapping[str, Column], Sequence[int]]:
        """Return the columns of rows, with labels as the model numbers them, and the numbers of the rows in them."""
        assert self.read is not None
        try:
            table, numbers = self.read(rows, start)
        except DistillError as error:
            raise self._of_row(rows, start, error) from error
        labels = table.get("labels")
        if labels is None or not numbers or (self.classes is None and self.numbers is None):
            return table, numbers
        for number, label in zip(numbers, labels, strict=True):
            self._check_label(label, number)
        if self.numbers is not None:
            known = dict(enumerate(self.numbers))
            changed = [relabelled(label, known) for label in labels]
            table = {**table, "labels": torch.stack(changed) if isinstance(labels, Tensor) else changed}
        return table, numbers

    def _check_label(self, label: Tensor, number: int) -> None:
        """Raise DistillError for a label that is the number of no class."""
        most = self.classes if self.numbers is None else len(self.numbers)
        if label.is_floating_point() or most is None or not label.numel():
            return
        wrong = label[(label != -100) & ((label < 0) | (label >= most))].flatten()
        if len(wrong):
            raise DistillError(
                f"row {number} of the {self.name} has label {int(wrong[0])} and there are {most} classes (0 to "
                f"{most - 1}); map the labels to these."
            )

    def _of_row(self, rows: list[Any], start: int, error: DistillError) -> DistillError:
        """Return the error of the first row that cannot be read, by its number."""
        assert self.read is not None
        for number, row in enumerate(rows, start):
            try:
                self.read([row], number)
            except DistillError as found:
                text = str(found)
                return found if f"row {number} of" in text else DistillError(f"row {number} of the {self.name}: {text}")
        return DistillError(f"rows {start} to {start + len(rows) - 1} of the {self.name}: {error}")

    def _begin(self, epoch: int, state: Any = None) -> None:
        """Begin an epoch, or continue it from a state of the data set."""
        self.epoch, self.number = epoch, 0
        self._rows, self._mark, self._since, self._fruitful = None, self._start, 0, False
        self._waiting.clear()
        if callable(getattr(self.data, "set_epoch", None)):
            self.data.set_epoch(self._first_epoch + epoch)
        wanted = self._start if state is None else state
        if wanted is None and not self._owned:
            return
        try:
            self.data.load_state_dict(deepcopy(wanted))
        except Exception as error:
            why = " ".join(str(error).split()).rstrip(".;")
            raise DistillError(
                f"load_state_dict of the {self.name} refuses what its state_dict returned, {shown(wanted)} "
                f"({type(error).__name__}: {why}); correct it, or give the rows: data=list(data)."
            ) from error

    def _state_at_start(self) -> Any:
        """Return the state before the first row; None where the data set has none before it is iterated."""
        if self._owned:
            return self.data._starting_state_dict  # its state_dict() is that of an iteration before
        try:
            return deepcopy(self.data.state_dict())
        except Exception:
            return None

    def _state_now(self) -> Any:
        """Return the state of the data set.

        Raises:
            DistillError: it cannot say where it is.
        """
        try:
            return deepcopy(self.data.state_dict())
        except Exception as error:
            why = " ".join(str(error).split()).rstrip(".;")
            raise DistillError(
                f"state_dict of the {self.name} fails after row {self.number} ({type(error).__name__}: {why}): no run "
                "could be resumed; correct it, or give the rows: data=list(data)."
            ) from error

    def _refuse_broken_state(self) -> None:
        """Raise DistillError if the row after the first is another one once the state is saved and loaded."""
        if not self._pull():
            return
        state = self._state_now()
        if self._start is None and not self._owned:
            self._refuse_other_beginning()
            return
        self._pull()
        after = list(self._waiting)[1:]
        self._begin(0, state)
        self.number = 1
        self._pull()
        again = list(self._waiting)
        self.rewind()
        as_bytes(plain(state), self.name)
        if not alike(_comparable(after), _comparable(again)):
            raise DistillError(
                f"the state of the {self.name} does not say where it is: after its first row comes {shown(after)}, and "
                f"{shown(again)} once load_state_dict was given the state_dict() of that place; correct these two "
                "methods, or give the rows: data=list(data)."
            )

    def _refuse_other_beginning(self) -> None:
        """Raise DistillError if a data set without a state before its first row begins at another row the next time."""
        before = list(self._waiting)
        self.rewind()
        self._pull()
        again = list(self._waiting)
        self.rewind()
        if not alike(_comparable(before), _comparable(again)):
            raise DistillError(
                f"the {self.name} has no state before its first row, and begins with {shown(before)} once and with "
                f"{shown(again)} the next time; let state_dict() work there, or give the rows: data=list(data)."
            )


def _comparable(row: Any) -> Any:
    """Return a row without values that need not be equal to copies of themselves, as objects of a user's classes."""
    if isinstance(row, Mapping):
        return {name: _comparable(each) for name, each in row.items()}
    if isinstance(row, list | tuple):
        return [_comparable(each) for each in row]
    return row if isinstance(row, str | bytes | int | float | np.generic | np.ndarray | Tensor) else None


def _rows_of(batch: Any) -> list[dict[str, Any]]:
    """Return the rows of a batch."""
    columns = named(batch)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _joined(pieces: Sequence[Mapping[str, Column]]) -> dict[str, Column]:
    """Return the columns of several pieces, one after the other."""
    found = dict[str, Column]()
    for name in pieces[0]:
        rows = [row for piece in pieces for row in piece[name]]
        found[name] = torch.stack(rows) if len({row.shape for row in rows}) == 1 else rows
    return found
