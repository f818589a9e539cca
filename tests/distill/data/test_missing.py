"""Labels that are missing: −100 where a class is, refused where a real value is, dropped where all are."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import distill
from distill import DistillError, Rows
from distill.data.missing import are_all_missing, filled, missing_rows
from distill.tasks.loading import task_of
from distill.tasks.streams import streamed
from tests.distill.conftest import save_bert, sentences
from tests.distill.tiny_models import QUIET

NAN = float("nan")
INPUTS = [[0.0, 1.0], [2.0, 3.0], [1.0, 1.0], [0.5, 0.0]]


class Own(Dataset[Any]):
    """Rows by number, as a user writes them."""

    def __init__(self, labels: list[Any]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Any:
        return {"x": torch.tensor(INPUTS[i]), "label": self.labels[i]}


def arrow(labels: list[Any]) -> Any:
    return datasets.Dataset.from_dict({"x": INPUTS, "label": labels})


FORMS: dict[str, Callable[[list[Any]], Any]] = {
    "columns": lambda labels: {"x": INPUTS, "labels": labels},
    "rows": lambda labels: [{"x": x, "label": each} for x, each in zip(INPUTS, labels, strict=True)],
    "frame": lambda labels: pd.DataFrame({"x": INPUTS, "label": labels}),
    "objects": lambda labels: {"x": INPUTS, "labels": np.array(labels, dtype=object)},
    "arrow": arrow,
    "dataset": Own,
}


def said(data: Any) -> tuple[Rows, str]:
    """Read data; return its rows and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = Rows.of(data)
    return rows, " ".join(str(each.message) for each in caught)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, None, 0, 2], [1, -100, 0, 2]),
        ([None, 1, None, 0], [-100, 1, -100, 0]),
        ([1.0, NAN, 0.0, 1.0], [1, -100, 0, 1]),  # as frames write whole numbers with gaps
        ([True, None, False, True], [1, -100, 0, 1]),
        (["b", None, "a", "b"], [1, -100, 0, 1]),
        (["b", " ", "a", ""], [1, -100, 0, -100]),
        (["1", "nan", "0", "1"], [1, -100, 0, 1]),
        (["b", "None", "a", "b"], [2, 0, 1, 2]),  # a name as any other
    ],
)
def test_a_missing_class_is_one_that_counts_for_nothing_in_every_form(form, labels, expected):
    rows, words = said(FORMS[form](labels))
    assert rows.table["labels"].tolist() == expected
    count = expected.count(-100)
    assert (f"{count} of 4 rows lack a label (first: row {expected.index(-100)}" in words) if count else not words


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("labels", [[None] * 4, [NAN] * 4, [""] * 4])
def test_rows_of_which_none_has_a_label_have_no_labels(form, labels):
    rows, words = said(FORMS[form](labels))
    assert rows.columns == ("x",)
    assert "all 4 labels of the data are missing, so its rows are used without labels" in words


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("labels", [[0.5, NAN, 0.25, 1.0], [None, 0.5, 1.0, 2.0]])
def test_a_missing_real_value_is_refused(form, labels):
    row = 1 if labels[0] is not None else 0
    with pytest.raises(DistillError, match=rf"^row {row} of the data has no label and others are real values, as 0\.5"):
        Rows.of(FORMS[form](labels))


@pytest.mark.parametrize("form", ["columns", "rows", "frame", "arrow", "dataset"])
def test_of_several_labels_each_may_be_missing(form):
    rows, words = said(FORMS[form]([[1.0, NAN], [0.0, 1.0], [1.0, 1.0], [NAN, NAN]]))
    assert rows.table["labels"].tolist() == [[1, -100], [0, 1], [1, 1], [-100, -100]]
    assert "2 of 4 rows lack a label" in words
    rows, _ = said(FORMS[form]([[1, 0], None, [1, 1], [0, 0]]))
    assert rows.table["labels"].tolist() == [[1, 0], [-100, -100], [1, 1], [0, 0]]
    with pytest.raises(DistillError, match=r"row 0 of the data has no label and others are real values"):
        Rows.of(FORMS[form]([[1.5, NAN], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]]))


