import csv
import gzip
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.data import files
from distill.errors import DistillError
from distill.tasks import load
from distill.training.fingerprints import of_data


@pytest.fixture(scope="module")
def tokenizer():
    """One id a word, without a download."""
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "good", "bad", "film", "very"])}
    model = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64)


TEXTS = ["good film", 'bad, "very" bad', "two\nlines, one field", "gut — für Zoë", "very very good film"] * 4
LABELS = ["yes", "no", "no", "yes", "yes"] * 4


def write(path, texts=TEXTS, labels=LABELS, names=("text", "label"), encoding="utf-8"):
    if ".jsonl" in path.name:
        rows = [dict(zip(names, pair, strict=True)) for pair in zip(texts, labels, strict=True)]
        content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        raw = content.encode(encoding)
    else:
        part = path.with_suffix(".part")
        with open(part, "w", newline="", encoding=encoding) as file:
            writer = csv.writer(file, delimiter="\t" if ".tsv" in path.name else ",")
            writer.writerow(names)
            writer.writerows(zip(texts, labels, strict=True))
        raw = part.read_bytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("name", ["my.csv", "my.tsv", "my.jsonl", "my.csv.gz", "my.jsonl.gz"])
def test_every_kind_of_file_gives_the_texts_that_were_written(tmp_path, name, encoding):
    path = write(tmp_path / name, encoding=encoding)
    assert files.labelled(path) == (TEXTS, LABELS)


def test_a_tsv_with_bare_quotation_marks_is_read_as_it_stands(tmp_path):
    path = tmp_path / "glue.tsv"
    path.write_text('sentence\tlabel\n"good" film\t1\nbad " film\t0\n')
    assert files.labelled(path) == (['"good" film', 'bad " film'], ["1", "0"])


def test_a_file_becomes_a_task(tmp_path, tokenizer):
    task = load(data=write(tmp_path / "my.reviews.csv"), tokenizer=tokenizer)
    assert (task.name, task.classes, task.network) == ("my", ("no", "yes"), None)
    assert (len(task.train), len(task.test)) == (16, 4)
    assert task.train.columns[-1] == "labels"
    assert {"input_ids", "attention_mask", "special_tokens_mask"} < set(task.train.columns)
    assert task.train.batch(range(16))["input_ids"].shape[1] > 2


def test_texts_and_labels_stay_together(tmp_path, tokenizer):
    texts = ["good film", "bad"] * 10
    task = load(data=write(tmp_path / "my.csv", texts, ["up", "down"] * 10), tokenizer=tokenizer)
    allowed = {("good film", "up"), ("bad", "down")}
    for rows in (task.train, task.test):
        assert {(tokenizer.decode(row["input_ids"]), task.classes[row["labels"]]) for row in rows} == allowed
    assert task.example(0) in {"good film → up", "bad → down"}


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["10", "9", "2"], ("2", "9", "10")),
        ([10, 9, 2], ("2", "9", "10")),
        (["b", "10", "a"], ("10", "a", "b")),
        (["01", "1", "0"], ("0", "1")),
    ],
)
def test_classes_are_sorted_numbers_by_value(tmp_path, tokenizer, labels, classes):
    path = write(tmp_path / "my.jsonl", ["good"] * 12, labels * 4)
    assert load(data=path, tokenizer=tokenizer).classes == classes


def test_the_held_out_share_is_stratified_seeded_and_disjoint():
    labels = [0] * 50 + [1] * 10 + [2]
    train, test = files.held_out(labels, 0.2, seed=0)
    assert sorted(train + test) == list(range(61))
    assert [sum(labels[i] == c for i in test) for c in range(3)] == [10, 2, 0]
    assert (train, test) == files.held_out(labels, 0.2, seed=0)
    assert test != files.held_out(labels, 0.2, seed=1)[1]


def test_a_fraction_shrinks_training_alone(tmp_path, tokenizer):
    path = write(tmp_path / "my.csv")
    whole, half = (load(data=path, tokenizer=tokenizer, fraction=fraction) for fraction in (1.0, 0.5))
    assert (len(half.train), len(half.test)) == (8, 4)
    assert half.test.batch(range(4))["input_ids"].tolist() == whole.test.batch(range(4))["input_ids"].tolist()


