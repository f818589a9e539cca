"""Data sets that are named are tasks: their splits, tokenized by the tokenizer of the model."""

import gzip
import json

import datasets
import numpy as np
import pandas as pd
import pytest
from transformers import AutoModelForSequenceClassification

import distill
from distill import DistillError, metrics
from distill.tasks.loading import held_out, task_of
from distill.tasks.named import tokenizer_of
from tests.distill.conftest import save_bert, sentences
from tests.distill.tiny_models import QUIET, bert


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A BERT that names no classes, with its tokenizer."""
    return AutoModelForSequenceClassification.from_pretrained(save_bert(tmp_path_factory.mktemp("m"), classifier=True))


@pytest.fixture
def films(tmp_path, monkeypatch):
    """Sentences with the names of their classes, as Parquet and as a folder of two splits."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts, labels = zip(*sentences(40), strict=True)
    data = datasets.Dataset.from_dict({"sentence": texts, "label": labels})
    data.to_parquet(tmp_path / "films.parquet")
    datasets.DatasetDict(train=data.select(range(30)), test=data.select(range(30, 40))).save_to_disk(tmp_path / "saved")
    return tmp_path


@pytest.mark.filterwarnings("ignore:the model does not name its classes")
def test_a_data_set_in_one_part_is_divided_and_one_in_splits_is_not(films, classifier):
    task, split = (task_of(films / name, classifier) for name in ("films.parquet", "saved"))
    assert (len(task.train), len(task.test)) == (32, 8)
    assert (len(split.train), len(split.test)) == (30, 10)
    assert task.classes == split.classes == ("negative", "positive")
    assert not task.train.take([0])[0]["input_ids"].equal(task.test[0]["input_ids"])
    assert len(held_out(films / "films.parquet", classifier)) == 40
    assert len(held_out(str(films / "saved"), classifier)) == 10


@pytest.mark.filterwarnings("ignore:the model does not name its classes")
def test_a_student_is_trained_and_measured_on_a_folder(films, classifier):
    student = distill.from_layers(classifier, [0])
    result = distill.fit(classifier, student, {}, str(films / "saved"), steps=3, console=QUIET)
    assert result.evaluation.accuracy is not None
    assert metrics.accuracy(student, str(films / "saved")) == result.evaluation.accuracy


@pytest.mark.filterwarnings("ignore:the model does not name its classes")
@pytest.mark.parametrize("form", ["hub", "dict", "frame"])
def test_texts_in_memory_are_read_by_the_tokenizer_of_the_teacher(form, films, classifier):
    data = datasets.load_from_disk(films / "saved")["train"]
    data = data if form == "hub" else data.to_dict() if form == "dict" else data.to_pandas()
    student = distill.from_layers(classifier, [0])
    result = distill.fit(classifier, student, {}, data, steps=2, console=QUIET)
    assert len(result.records) == 2


NAMED = ("saved", "parts", "parts/*.csv", "films.parquet", ["one.csv"])
MEMORY = ("data set", "frame", "columns", "rows")


def given(form, films):
    """The sentences as a data set that is named, or in memory."""
    data = datasets.load_from_disk(films / "saved")["train"]
    if form in MEMORY:
        frame = data.to_pandas()
        return {"data set": data, "frame": frame, "columns": data.to_dict(), "rows": frame.to_dict("records")}[form]
    (films / "parts").mkdir(exist_ok=True)
    for path, rows in (("parts/a.csv", range(20)), ("parts/b.csv", range(20, 30)), ("one.csv", range(30))):
        data.select(rows).to_csv(films / path)
    return [films / each for each in form] if isinstance(form, list) else str(films / form)


@pytest.mark.parametrize("form", [*NAMED, *MEMORY], ids=str)
def test_load_makes_a_task_of_classes_of_any_form_as_of_a_file(form, films, classifier):
    tokenizer = tokenizer_of(classifier)
    data = given(form, films)
    task = distill.tasks.load(data=data, tokenizer=tokenizer)
    names = [task.classes[number] for rows in (task.train, task.test) for number in rows.table["labels"].tolist()]
    ids = [tuple(row["input_ids"].tolist()) for rows in (task.train, task.test) for row in rows]
    assert set(zip(ids, names, strict=True)) <= {(tuple(tokenizer(text)["input_ids"]), n) for text, n in sentences(40)}
    assert len(ids) == (40 if form in ("saved", "films.parquet") else 30)
    assert task.name in ("saved", "parts", "films", "one", "data")
    half = distill.tasks.load(data=data, tokenizer=tokenizer, fraction=0.5, classes=["positive", "negative"])
    assert half.classes == ("positive", "negative")
    assert len(half.train) == len(task.train) // 2
    assert len(half.test) == len(task.test)
    flipped = {tuple(row["input_ids"].tolist()): int(row["labels"]) for row in half.test}
    assert all(1 - flipped[tuple(row["input_ids"].tolist())] == int(row["labels"]) for row in task.test)


