import gzip

import datasets
import pytest
from transformers import BertTokenizerFast

from distill.errors import DistillError
from distill.tasks import load, sst2

LINES = "sentence\tlabel\n\"quoted '' and odd\t1\nit 's slow \t0\na charming film \t1\n"


@pytest.fixture
def tokenizer(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "charming", "film", "it", "slow"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.tsv.gz").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "dev.tsv").write_text(LINES)
    return tmp_path


def test_a_folder_is_read_without_quoting(folder, tokenizer):
    task = load("sst2", data=folder, tokenizer=tokenizer)
    assert task.classes == ("negative", "positive")
    assert task.train.table["labels"].tolist() == task.test.table["labels"].tolist() == [1, 0, 1]
    assert {"input_ids", "attention_mask", "special_tokens_mask", "labels"} <= set(task.train.columns)
    row = task.test[2]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"].tolist()) == ["[CLS]", "a", "charming", "film", "[SEP]"]
    assert row["special_tokens_mask"].tolist() == [1, 0, 0, 0, 1]
    assert task.example(2) == "a charming film → positive"
    assert len(load("sst2", data=folder, tokenizer=tokenizer, fraction=0.4).train) == 1


def test_the_hub_is_asked_where_no_folder_is_given(monkeypatch, tokenizer):
    asked = []

    def loader(*names):
        asked.append(names)
        part = datasets.Dataset.from_dict({"sentence": ["a film", "slow"], "label": [1, 0], "idx": [0, 1]})
        return datasets.DatasetDict(train=part, validation=part.select([1]))

    monkeypatch.setattr(datasets, "load_dataset", loader)
    task = load("sst2", tokenizer=tokenizer)
    assert asked == [("nyu-mll/glue", "sst2")]
    assert (len(task.train), len(task.test), task.test[0]["labels"].item()) == (2, 1, 0)


def test_a_hub_out_of_reach_names_the_folder(monkeypatch, tokenizer):
    def loader(*names):
        raise ConnectionError("Couldn't reach the Hub\nwith more lines")

    monkeypatch.setattr(datasets, "load_dataset", loader)
    with pytest.raises(DistillError, match=r"ConnectionError: Couldn't reach the Hub; .* --data FOLDER$"):
        sst2.task(None, tokenizer)


def test_a_folder_that_lacks_something_says_what(tmp_path, folder, tokenizer):
    with pytest.raises(DistillError, match="nowhere is not a folder"):
        load("sst2", data=tmp_path / "nowhere", tokenizer=tokenizer)
    with pytest.raises(DistillError, match="needs a tokenizer, and none was given"):
        load("sst2", data=folder)
    (folder / "dev.tsv").write_text("sentence\tlabel\nx\t-1\n")
    with pytest.raises(DistillError, match="labels other than 0 and 1: -1"):
        load("sst2", data=folder, tokenizer=tokenizer)
    (folder / "dev.tsv").unlink()
    with pytest.raises(DistillError, match=r"no dev.tsv or dev.tsv.gz"):
        load("sst2", data=folder, tokenizer=tokenizer)


def test_the_real_files(shared_data, tokenizer):
    task = load("sst2", data=shared_data / "sst2", tokenizer=tokenizer, fraction=0.01)
    assert (len(task.train), len(task.test)) == (673, 872)
    assert task.majority == pytest.approx(444 / 872)