def test_labels_of_tokens_are_missing_one_by_one():
    data = {"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1]], "labels": [[4, None], [5]]}
    assert [row.tolist() for row in said(data)[0].table["labels"]] == [[4, -100], [5]]
    with pytest.raises(DistillError, match="row 1 of the data has no labels, and rows of other lengths have one for"):
        Rows.of({**data, "input_ids": [[1, 2], [3], [4]], "attention_mask": [[1, 1], [1], [1]],
                 "labels": [[4, 5], None, [5]]})  # fmt: skip


def test_rows_that_are_drawn_anew_are_filled_in_each_epoch():
    labels = ["b", None, "a", "b"]
    rows, _ = said(Own(labels))
    assert rows.drawn([1, 0], 3, 0)["labels"].tolist() == [-100, 1]
    assert rows.drawn([1], 3, 0)["labels"].tolist() == [-100]
    data = Own([0.5, 0.25, 1.0, 2.0])
    rows = Rows.of(data)
    data.labels[1] = NAN
    with pytest.raises(DistillError, match="row 1 of the data has no label"):
        rows.drawn([0, 1], 1, 0)


def test_what_is_missing_is_left_out_of_losses_and_figures():
    torch.manual_seed(0)
    teacher, student = nn.Linear(2, 3), nn.Linear(2, 3)
    rows, _ = said({"inputs": INPUTS, "labels": [1, None, 0, 2]})
    known = Rows.of({"inputs": [INPUTS[i] for i in (0, 2, 3)], "labels": [1, 0, 2]})
    assert distill.accuracy(student, rows) == distill.accuracy(student, known)
    evaluation = distill.evaluate(teacher, student, {}, rows)
    assert evaluation.accuracy == distill.accuracy(student, known)
    assert "1 of 4 held-out rows has no label" in str(evaluation)
    one = distill.Schedule(batch_size=4, steps=1)
    losses = [
        next(iter(distill.steps(teacher, deepcopy(student), {}, data, objective=distill.Labels(), schedule=one))).loss
        for data in (rows, known)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_values_of_which_some_are_ignored_are_refused_by_labels():
    model = nn.Linear(2, 1)
    rows, _ = said({"inputs": INPUTS, "labels": [1, None, 0, 2]})
    with pytest.raises(DistillError, match=r"Labels\(\) compares real values, and 1 of 4 rows .*first in row 1"):
        next(iter(distill.steps(None, model, {}, rows, objective=distill.Labels(answers="values"))))


class Stream:
    """Rows one after the other, with a place of their own."""

    def __init__(self, labels: list[Any]) -> None:
        self.labels, self.at = labels, 0

    def __iter__(self) -> Any:
        while self.at < len(self.labels):
            self.at += 1
            yield {"inputs": [1.0, float(self.at)], "labels": self.labels[self.at - 1]}
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def test_a_stream_fills_what_is_missing_and_warns_once():
    labels: list[Any] = [0, 1] * 16 + [None, None, 1, None]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = streamed(Stream(labels), nn.Linear(2, 2))
        assert not caught
        found = [rows.next_of_stream(2)[0]["labels"].tolist() for _ in range(18)]
    assert found[-2:] == [[-100, -100], [1, -100]]
    assert len([each for each in caught if "lack a label (first: row 32" in str(each.message)]) == 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_bert(tmp_path_factory.mktemp("m"), classifier=True))


WRITERS: dict[str, Callable[[pd.DataFrame, Any], Any]] = {
    "a.csv": lambda frame, path: frame.to_csv(path, index=False),
    "a.tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
    "a.jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "a.parquet": lambda frame, path: frame.to_parquet(path),
}


def labels_of(task: distill.tasks.Task, tokenizer: Any) -> list[int]:
    """Return the labels of all rows of a task, in the order of the sentences that they were made of."""
    rows = [row for part in (task.train, task.test) for row in part]
    found = {tuple(row["input_ids"].tolist()): int(row["labels"]) for row in rows}
    return [found[tuple(tokenizer(text)["input_ids"])] for text, _ in sentences(12)]


@pytest.mark.parametrize("as_pattern", [False, True])
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", ["texts", "numbers"])
def test_every_kind_of_file_gives_the_same_labels(kind, name, as_pattern, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts, labels = zip(*sentences(12), strict=True)
    classes = ["negative", "positive"]
    numbers = [None if i == 3 else classes.index(label) for i, label in enumerate(labels)]
    names = [None if number is None else classes[number] for number in numbers]
    WRITERS[name](pd.DataFrame({"text": texts, "label": names if kind == "texts" else numbers}), tmp_path / name)
    data = str(tmp_path / f"*.{name[2:]}") if as_pattern else tmp_path / name
    with pytest.warns(UserWarning, match=r"1 of 12 rows lack a label \(first: row [34]"):
        task = distill.tasks.load(data=data, tokenizer=tokenizer)
    assert task.classes == (tuple(classes) if kind == "texts" else ("0", "1"))
    assert labels_of(task, tokenizer) == [-100 if number is None else number for number in numbers]
    assert task.majority is not None


def test_a_file_without_a_label_teaches_by_the_teacher_alone(tmp_path, tokenizer):
    from transformers import AutoModelForSequenceClassification

    folder = save_bert(tmp_path / "m", classifier=True)
    teacher = AutoModelForSequenceClassification.from_pretrained(folder)
    texts = [text for text, _ in sentences(12)]
    pd.DataFrame({"text": texts, "label": [None] * 12}).to_csv(tmp_path / "a.csv", index=False)
    with pytest.warns(UserWarning, match="all 12 labels of .*a.csv are missing"):
        task = task_of(tmp_path / "a.csv", teacher)
    assert task is not None
    assert task.train.columns == task.test.columns
    assert "labels" not in task.train.columns
    student = distill.from_layers(teacher, [0])
    assert distill.fit(teacher, student, {}, task, steps=1, console=QUIET).evaluation.agreement is not None


def test_a_real_value_that_a_file_lacks_is_refused(tmp_path, tokenizer):
    texts = [text for text, _ in sentences(12)]
    values = [None if i == 4 else i / 7 for i in range(12)]
    for name in ("a.csv", "a.parquet"):
        WRITERS[name](pd.DataFrame({"text": texts, "label": values}), tmp_path / name)
        with pytest.raises(DistillError, match=r"^row [45] of .* has no label.* real values") as raised:
            distill.tasks.load(data=tmp_path / name, tokenizer=tokenizer)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("labels", [[1, 0], torch.tensor([1.0, 0.0]), ["a", "b"], [[1, 0], [0, 1]]])
def test_labels_that_are_all_there_are_returned_as_they_are(labels):
    assert filled(labels) is labels
    assert not missing_rows(labels)
    assert not are_all_missing(labels)
