"""SST-2 of GLUE, the sentiment of film reviews, from a folder or from the Hugging Face hub.

Socher et al. 2013 (EMNLP, D13-1170); Wang et al. 2018 (arXiv:1804.07461).
"""

import csv
from pathlib import Path
from typing import Any

from distill.data.files import labelled
from distill.data.task import Task, share
from distill.data.text import Text, need_tokenizer, text_task
from distill.errors import DistillError

CLASSES = ("negative", "positive")
Splits = tuple[tuple[list[Text], list[int]], tuple[list[Text], list[int]]]


def task(data: str | Path | None = None, tokenizer: Any = None, *, fraction: float = 1.0, seed: int = 0) -> Task:
    """Return the task of GLUE SST-2: is a sentence from a film review negative or positive? Its dev set is the test.

    Socher et al. 2013 (EMNLP, D13-1170); Wang et al. 2018 (arXiv:1804.07461).

    Args:
        data: a folder with train.tsv and dev.tsv (either may end in .gz), columns "sentence" and "label"; without one,
            the data set is loaded from the Hugging Face hub.
        tokenizer: the tokenizer of the teacher.
        fraction: the share of the training rows to keep, drawn by `seed`.
        seed: seeds the draw.

    Raises:
        DistillError: no tokenizer, or a folder or a hub that does not give the data.
    """
    need_tokenizer("sst2", tokenizer)
    train, test = _hub() if data is None else _folder(Path(data))
    chosen = share(len(train[1]), fraction, seed).tolist()
    return text_task(
        "sst2",
        ([train[0][i] for i in chosen], [train[1][i] for i in chosen]),
        test,
        CLASSES,
        tokenizer,
        description="SST-2: is a sentence from a film review negative or positive?",
    )


def _folder(folder: Path) -> Splits:
    if not folder.is_dir():
        raise DistillError(
            f"{folder} is not a folder; give one that holds train.tsv and dev.tsv of GLUE SST-2, as --data FOLDER"
        )
    return _split(folder, "train"), _split(folder, "dev")


def _split(folder: Path, name: str) -> tuple[list[Text], list[int]]:
    path = next((path for path in (folder / f"{name}.tsv", folder / f"{name}.tsv.gz") if path.exists()), None)
    if path is None:
        raise DistillError(
            f"{folder} has no {name}.tsv or {name}.tsv.gz; "
            "put the file of GLUE SST-2 there, or name another --data FOLDER"
        )
    texts, labels = labelled(path, "sentence", "label", quoting=csv.QUOTE_NONE)
    if unknown := sorted({each or "none" for each in labels or (None,)} - {"0", "1"}):
        raise DistillError(
            f"{path} has labels other than 0 and 1: {', '.join(unknown)}; "
            "for data of your own give the file itself, as --data FILE"
        )
    return texts, [int(label) for label in labels or () if label]


def _hub() -> Splits:
    import datasets

    # Offline, down, or blocked: the hub's client raises errors of a dozen unrelated types, and the way out is the same.
    try:
        loaded = datasets.load_dataset("nyu-mll/glue", "sst2")
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise DistillError(
            f"SST-2 cannot be loaded from the Hugging Face hub: {type(error).__name__}: {reason}; "
            "give a folder with train.tsv and dev.tsv, as --data FOLDER"
        ) from error
    train, test = loaded["train"], loaded["validation"]
    return (list(train["sentence"]), list(train["label"])), (list(test["sentence"]), list(test["label"]))