def test_numbers_are_the_classes_of_a_pattern_as_of_a_file(films, classifier):
    tokenizer = tokenizer_of(classifier)
    frame = given("frame", films)
    frame = frame.assign(
        label=[2 * (name == "positive") for name in frame["label"]], speaker=[i // 3 for i in range(30)]
    )
    frame.to_csv(films / "numbers.csv", index=False)
    one, other = (
        distill.tasks.load(data=data, tokenizer=tokenizer, clusters="speaker", eval_data=films / "numbers.csv")
        if not isinstance(data, str)
        else distill.tasks.load(data=data, tokenizer=tokenizer, clusters="speaker", eval_data=frame)
        for data in ([films / "numbers.csv"], str(films / "numbers*.csv"))
    )
    assert one.classes == other.classes == ("0", "2")
    assert one.clusters == "speaker"
    assert one.train.table["labels"].equal(other.test.table["labels"])
    assert one.train.clusters is not None
    assert one.train.clusters.equal(other.train.clusters)
    frame = frame.drop(columns="speaker").assign(label=[i / 7 for i in range(30)])
    values = distill.tasks.load(data=frame, tokenizer=tokenizer)
    assert values.classes == ()
    assert values.train.table["labels"].is_floating_point()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "body"}, r"has no text column 'body': its columns are 'sentence', 'label'; name one with text="),
        ({"label": "class"}, r"has no label column 'class': its columns are"),
        ({"clusters": "speaker"}, r"has no clusters column 'speaker'"),
        ({"tokenizer": None}, "needs a tokenizer, and none was given"),
        ({"packing": "in order"}, "takes no packing"),
        ({"label": "sentence"}, "text and label of .* are both the column 'sentence'"),
    ],
)
def test_a_column_that_a_data_set_lacks_is_named(settings, message, films, classifier):
    data = given("parts/*.csv", films)
    with pytest.raises(DistillError, match=message) as raised:
        distill.tasks.load(**{"data": data, "tokenizer": tokenizer_of(classifier), **settings})
    assert "\n" not in str(raised.value)


def test_a_text_of_a_table_is_a_text_whatever_it_says(films, classifier):
    (films / "a.csv").write_text("text,label\nNone,NA\nnull,b\nnan,NA\n,b\n"[:-3], encoding="utf-8")
    task = distill.tasks.load(data=[films / "a.csv"], tokenizer=tokenizer_of(classifier))
    assert task.classes == ("NA", "b")


def test_texts_need_a_tokenizer(films):
    with pytest.raises(DistillError, match=r"needs a tokenizer, and none was given or is saved with a teacher"):
        distill.fit(bert(2), bert(1), {}, str(films / "saved"), steps=1, console=QUIET)


FILMS = "".join(f"{text},{label}\n" for text, label in sentences(12))
FORMS_OF_A_FILE = {
    "bom": ("a.csv", "\ufefftext,label\n" + FILMS),
    "crlf": ("a.csv", ("text,label\n" + FILMS).replace("\n", "\r\n")),
    "tabs": ("a.tsv", ("text,label\n" + FILMS).replace(",", "\t")),
    "spaces": ("a.csv", "text,label\n" + "".join(f"{text}, {label} \n" for text, label in sentences(12))),
    "gz": ("a.csv.gz", "text,label\n" + FILMS),
    "nested": ("x/y/a.csv", "text,label\n" + FILMS),
}


