"""Data sets are opened by a path, a pattern, a list of files, or an id of the hub, each in its splits."""

import datasets
import pytest

from distill import DistillError
from distill.data.sources import opening
from distill.data.sources.opening import large_file, splits_of

TEXTS = [f"cat number {number}" for number in range(9)]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The same texts in all kinds of files, in a folder that is the current one."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    data = datasets.Dataset.from_dict({"text": TEXTS})
    data.to_parquet("a.parquet")
    data.select(range(3)).to_parquet("b.parquet")
    data.to_json("a.jsonl")
    data.to_json("b.jsonl.gz", compression="gzip")
    data.to_csv("a.csv")
    data.to_csv("a.tsv", sep="\t")
    (tmp_path / "here" / "a.txt").write_text("\n".join([*TEXTS, "  ", ""]), encoding="utf-8")
    data.save_to_disk("saved")
    datasets.DatasetDict(train=data, test=data.select([0]), validation=data.select([1, 2])).save_to_disk("splits")
    (tmp_path / "here" / "empty").mkdir()
    return tmp_path / "here"


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        ("a.parquet", 9),
        ("*.parquet", 12),
        (["b.parquet", "a.parquet"], 12),
        (["a.jsonl", "a.jsonl"], 18),
        ("*.jsonl.gz", 9),
        (["a.csv"], 9),
        (["a.tsv"], 9),
        (["a.txt"], 9),
        ("saved", 9),
        ("splits", 9),
    ],
)
def test_texts_are_found_in_their_order(data, rows, files):
    found = splits_of(data).to_train_on
    texts = list(found["text"])
    assert len(texts) == rows
    assert texts[:9] == (TEXTS[:3] + TEXTS)[:9] if data == ["b.parquet", "a.parquet"] else texts[:9] == TEXTS
    assert found.cache_files


def test_splits_are_those_that_users_expect(files):
    found = splits_of("splits")
    assert (len(found.train), len(found.held_out)) == (9, 2)
    data = splits_of("saved").train
    assert splits_of(datasets.DatasetDict(train=data, test=data.select([0]))).held_out.num_rows == 1
    assert splits_of({"test": data}).to_train_on is data
    with pytest.raises(DistillError, match=r"a DatasetDict has the splits 'a', 'b' and none called 'train'"):
        assert splits_of(datasets.DatasetDict(a=data, b=data)).to_train_on


def test_other_data_is_not_opened(files):
    for data in ("a.jsonl", "a.csv", "pvr", "none.csv", "./none/here", {"x": [1]}, [1, 2], [], None, 3):
        assert splits_of(data) is None


def test_an_id_of_the_hub_is_loaded_from_there(files, monkeypatch):
    asked, splits = [], datasets.load_from_disk("splits")
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or splits)
    assert len(splits_of("org/films").to_train_on) == 9
    assert asked == ["org/films"]
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DistillError, match=r"org/films cannot be read \(Conn.*HF_HUB_OFFLINE is set.*unset it"):
        splits_of("org/films")


def test_large_files_of_text_are_read_through_arrow(files, monkeypatch):
    assert large_file("a.txt") is None
    monkeypatch.setattr(opening, "LARGE", 0)
    assert list(large_file("a.txt").train["text"]) == TEXTS
    assert large_file("none.txt") is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("none*.txt", r"data='none\*\.txt' matches no file in .*correct the pattern"),
        ("empty", r"empty is a folder without a data set"),
        (["a.csv", "a.txt"], r"files of the kinds '\.csv', '\.txt'; give files of one kind"),
        (["a.csv", "none.csv"], r"none\.csv does not exist; leave it out"),
        (["a.exe"], r"a\.exe does not exist"),
    ],
)
def test_what_cannot_be_opened_is_named(data, message, files):
    with pytest.raises(DistillError, match=message):
        splits_of(data)


def test_a_damaged_file_is_named(files):
    (files / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(DistillError, match=r"bad\.parquet cannot be read \(\w+: .*; correct it, or open it yourself"):
        splits_of("bad.parquet")
