"""Texts, and pairs of texts, as rows of tokens and tasks of classification."""

import json

import pytest
import torch

from distill import DistillError, fit
from distill.data.text import tokenize_texts
from distill.tasks import load
from tests.distill.data.texts.tokenizers import tokenizer, trained
from tests.distill.tiny_models import QUIET, bert_with, spread

PAIRS = [(f"the cat {number}", "It is a dog!" * (number % 3 + 1), "ab"[number % 2]) for number in range(20)]


def pairing():
    """A tokenizer that joins pairs as BERT's does."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer.from_str(trained("bytes").to_str())
    made.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0 </s>:0", pair="<s>:0 $A:0 </s>:0 $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                   model_input_names=names)  # fmt: skip


def written(path, names, rows):
    if path.suffix == ".csv":
        lines = [",".join(names), *(",".join(f'"{value}"' for value in row) for row in rows)]
    else:
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    path.write_text("\n".join(lines))
    return path


def test_a_pair_is_what_the_tokenizer_makes_of_it():
    reader = pairing()
    rows = tokenize_texts(reader, [pair[:2] for pair in PAIRS], [0] * 20)
    for (one, other, _), row in zip(PAIRS, rows, strict=True):
        alone = reader(one, other)
        assert row["input_ids"].tolist() == alone["input_ids"]
        assert row["token_type_ids"].tolist() == alone["token_type_ids"]
        assert row["token_type_ids"].sum() == len(reader(other, add_special_tokens=False)["input_ids"]) + 1


def test_the_longer_text_of_a_pair_is_cut_with_a_line():
    reader = pairing()
    with pytest.warns(UserWarning, match="1 of 2 texts have more than 12 tokens and are cut there"):
        rows = tokenize_texts(reader, [("no", "the cat likes the bird " * 9), ("no", "yes.")], None, 12)
    assert len(rows[0]["input_ids"]) == 12
    assert (rows[0]["token_type_ids"] == 0).sum() == len(reader("no")["input_ids"])


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("names", [("premise", "hypothesis"), ("sentence1", "sentence2"), ("a", "b")])
def test_a_file_of_pairs_is_a_task(tmp_path, names, suffix):
    path, reader = written(tmp_path / f"x{suffix}", (*names, "label"), PAIRS), pairing()
    task = load(data=path, tokenizer=reader, **({"text": names} if names == ("a", "b") else {}))
    assert (task.classes, len(task.train), len(task.test)) == (("a", "b"), 16, 4)
    wanted = {tuple(reader(one, other)["input_ids"]): "ab".index(label) for one, other, label in PAIRS}
    for row in [*task.train, *task.test]:
        assert wanted[tuple(row["input_ids"].tolist())] == row["labels"]
    others = [(two, one, label) for one, two, label in PAIRS[:6]]
    file = written(tmp_path / f"y{suffix}", (*names, "label"), others)
    tested = load(data=path, eval_data=file, tokenizer=reader, text=names)
    assert [row["input_ids"].tolist() for row in tested.test] == [reader(*row[:2])["input_ids"] for row in others]


def test_pairs_without_labels_and_a_column_of_texts_that_comes_first(tmp_path):
    reader = pairing()
    path = written(tmp_path / "x.csv", ("premise", "hypothesis"), [pair[:2] for pair in PAIRS])
    task = load(data=path, tokenizer=reader)
    assert task.classes == ()
    assert "labels" not in task.train.columns
    path = written(tmp_path / "y.csv", ("text", "sentence1", "sentence2", "label"), [(row[0], *row) for row in PAIRS])
    assert load(data=path, tokenizer=reader).train[0]["token_type_ids"].sum() == 0


def test_a_student_is_trained_on_pairs(tmp_path):
    path = written(tmp_path / "x.csv", ("premise", "hypothesis", "label"), PAIRS)
    sizes = {"vocab_size": 400, "max_position_embeddings": 80, "id2label": {0: "a", 1: "b"}}
    teacher, student = (spread(bert_with("SequenceClassification", 1, **sizes), seed) for seed in range(2))
    result = fit(teacher, student, {}, path, steps=2, batch_size=4, tokenizer=pairing(), console=QUIET)
    assert result.evaluation.accuracy.count == 4
    assert torch.isfinite(torch.tensor(result.records[-1].loss))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": ("premise",)}, r"names 1 columns; name one of texts, .* or two of pairs"),
        ({"text": ("premise", "other")}, "has no text column 'other'"),
        ({"name": "text", "text": ("premise", "hypothesis")}, "a language model reads a text a row"),
    ],
)
def test_columns_that_are_no_pair(tmp_path, settings, message):
    path = written(tmp_path / "x.csv", ("premise", "hypothesis", "label"), PAIRS)
    with pytest.raises(DistillError, match=message):
        load(data=path, tokenizer=tokenizer(), **settings)