@pytest.mark.parametrize("apart", [False, True], ids=["held out", "a file of its own"])
def test_a_column_says_which_rows_are_related(tmp_path, tokenizer, apart):
    """Rows have one cluster exactly where their speakers are one, in training and in tests; models do not read it."""
    words = ["good", "bad", "film", "very"]
    texts = [" ".join((first, second, third)) for first in words for second in words for third in words]
    speakers = {text: f"speaker {number % 7}" for number, text in enumerate(texts)}

    def table(path, texts):
        rows = [f"{text},{'yes' if 'good' in text else 'no'},{speakers[text]}" for text in texts]
        path.write_text("\n".join(["text,label,speaker", *rows]))
        return path

    eval_data = table(tmp_path / "tests.csv", texts[::4]) if apart else None
    data = table(tmp_path / "my.csv", [text for i, text in enumerate(texts) if i % 4 or not apart])
    task = load(
        data=data, eval_data=eval_data, tokenizer=tokenizer, clusters="speaker", fraction=0.5, classes=["no", "yes"]
    )
    assert task.clusters == "speaker"
    for rows in (task.train, task.test):
        found = {}
        for row, (number,) in zip(rows, rows.clusters.tolist(), strict=True):
            speaker = speakers[tokenizer.decode(row["input_ids"])]
            assert found.setdefault(speaker, number) == number
        assert len(set(found.values())) == len(found) > 1
    plain = load(data=data, eval_data=eval_data, tokenizer=tokenizer, fraction=0.5, classes=["no", "yes"])
    assert of_data(plain.train) == of_data(task.train)
    assert (plain.clusters, plain.test.clusters) == ("", None)


def test_a_column_of_clusters_that_is_not_there(tmp_path, tokenizer):
    with pytest.raises(DistillError, match="has no clusters column 'speaker': its columns are 'text', 'label'"):
        load(data=write(tmp_path / "my.csv"), tokenizer=tokenizer, clusters="speaker")
    with pytest.raises(DistillError, match="task 'pvr' takes no clusters"):
        load("pvr", clusters="speaker")


def test_eval_data_is_the_test(tmp_path, tokenizer):
    train, test = write(tmp_path / "a.csv"), write(tmp_path / "b.jsonl", ["bad", "good"], ["no", "no"])
    task = load(data=train, eval_data=test, tokenizer=tokenizer)
    assert (len(task.train), len(task.test)) == (20, 2)
    assert task.test.table["labels"].tolist() == [0, 0]


def test_other_column_names(tmp_path, tokenizer):
    path = write(tmp_path / "my.csv", names=("review", "stars"))
    assert load(data=path, tokenizer=tokenizer, text="review", label="stars").classes == ("no", "yes")
    found = "no text column 'text' or 'sentence': its columns are 'review', 'stars'; name one with text="
    with pytest.raises(DistillError, match=found):
        load(data=path, tokenizer=tokenizer)
    with pytest.raises(DistillError, match="no label column 'mark'"):
        load(data=path, tokenizer=tokenizer, text="review", label="mark")


def test_texts_are_cut_and_padded_as_the_tokenizer_says(tmp_path, tokenizer):
    tokenizer.padding_side = "left"
    path = write(tmp_path / "my.csv", ["good " * 500, "bad"] * 5, [1, 0] * 5)
    try:
        with pytest.warns(UserWarning, match=r"4 of 8 texts have more than 64 tokens and are cut there; max_length=…"):
            task = load(data=path, tokenizer=tokenizer)
    finally:
        tokenizer.padding_side = "right"
    batch = task.train.batch(range(len(task.train)))
    assert batch["input_ids"].shape[1] == 64
    bad = batch["labels"] == 0
    assert (batch["input_ids"][bad][:, :-1] == tokenizer.pad_token_id).all()
    assert (batch["attention_mask"][bad][:, -1] == 1).all()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("my.csv", "", "has no rows"),
        ("my.csv", "text,label\n", "has no rows"),
        ("my.jsonl", "\n", "has no rows"),
        ("my.jsonl", "[1]\n[2]\n", "has no rows of named columns"),
        ("my.jsonl", '{"text": "a", "label": 1}\n{"text"', "not well-formed jsonl"),
        ("my.csv", 'text,label\n"open,1\n', "not well-formed csv"),
        ("my.csv", "text,label\na,b,1\n", "line 2 has 3 fields and the header 2"),
        ("my.csv", "text,label\ngood,1\n  ,0\n", r"row 2 of .* empty text \(column 'text'\)"),
        ("my.csv", "text,label\na,1\nb,1\n", "all 2 rows of .* label '1'; .* two classes"),
        ("my.csv", "text,label\na,1\nb,0\n", "no class has two rows"),
        ("my.csv", "id,body\n1,a\n", "its columns are 'id', 'body'"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DistillError, match=message) as raised:
        load(data=tmp_path / name, tokenizer=tokenizer)
    assert "\n" not in str(raised.value)
    assert ";" in str(raised.value)


