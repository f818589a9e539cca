"""The values of `data=`: a task, the name of one, a file, rows in any form, or "random"."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from distill.data import files
from distill.data.classes import Ranked, matched, stated
from distill.data.files import is_same_file, rows_of
from distill.data.rows import Rows
from distill.data.sources.opening import Splits, large_file, splits_of
from distill.data.task import Task, share
from distill.data.texts.given import with_columns
from distill.data.texts.reading import kind_of_texts
from distill.errors import DistillError, checked
from distill.models.inputs import network_of, vocabulary_of
from distill.models.numbering import numbered_as, renumbered
from distill.tasks import agreement, language, pvr, sst2
from distill.tasks.digits import digits
from distill.tasks.mnist import mnist_digits
from distill.tasks.named import as_rows, labelled_task, length_for, named_rows, task_of_splits, to_measure, tokenizer_of
from distill.writing.written import Written, data_of

EMBEDDED: dict[str, Callable[[], Task]] = {"pvr": pvr.task, "agreement": agreement.task, "digits": digits}

RANDOM, RANDOM_ROWS, HELD_OUT_SEED = "random", 4096, 2**31 - 1


def training_rows(data: Any, model: Any, seed: int = 0, *others: Any) -> Rows:
    """Return the rows to train on, their labels numbered as the model numbers its classes.

    Args:
        data: a Task or its name, the path of a file, rows in any form that `Rows.of` takes, or "random".
        model: the model; it gives the tokenizer of a task by name, the shape of random inputs, and the classes.
        seed: seeds random data.
        others: models that are trained with it; the first that names its classes decides.

    Raises:
        DistillError: no data, or data that cannot be used.
    """
    if data is None:
        raise DistillError(
            "networks were given and no data; pass data='pvr' (any of distill.tasks.names(), a Task, a file or "
            "rows), or "
            "data='random' for a data-free run."
        )
    if isinstance(data, Written):
        raise DistillError(
            "Written is for fit() and steps(), which know who is the student and who the teacher; give rows here: "
            "data=written.rows, which are its prompts, and the completions that the data has."
        )
    if isinstance(data, str) and data == RANDOM:
        return random_rows(model, RANDOM_ROWS, seed)
    task = task_of(data, model)
    return numbered_as(as_rows(data, model) if task is None else task.train, model, *others)


def as_read(data: Any, model: Any, tokenizer: Any = None) -> Any:
    """Return data in a form that can be used several times: rows; names, files and tasks stay as they are."""
    return data if data is None or isinstance(data, str | Path | Task | Written) else as_rows(data, model, tokenizer)


def held_out(data: Any, model: Any, *others: Any) -> Rows:
    """Return the rows to measure on, labels as for training: the test rows of a task, else the rows themselves.

    Those of `Written` are its prompts with the completions of the data.
    """
    data = data_of(data)
    if isinstance(data, str) and data == RANDOM:
        return random_rows(model, RANDOM_ROWS, HELD_OUT_SEED)
    if (named := named_rows(data, model)) is not None:
        return numbered_as(named, model, *others)
    task = task_of(data, model)
    return numbered_as(as_rows(data, model) if task is None else task.test, model, *others)


def rows_to_measure(
    eval_data: Any, trained_on: Any, task: Task | None, rows: Rows, *models: Any, tokenizer: Any = None
) -> Rows | None:
    """Return the rows that `fit` measures on: all rows of a file, else as `held_out`, else the test rows of its task.

    Args:
        eval_data: the argument of `fit`; None is the test rows of the task.
        trained_on: the training data of `fit`.
        task: the task of the training data, if it is one.
        rows: the training rows; they name the classes if no model does.
        models: the models; the first gives the tokenizer of a file.
        tokenizer: of a file instead; None is that of the task, else that of the model.
    """
    eval_data, tokenizer = data_of(eval_data), tokenizer or (None if task is None else task.tokenizer)
    if eval_data is None or is_same_file(eval_data, trained_on):
        return None if task is None else task.test
    if (named := named_rows(eval_data, models[0], tokenizer)) is not None:
        found = named
    elif _is_file(eval_data) and language.for_model(eval_data, models[0]):
        found = language.rows_for_model(eval_data, models[0], tokenizer)
    elif _is_file(eval_data):
        found = rows_of(eval_data, tokenizer or tokenizer_of(models[0]), length_for(models[0]))
    elif isinstance(eval_data, str) and eval_data == RANDOM:
        return held_out(eval_data, models[0])
    else:
        other = task_of(eval_data, models[0])
        found = as_rows(eval_data, models[0], tokenizer) if other is None else other.test
    names = None if isinstance(rows.classes, Ranked) else rows.classes
    return numbered_as(found, *models, names=names)


def task_of(data: Any, model: Any, tokenizer: Any = None) -> Task | None:
    """Return the task that data is or names, its classes not renumbered; None for rows and "random".

    Text is read with the model's own tokenizer if none is given.
    """
    if isinstance(data, Task):
        return data
    if isinstance(data, str) and data == RANDOM:
        return None
    splits = splits_of(data)
    if splits is None and _is_file(data) and language.for_model(data, model):
        splits = large_file(data)
        if splits is None:
            return language.task_for_model(data, model, tokenizer)
    if splits is not None:
        return task_of_splits(splits, model, tokenizer)
    if _is_file(data):
        return load(data=data, tokenizer=tokenizer or tokenizer_of(model), max_length=length_for(model))
    if isinstance(data, str):
        return load(data, tokenizer=tokenizer or tokenizer_of(model))
    return None


def _is_file(data: Any) -> bool:
    return isinstance(data, Path) or (isinstance(data, str) and Path(data).suffix != "")


def random_rows(model: Any, count: int, seed: int) -> Rows:
    """Draw random inputs without labels: uniform token ids of random lengths, or standard normal pixels.

    Raises:
        DistillError: a model without a known size of its vocabulary or of its images.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary, config = vocabulary_of(model), getattr(network_of(model), "config", None)
    if vocabulary is not None:
        longest = min(64, getattr(config, "max_position_embeddings", 64) or 64)
        lengths = torch.randint(2, longest + 1, (count,), generator=generator).tolist()
        tokens = [torch.randint(vocabulary, (length,), generator=generator) for length in lengths]
        table = {"input_ids": tokens, "attention_mask": [torch.ones_like(t) for t in tokens]}
        if getattr(config, "is_encoder_decoder", False):
            table |= {"decoder_input_ids": tokens, "decoder_attention_mask": table["attention_mask"]}
        return Rows(table)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if size is None or channels is None:
        raise DistillError(
            f"data='random' does not know the inputs of {type(network_of(model)).__name__}; make them yourself: "
            "data={'inputs': torch.randn(4096, width)}."
        )
    height, width = (size, size) if isinstance(size, int) else size
    return Rows({"pixel_values": torch.randn(count, channels, height, width, generator=generator)})