def written(folder, name, content):
    """Write a file in utf-8, by gzip where its name says so."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("form", FORMS_OF_A_FILE)
@pytest.mark.parametrize("way", ["file", "folder", "list"])
def test_what_programs_write_is_read_alike_by_all_entry_points(way, form, tmp_path, classifier, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = written(tmp_path / "data", *FORMS_OF_A_FILE[form])
    data = {"file": path, "folder": tmp_path / "data", "list": [path]}[way]
    tokenizer = tokenizer_of(classifier)
    task = distill.tasks.load(data=data, tokenizer=tokenizer)
    assert task.classes == ("negative", "positive")
    found = {(tuple(row["input_ids"].tolist()), int(row["labels"])) for rows in (task.train, task.test) for row in rows}
    assert found == {(tuple(tokenizer(text)["input_ids"]), int(label == "positive")) for text, label in sentences(12)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.csv": "text,label\nZoë,1\n".encode("latin-1")}, "a.csv cannot be read .UnicodeDecodeError: 'utf-8' codec"),
        ({"a.csv": ""}, "cannot be read .EmptyDataError: No columns"),
        ({"a.csv": "text,label\n"}, "a.csv has no rows"),
        ({"a.csv": "text,label\ngood,positive\n"}, "all 1 rows of .*a.csv have the label 'positive'"),
        ({"a.csv": "text,label,label\n" + FILMS}, "has 2 columns called 'label', and which is meant"),
        ({"a.csv": "text,label\n" + FILMS + "a,b,c\n"}, "ParserError: .* Expected 2 fields in line 14, saw 3"),
        ({"a.csv": "text;label\ngood;1\n"}, "seems to be separated by ';'"),
        ({"a.csv": "review,mark\ngood,1\n"}, "has no text column 'text' or 'sentence': its columns are 'review'"),
        ({"a.csv": "text,label\n" + FILMS, "b.csv": "sentence,label\nx,y\n"}, "b.csv has the columns 'sentence'"),
        ({"a.csv": "text,label\n" + FILMS, "b.jsonl": "{}"}, "of the kinds '.csv', '.jsonl'"),
        ({"a.jsonl": '{"text": "a", "label": 1}\n{"text": \n'}, "ArrowInvalid: JSON parse error"),
        ({"a.parquet": FILMS}, "a.parquet cannot be read"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_are_refused_in_one_line(files, message, tmp_path, classifier, monkeypatch, capfd):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    paths = [written(tmp_path / "data", name, content) for name, content in files.items()]
    with pytest.raises(DistillError, match=message) as raised:
        distill.tasks.load(data=paths, tokenizer=tokenizer_of(classifier))
    assert "\n" not in str(raised.value)
    assert "Failed to" not in capfd.readouterr().err
    if len({path.suffix for path in paths}) > 1:
        with pytest.raises(DistillError, match=r"has files of the kinds .*give a pattern: data='.*\*\.csv'"):
            distill.tasks.load(data=tmp_path / "data", tokenizer=tokenizer_of(classifier))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (5, "the data is a int and has no columns of texts"),
        (b"abc", "the data is a bytes and has no columns"),
        (np.zeros((3, 2)), "the data is a ndarray and has no columns"),
        ([["a", 1]], "the data is a list and has no columns"),
        ({"text": "a", "label": 1}, "column 'text' is 'a'; give a value a row"),
        ({"text": [1, 2], "label": [0, 1]}, "has no text column|which is no text"),
        (pd.DataFrame({"text": [], "label": []}), "the data has no rows"),
        (pd.DataFrame([["a", 1, 1]], columns=["text", "label", "label"]), "has 2 columns called 'label'"),
        ("nowhere/nothing.csv", "does not exist"),
        ("./nowhere", "does not exist; give a file, a folder or a pattern"),
        ("nowhere/*.csv", "matches no file in"),
    ],
    ids=str,
)
def test_data_in_memory_that_is_no_table_of_texts_is_refused_in_one_line(data, message, classifier):
    with pytest.raises(DistillError, match=message) as raised:
        distill.tasks.load(data=data, tokenizer=tokenizer_of(classifier))
    assert "\n" not in str(raised.value)


def test_several_labels_a_row_are_read_from_a_list_of_files(tmp_path, classifier, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [json.dumps({"text": text, "label": [1, int(label == "positive")]}) for text, label in sentences(12)]
    path = written(tmp_path, "a.jsonl", "\n".join(rows))
    task = distill.tasks.load(data=[path], tokenizer=tokenizer_of(classifier))
    assert task.classes == ()
    assert task.train.table["labels"].shape == (10, 2)
    with pytest.raises(DistillError, match=r"row 1 of .* are several; give the file in a list.*data=\['.*a.jsonl'\]"):
        distill.tasks.load(data=path, tokenizer=tokenizer_of(classifier))


def test_columns_of_other_names_are_named_by_fit(films, classifier):
    student = distill.from_layers(classifier, [0])
    with pytest.raises(DistillError, match="no text column 'text' or 'sentence': its columns are 'review', 'mark'"):
        distill.fit(classifier, student, {}, {"review": ["a"], "mark": ["b"]}, steps=1, console=QUIET)