def test_texts_without_labels(tmp_path, tokenizer):
    (tmp_path / "my.txt").write_text("good film\n\n  bad film \n" * 10)
    (tmp_path / "one.csv").write_text("sentence\n" + "good film\nbad film\n" * 10)
    for path in (tmp_path / "my.txt", tmp_path / "one.csv"):
        task = load(data=path, tokenizer=tokenizer)
        assert (task.classes, task.majority, len(task.train), len(task.test)) == ((), None, 16, 4)
        assert "labels" not in task.train.columns
        assert files.labelled(path) == (["good film", "bad film"] * 10, None)
    (tmp_path / "more.csv").write_text("text,verdict\n" + "good film,a\nbad film,b\n" * 10)
    with pytest.warns(UserWarning, match=r"has no label column 'label' or 'labels' \(beside 'text' it has 'verdict'\)"):
        assert load(data=tmp_path / "more.csv", tokenizer=tokenizer).classes == ()
    with pytest.raises(DistillError, match="no label column 'mark'"):
        load(data=tmp_path / "one.csv", tokenizer=tokenizer, label="mark")
    tests = write(tmp_path / "e.csv", ["bad"] * 4, ["yes", "no"] * 2)
    both = load(data=tmp_path / "my.txt", eval_data=tests, tokenizer=tokenizer)
    assert (both.classes, both.test.table["labels"].tolist()) == (("no", "yes"), [1, 0, 1, 0])
    assert "labels" not in both.train.columns


def test_texts_are_cut_where_it_is_asked(tmp_path, tokenizer):
    path = write(tmp_path / "my.csv", ["good " * 30, "bad"] * 5, [1, 0] * 5)
    with pytest.warns(UserWarning, match=r"4 of 8 texts have more than 16 tokens .*\(--max-length\)"):
        task = load(data=path, tokenizer=tokenizer, max_length=16)
    assert task.train.batch(range(8))["input_ids"].shape[1] == 16
    assert load(data=path, tokenizer=tokenizer).train.batch(range(8))["input_ids"].shape[1] == 30  # and no warning
    with pytest.raises(DistillError, match=r"max_length=0 leaves nothing of a text"):
        load(data=path, tokenizer=tokenizer, max_length=0)
    with pytest.raises(DistillError, match="task 'pvr' takes no max_length"):
        load("pvr", max_length=16)


def test_what_is_wrong_with_a_file_is_said_before_a_tokenizer_is_asked_for(tmp_path):
    with pytest.raises(DistillError, match=r"none\.csv does not exist"):
        load(data=tmp_path / "none.csv")


@pytest.mark.parametrize("mark", [";", "|", "\t"])
def test_other_marks_between_columns_are_named(tmp_path, tokenizer, mark):
    (tmp_path / "my.csv").write_text(f"text{mark}label\ngood{mark}1\nbad{mark}0\n")
    with pytest.raises(DistillError, match=r"it seems to be separated by .*; save it with commas"):
        load(data=tmp_path / "my.csv", tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["my.csv", "my.tsv"])