def names() -> tuple[str, ...]:
    """Return the names of tasks: embedded ones, and those with data in a folder or on the Hugging Face hub."""
    return (*EMBEDDED, "mnist", "sst2")


@checked
def load(
    name: str | None = None,
    *,
    data: Any = None,
    eval_data: Any = None,
    tokenizer: Any = None,
    fraction: float = 1.0,
    seed: int = 0,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    classes: Sequence[str] | None = None,
    max_length: int | None = None,
    split_seed: int = 0,
    clusters: str | None = None,
    packing: str | None = None,
    block_size: int | None = None,
) -> Task:
    """Return a task by name, or from data of the user.

    `load("pvr")`, `load("mnist", data=FOLDER)`, `load("sst2", data=FOLDER, tokenizer=...)`,
    `load(data="my.csv", tokenizer=...)`, `load("text", data="my.txt", tokenizer=..., block_size=512)`,
    `load("chat", data="my.jsonl", tokenizer=...)`.

    Texts with labels are a task of classification, or of real values where the labels are. Texts and chats for
    language models have no classes; their labels are the tokens, −100 in prompts, so that losses are over completions
    alone: "text" has a column of texts, "chat" either `messages`, lists of `{"role": …, "content": …}` whose answers of
    the assistant are learned, or `prompt` and `completion`, texts or lists of messages. Chats are written by the chat
    template of the tokenizer. Texts and completions end with the tokenizer's end token.

    Args:
        name: one of `names()`, "text" or "chat"; None for data of the user, of which chats are recognized.
        data: the folder of a task by name, or the user's own: a file, a folder of files or of a data set on disk, a
            pattern as "films/*.csv", a list of files, a hub id, a list of dicts, a dict of columns, a frame, or a
            Hugging Face Dataset.
        eval_data: the data to test on; without any and without a split for it a fifth is held out, of data sets that
            are no single file at most 1,000 rows.
        tokenizer: the teacher's tokenizer, for tasks of text.
        fraction: the share of the training rows to keep, drawn by `seed`; the test rows stay.
        seed: seeds that draw.
        text, label: the columns of a file; text=("premise", "hypothesis") names two, of pairs that the tokenizer puts
            into one row. "premise", "sentence1" and "question1" with their others are found without a name.
        classes: the labels of the data in the order of the model's outputs. Without it, `fit` and the measurements
            match them with the names that a model gives to its classes (`config.id2label`).
        max_length: texts of a file are cut at this number of tokens, 128 by default (1024 for language models), with a
            warning. Completions that lie behind the cut are counted, and their rows left out.
        split_seed: seeds the draw of the held-out fifth. It does not depend on `seed`, so that runs of other seeds are
            measured on the same rows.
        clusters: the column of a file that says what rows share, e.g. a template or a speaker. Intervals then take rows
            with one value for related.
        packing: "best-fit" or "in order" puts several texts or chats into each row, which begin anew in `position_ids`:
            the longest first, each into the row that it fills best, or as they follow each other. Longer texts are
            continued in another row. "best-fit" by default where `block_size` is given, else none are.
        block_size: the number of tokens of such a row, `max_length` by default.

    Raises:
        DistillError: an unknown name, settings that the task does not take, or data that cannot be used.
    """
    share(1, fraction, seed)  # raises before anything is read
    data, eval_data = with_columns(data), with_columns(eval_data)
    in_files = all(isinstance(each, str | Path | None) for each in (data, eval_data))
    splits = splits_of(data) if name in (None, *language.NAMES) else None
    if name in language.NAMES or (name is None and _is_of_language(data, splits)):
        _refuse(name or "chat", label=label, classes=classes)
        data, eval_data = _opened(data, splits, eval_data)
        return language.task(
            data, tokenizer, name=name, eval_data=eval_data, text=text, max_length=max_length, packing=packing,
            block_size=block_size, fraction=fraction, seed=seed, split_seed=split_seed, clusters=clusters,
        )  # fmt: skip
    _refuse(name or "of texts with labels", packing=packing, block_size=block_size)
    if name is None and data is not None:
        settings: dict[str, Any] = {"fraction": fraction, "seed": seed, "classes": classes, "max_length": max_length,
                    "split_seed": split_seed, "text": text, "label": label, "clusters": clusters}  # fmt: skip
        tested = None if eval_data is None else splits_of(eval_data)
        if in_files and splits is None and tested is None:
            return files.task(data, tokenizer, eval_data=eval_data, **settings)
        data, eval_data = data if splits is None else splits, eval_data if tested is None else tested
        return labelled_task(data, tokenizer, eval_data=eval_data, **settings)
    if name is None:
        raise DistillError(
            f"no task was named and no data given; use load(name) with one of {', '.join(names())}, or load(data=FILE)"
        )
    if name not in names():
        raise DistillError(_unknown(name))
    file = {"data": data} if name in EMBEDDED else {}
    _refuse(name, eval_data=eval_data, text=text, label=label, max_length=max_length, clusters=clusters, **file)
    if name == "sst2":
        task = sst2.task(data, tokenizer, fraction=fraction, seed=seed)
    else:
        task = mnist_digits(data) if name == "mnist" else EMBEDDED[name]()
        task = replace(task, train=task.train.take(share(len(task.train), fraction, seed)))
    if classes is None:
        return task
    order = stated(classes)
    return renumbered(task, matched(task.classes, order, "the names given"), order)


def _opened(data: Any, splits: Splits | None, eval_data: Any) -> tuple[Any, Any]:
    """Return texts by their folder, pattern or hub id as data sets to train and to measure on; others as they are."""
    tested = None if eval_data is None else splits_of(eval_data)
    if tested is not None:
        eval_data = to_measure(tested)
    if splits is None:
        return data, eval_data
    return splits.to_train_on, splits.held_out if eval_data is None else eval_data


def _is_of_language(data: Any, splits: Splits | None) -> bool:
    """Return whether data of the user is for language models: chats in files, or any texts in memory."""
    if data is None:
        return False
    is_named = splits is not None or isinstance(data, str | Path)
    kinds: tuple[str | None, ...] = (language.CHAT,) if is_named else language.NAMES
    return kind_of_texts(data if splits is None else splits.to_train_on) in kinds


def _unknown(name: str) -> str:
    if name.removesuffix(".gz").endswith(files.SUFFIXES):
        return f"{name!r} is a file, not the name of a task; give it as data={name!r}, or --data {name}"
    if "/" in name or "\\" in name:
        return f"{name!r} is no file, no folder and no task that there is; give the path of your data, as --data FILE"
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
