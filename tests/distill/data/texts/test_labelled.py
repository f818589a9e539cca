"""Texts with labels, in any form, are the rows that a file of them gives, also where their tokens lie on disk."""

import datasets
import pandas
import pytest
import torch

from distill import DistillError, Rows
from distill.data.sources import arrow
from distill.data.sources.lazy_columns import LazyColumn
from distill.data.text import tokenize_texts
from distill.data.texts import on_disk
from distill.data.texts.labelled import labelled_rows, text_columns
from tests.distill.conftest import sentences
from tests.distill.data.texts.tokenizers import tokenizer

TEXTS, LABELS = zip(*sentences(20), strict=True)
FORMS = {
    "hub": datasets.Dataset.from_dict,
    "pandas": pandas.DataFrame,
    "dict": dict,
    "list": lambda columns: [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
}


def alike(one: Rows, other: Rows) -> bool:
    numbers = range(len(one))
    found = other.batch(numbers)
    return one.columns == other.columns and all(each.equal(found[name]) for name, each in one.batch(numbers).items())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_rows_of_the_texts(form):
    data = FORMS[form]({"sentence": list(TEXTS), "label": list(LABELS)})
    assert text_columns(data) == ("sentence",)
    rows = labelled_rows(data, tokenizer(), 30)
    numbers = [("negative", "positive").index(label) for label in LABELS]
    assert rows.classes == ("negative", "positive")
    assert alike(rows, tokenize_texts(tokenizer(), TEXTS, numbers, 30))


@pytest.mark.parametrize("labels", ["text", "names", "reals", "none"])
def test_large_data_gives_the_same_rows_from_disk(labels, tmp_path, monkeypatch):
    values = {
        "text": list(LABELS), "names": [len(each) % 3 for each in TEXTS], "reals": [len(each) / 7 for each in TEXTS]
    }  # fmt: skip
    data = datasets.Dataset.from_dict({"text": list(TEXTS), **({} if labels == "none" else {"label": values[labels]})})
    if labels == "names":
        data = data.cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))
    with pytest.warns(UserWarning, match=r"texts have more than 8 tokens and are cut there"):
        small = labelled_rows(data, tokenizer(), 8)
    monkeypatch.setattr(on_disk, "LARGE", 0)
    monkeypatch.setattr(arrow, "IN_MEMORY", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.warns(UserWarning, match=r"texts have more than 8 tokens and are cut there"):
        large = labelled_rows(data, tokenizer(), 8)
    assert isinstance(large.table["input_ids"], LazyColumn)
    assert alike(large, small)
    assert large.classes == small.classes
    assert ("labels" in large.columns) == (labels != "none")
    assert labels != "reals" or large.table["labels"].dtype == torch.float32


def test_columns_that_are_not_read_are_named_and_rows_without_a_text_refused():
    with pytest.warns(UserWarning, match=r"only 'text' and 'label' is read, and 'idx' not"):
        labelled_rows({"text": ["a", "b"], "label": [0, 1], "idx": [5, 6]}, tokenizer(), 9)
    with pytest.raises(DistillError, match=r"row 1 of the data has None as 'text'"):
        labelled_rows({"text": ["a", None], "label": [0, 1]}, tokenizer(), 9)
    with pytest.raises(DistillError, match=r"row 1 of the data has no 'label'"):
        labelled_rows([{"text": "a", "label": 1}, {"text": "b"}], tokenizer(), 9)
    for data in ({"input_ids": [[1]], "text": ["a"]}, {"x": [1]}, {"text": [3]}, [], 5, None, torch.zeros(2)):
        assert text_columns(data) == ()


@pytest.mark.parametrize("form", FORMS)
def test_pairs_are_rows_that_the_tokenizer_joins(form, tmp_path, monkeypatch):
    others = [text[::-1] for text in TEXTS]
    data = FORMS[form]({"premise": list(TEXTS), "hypothesis": others, "label": list(LABELS)})
    assert text_columns(data) == ("premise", "hypothesis")
    numbers = [("negative", "positive").index(label) for label in LABELS]
    expected = tokenize_texts(tokenizer(), list(zip(TEXTS, others, strict=True)), numbers, 300)
    assert alike(labelled_rows(data, tokenizer(), 300), expected)
    monkeypatch.setattr(on_disk, "LARGE", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert alike(labelled_rows(data, tokenizer(), 300), expected)


def test_a_data_set_without_rows_is_named():
    with pytest.raises(DistillError, match="the data has no rows; give at least one"):
        labelled_rows(datasets.Dataset.from_dict({"text": ["a"]}).select([]), tokenizer(), 9)