def test_fields_of_any_length(tmp_path, tokenizer, name):
    before = csv.field_size_limit()
    path = write(tmp_path / name, ["good " * 100_000, "bad"] * 5, ["yes", "no"] * 5)
    with pytest.warns(UserWarning, match="are cut there"):
        assert len(load(data=path, tokenizer=tokenizer).train) == 8
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("my.csv", "text,label,text\na,1,b\n"),
        ("my.csv", "text, text,label\na,b,1\n"),
        ("my.tsv", "text\tlabel\tlabel\tlabel\na\t1\t2\t3\n"),
        ("my.jsonl", '{"text": "a", "text": "b", "label": 1}\n'),
    ],
)
def test_columns_of_one_name_are_refused(tmp_path, tokenizer, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DistillError, match=r"has [23] columns called '(text|label)', and which is meant is not known"):
        load(data=tmp_path / name, tokenizer=tokenizer)


def test_columns_without_a_name_are_nobodys(tmp_path):
    (tmp_path / "my.csv").write_text(",text,label,,\n0,good,1,,\n1,bad,0,,\n")
    assert files.labelled(tmp_path / "my.csv") == (["good", "bad"], ["1", "0"])


def test_a_test_file_that_was_trained_on_is_noticed(tmp_path, tokenizer):
    path = write(tmp_path / "a.csv")
    (tmp_path / "link.csv").symlink_to(path)
    for same in (path, str(path), tmp_path / "link.csv", tmp_path / ".." / tmp_path.name / "a.csv"):
        with pytest.raises(DistillError, match="the file that is trained on, so nothing would be held out; leave"):
            load(data=path, eval_data=same, tokenizer=tokenizer)
    with pytest.warns(UserWarning, match=r"1 of the 2 texts of .*b.csv are also in .*a.csv"):
        load(data=path, eval_data=write(tmp_path / "b.csv", ["good film", "bad"], ["no", "no"]), tokenizer=tokenizer)


def test_files_of_the_wrong_kind_or_place(tmp_path, tokenizer):
    with pytest.raises(DistillError, match=r"none.csv does not exist"):
        load(data=tmp_path / "none.csv", tokenizer=tokenizer)
    with pytest.raises(DistillError, match="not a kind of file that can be read"):
        load(data=tmp_path / "my.xlsx", tokenizer=tokenizer)
    with pytest.raises(DistillError, match=r"is a folder without a data set.* --task sst2 --data"):
        load(data=tmp_path, tokenizer=tokenizer)
    (tmp_path / "latin.csv").write_bytes("text,label\nZoë,1\n".encode("latin-1"))
    with pytest.raises(DistillError, match="not utf-8"):
        load(data=tmp_path / "latin.csv", tokenizer=tokenizer)
    (tmp_path / "not.csv.gz").write_text("text,label\n")
    with pytest.raises(DistillError, match="cannot be read"):
        load(data=tmp_path / "not.csv.gz", tokenizer=tokenizer)


def test_real_values_are_read_as_such_and_not_as_classes(tmp_path, tokenizer):
    path = write(tmp_path / "a.csv", labels=(values := [f"{number / 7:.2f}" for number in range(20)]))
    task = load(data=path, tokenizer=tokenizer)
    assert task.classes == ()
    found = torch.cat([task.train.table["labels"], task.test.table["labels"]])
    assert found.sort().values.tolist() == pytest.approx(list(map(float, values)))
    other = write(tmp_path / "b.csv", ["a", "b"], ["1.5", "x"])
    with pytest.raises(DistillError, match="has the label 'x', and those that are trained on are real values"):
        load(data=path, eval_data=other, tokenizer=tokenizer)


def test_labels_of_both_files_match_whatever_their_case(tmp_path, tokenizer):
    train = write(tmp_path / "a.csv")
    task = load(data=train, eval_data=write(tmp_path / "b.csv", ["a", "b"], ["YES", " No"]), tokenizer=tokenizer)
    assert [task.classes[label] for label in task.test.table["labels"].tolist()] == ["yes", "no"]


def test_a_label_that_training_lacks_and_a_missing_teacher(tmp_path, tokenizer):
    train, test = write(tmp_path / "a.csv"), write(tmp_path / "b.csv", ["bad", "good"], ["no", "maybe"])
    with pytest.raises(DistillError, match=r"has labels that .* lacks: maybe; known are no, yes"):
        load(data=train, eval_data=test, tokenizer=tokenizer)
    with pytest.raises(DistillError, match=r"needs a tokenizer, and none was given"):
        load(data=train)
