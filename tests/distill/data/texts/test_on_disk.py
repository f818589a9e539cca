"""Tokens of large data sets lie on disk: those that the same texts have in memory, made once."""

import datasets
import pytest
import torch

from distill import DistillError
from distill.data.sources import arrow
from distill.data.sources.lazy_columns import LazyColumn, lengths_of
from distill.data.texts import on_disk
from distill.data.texts.language import Reader
from distill.data.texts.on_disk import rows_on_disk
from distill.data.texts.reading import text_rows
from tests.distill.data.texts.tokenizers import CHATML, CORPUS, tokenizer

CHATS = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes."}]} for text in CORPUS]
KINDS = {
    "texts": datasets.Dataset.from_dict({"text": [text * (1 + number % 3) for number, text in enumerate(CORPUS)]}),
    "chats": datasets.Dataset.from_list(CHATS),
    "prompts": datasets.Dataset.from_dict({"prompt": CORPUS, "completion": [" no." for _ in CORPUS]}),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A folder of the cache of one's own, in which all data is large."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(arrow, "IN_MEMORY", 0)
    monkeypatch.setattr(on_disk, "AT_ONCE", 5)
    return tmp_path / "distill"


@pytest.mark.filterwarnings("ignore:.*no token to learn")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packing", [None, "in order"])
def test_tokens_on_disk_are_those_in_memory(kind, packing, cache, monkeypatch):
    if packing is not None:  # documents are packed with those beside them
        monkeypatch.setattr(on_disk, "AT_ONCE", 10**6)
    found = text_rows(KINDS[kind])
    reader = Reader(tokenizer("bytes", CHATML), packing=packing, block_size=None if packing is None else 48)
    expected, rows = reader.rows(found), rows_on_disk(found, reader)
    assert isinstance(rows.table["input_ids"], LazyColumn)
    assert set(rows.columns) == set(expected.columns)
    assert len(rows) == len(expected)
    numbers = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:9]
    for name, column in expected.batch(numbers).items():
        assert rows.batch(numbers)[name].equal(column), name
    assert lengths_of(rows.table["input_ids"]).equal(lengths_of(expected.table["input_ids"]))


def test_tokens_are_made_once_for_each_tokenizer_length_and_data(cache, monkeypatch):
    made, tokenized = [], on_disk.tokenized
    monkeypatch.setattr(on_disk, "tokenized", lambda *given: made.append(1) or tokenized(*given))

    def files(data=KINDS["texts"], reads=tokenizer("bytes"), **settings) -> int:  # noqa: B008
        rows_on_disk(text_rows(data), Reader(reads, **settings))
        return len(list(cache.glob("*.arrow")))

    assert files() == 1
    calls = len(made)
    assert files() == 1
    assert len(made) == calls
    assert files(reads=tokenizer("words")) == 2
    assert files(max_length=500) == 3
    assert files(data=KINDS["texts"].select(range(8))) == 4
    assert not list(cache.glob("tmp*"))


def test_what_is_cut_and_what_has_nothing_to_learn_is_said_each_time():
    data = datasets.Dataset.from_dict({"text": [*CORPUS, "the cat " * 60], "idx": range(len(CORPUS) + 1)})
    for _ in range(2):
        with pytest.warns(UserWarning, match="of the data") as said:
            rows_on_disk(text_rows(data), Reader(tokenizer(), max_length=40))
        texts = " ".join(str(each.message) for each in said)
        assert "'idx' not" in texts
        assert f"1 of {len(data)} rows of the data have more than 40 tokens" in texts
    with pytest.raises(DistillError, match=r"row 1 of the data has None as 'text'"):
        rows_on_disk(text_rows(datasets.Dataset.from_dict({"text": ["a", None]})), Reader(tokenizer()))


def test_a_full_disk_is_named_and_nothing_stays(cache, monkeypatch):
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("no folder", encoding="utf-8")
    with pytest.raises(DistillError, match=r"tokens of the data cannot be kept in .*HF_DATASETS_CACHE=/path"):
        rows_on_disk(text_rows(KINDS["texts"]), Reader(tokenizer()))
