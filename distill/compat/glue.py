"""GLUE's classification tasks from the folders of their own tables, as DIITO-XXS reads them."""

import csv
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from distill.data.classes import are_names, matched
from distill.data.pad_ids import pad_id_of
from distill.data.tables import fields_of_any_length
from distill.data.task import fine_tuning
from distill.errors import DistillError
from distill.models.numbering import renumbered
from distill.tasks import Rows, Task

NO_ENTAILMENT = ("entailment", "not_entailment")


@dataclass(frozen=True)
class Layout:
    """The layout of a table: its columns of texts and labels, and its classes.

    Attributes:
        texts: the columns of the one or two texts.
        label: the column of the label.
        classes: the labels in the order of the classes.
        dev: the name of the file of held-out rows.
        header: whether the first line has the names of the columns.
    """

    texts: tuple[int, ...]
    label: int
    classes: tuple[str, ...] = ("0", "1")
    dev: str = "dev"
    header: bool = True


MNLI = Layout((8, 9), -1, ("contradiction", "entailment", "neutral"), "dev_matched")
LAYOUTS = {
    "cola": Layout((3,), 1, header=False),
    "mnli": MNLI,
    "mnli-mm": Layout(MNLI.texts, MNLI.label, MNLI.classes, "dev_mismatched"),
    "mrpc": Layout((3, 4), 0),
    "qnli": Layout((1, 2), -1, NO_ENTAILMENT),
    "qqp": Layout((3, 4), 5),
    "rte": Layout((1, 2), -1, NO_ENTAILMENT),
    "sst-2": Layout((0,), 1),
    "wnli": Layout((1, 2), -1),
}


def layout_of(name: str | None) -> Layout:
    """Return the layout of a task of GLUE, by its name in any case.

    Raises:
        DistillError: no name, or that of no classification task; STS-B is none, as its labels are numbers.
    """
    if name is not None and name.lower() in LAYOUTS:
        return LAYOUTS[name.lower()]
    near = get_close_matches((name or "").lower(), LAYOUTS, n=1)
    hint = f"did you mean {near[0].upper()}? " if near else ""
    raise DistillError(
        f"--task_name {name} is no classification task of GLUE; {hint}choose one of "
        f"{', '.join(each.upper() for each in LAYOUTS)}."
    )


def glue_task(
    name: str,
    folder: Path,
    tokenizer: Any,
    *,
    max_length: int = 128,
    first: int | None = None,
    names: Sequence[str] = (),
) -> Task:
    """Read a task of GLUE, tested on its held-out rows.

    Args:
        name: of the task, e.g. SST-2.
        folder: holds train.tsv and dev.tsv (MNLI: dev_matched.tsv), which may also end in .gz.
        tokenizer: the teacher's.
        max_length: in tokens; longer texts are cut, the longer of two first.
        first: how many of the first training rows to use; None is all.
        names: the classes of the teacher in its order, by which labels are numbered; not LABEL_0, LABEL_1, …

    Raises:
        DistillError: an unknown task, a file that is missing or has other columns, a label that is no class, or a class
            that the teacher does not name.
    """
    layout = layout_of(name)
    if first is not None and first < 1:
        raise DistillError(f"--max_training_examples {first} leaves no training row; use at least 1.")
    train = _read(folder, "train", layout, layout.classes)[:first]
    test = _read(folder, layout.dev, layout, layout.classes)
    task = Task(
        name=name.lower(),
        train=_rows(tokenizer, train, max_length),
        test=_rows(tokenizer, test, max_length),
        classes=layout.classes,
        recipe=fine_tuning(len(train)),
        description=f"{name.upper()} of GLUE.",
        show=lambda row: tokenizer.decode(row["input_ids"], skip_special_tokens=True),
        tokenizer=tokenizer,
    )
    if not are_names(names):
        return task
    return renumbered(task, matched(layout.classes, names, "the teacher"), tuple(each.lower() for each in names))


def _read(folder: Path, name: str, layout: Layout, classes: Sequence[str]) -> list[tuple[tuple[str, ...], int]]:
    """Read the texts and the class of each row; skip rows with too few columns, which QQP has."""
    path = next((path for path in (folder / f"{name}.tsv", folder / f"{name}.tsv.gz") if path.exists()), None)
    if path is None:
        raise DistillError(
            f"{folder} has no {name}.tsv; put the tables of GLUE there, or say where data_raw/ stands: "
            "HOME_DATA_FOLDER=FOLDER."
        )
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file, fields_of_any_length():
        lines = list(
            csv.reader(StringIO(file.read().decode("utf-8-sig"), newline=""), "excel-tab", quoting=csv.QUOTE_NONE)
        )
    wanted, found = max(*layout.texts, layout.label) + 1, []
    for number, line in enumerate(lines[layout.header :], 1 + layout.header):
        if len(line) < max(wanted, 2):
            continue
        label = line[layout.label]
        if label not in classes:
            raise DistillError(
                f"line {number} of {path} has label {label!r}, and the classes are {', '.join(classes)}."
            )
        found.append((tuple(line[column] for column in layout.texts), classes.index(label)))
    if not found:
        raise DistillError(f"{path} has no row of {wanted} columns with tabs between; is it the table of GLUE?")
    return found


def _rows(tokenizer: Any, rows: Sequence[tuple[tuple[str, ...], int]], max_length: int) -> Rows:
    """Tokenize texts, and return them with their classes as rows."""
    texts, labels = zip(*rows, strict=True)
    limit = min(max_length, tokenizer.model_max_length)
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=limit, return_special_tokens_mask=True)
    table = {name: [torch.tensor(row) for row in values] for name, values in encoded.items()}
    pad_id, side = pad_id_of(tokenizer), tokenizer.padding_side
    return Rows({**table, "labels": torch.tensor(labels)}, pad_id=pad_id, padding_side=side)
