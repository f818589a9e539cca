"""A training on a stream sees its rows in order, whatever form they have, and goes on where it was."""

import pytest
import torch
from datasets import ClassLabel, Features, Value
from datasets import Dataset as HubDataset
from torch.utils.data import IterableDataset
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

import distill
from distill import CRD, KD, CausalLM, DistillError, Labels, Rows, Schedule
from distill.tasks import numbered_as
from distill.tasks.named import texts_read
from distill.tasks.streams import LOOKED_AT, streamed
from tests.distill.conftest import save_bert, sentences
from tests.distill.data.texts.tokenizers import tokenizer
from tests.distill.tiny_models import QUIET, mlp, same, spread, vectors, weights

ROWS = 45
WORDS = "the cat is on a mat and it sees what no dog will see".split()
TEXTS = [" ".join(WORDS[i % 5 : 3 + i % 11]) for i in range(ROWS)]
CHATS = [{"prompt": f"{text}:", "completion": " yes." if i % 4 else ""} for i, text in enumerate(TEXTS)]


class Own(IterableDataset):
    """Rows in order, with a state; counts those that were read."""

    def __init__(self, rows):
        self.rows, self.at, self.read = rows, 0, []

    def __iter__(self):
        while self.at < len(self.rows):
            self.at += 1
            self.read.append(self.at - 1)
            yield self.rows[self.at - 1]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def hub(rows):
    return HubDataset.from_list(rows).to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=7)


def numbers(count=ROWS):
    rows = vectors(count)
    return [{"inputs": row["inputs"].tolist(), "label": int(row["labels"])} for row in rows]


def language_models(reader):
    config = GPT2Config(vocab_size=len(reader), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return spread(GPT2LMHeadModel(config)), spread(GPT2LMHeadModel(config), 1)


FORMS = {
    "numbers": (lambda: numbers(), lambda: (spread(mlp()), spread(mlp(), 1)), None),
    "texts": (lambda: [{"text": text} for text in TEXTS], None, "bytes"),
    "chats": (lambda: CHATS, None, "bytes"),
}


class Stop(Exception):
    """The end of a process."""


def fit(form, make=Own, folder=None, stop=None, resume=False, steps=9, size=10):
    rows, models, kind = FORMS[form]
    reader = None if kind is None else tokenizer(kind)
    teacher, student = models() if models else language_models(reader)
    data = make(rows())

    def called(record):
        if record.step == stop:
            raise Stop

    result = distill.fit(
        teacher, student, {}, data, objective=[KD(), Labels() if form == "numbers" else CausalLM()], steps=steps,
        batch_size=size, lr=0.01, tokenizer=reader, output_dir=folder, every=2, resume=resume, callbacks=called,
        console=QUIET,
    )  # fmt: skip
    return result, data


def losses(result):
    return [record.loss for record in result.records]


@pytest.mark.filterwarnings("ignore:.*of the data")
@pytest.mark.parametrize("make", [Own, hub])
@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_training_on_a_stream_is_the_whole_one(form, make, tmp_path):
    whole, _ = fit(form, make)
    with pytest.raises(Stop):
        fit(form, make, tmp_path / "run", stop=7)
    resumed, data = fit(form, make, tmp_path / "run", resume=True)
    assert losses(resumed) == losses(whole)
    assert same(weights(resumed.student), weights(whole.student))
    assert resumed.seen.marks.keys() == whole.seen.marks.keys()
    assert all((resumed.seen.marks[name] == marks).all() for name, marks in whole.seen.marks.items())
    if make is Own:
        assert (
            len(data.read) < LOOKED_AT + 3 + 4 * 10
        )  # the first rows for checks, and those of the steps that are left


@pytest.mark.filterwarnings("ignore:.*of the data")
@pytest.mark.parametrize("form", FORMS)
def test_a_step_has_the_next_rows_as_they_are_in_memory(form):
    rows, models, kind = FORMS[form]
    reader = None if kind is None else tokenizer(kind)
    known = (models() if models else language_models(reader))[0]
    stream = streamed(Own(rows()), known, reader)
    whole = Rows.of(texts_read(rows(), known, reader))
    place = 0
    for _ in range(3):
        batch, empty = stream.next_of_stream(10)
        expected = whole.batch(list(range(place, min(place + 10, len(whole)))))
        assert not empty
        assert same({name: batch[name] for name in expected}, expected)
        assert batch.keys() == expected.keys()
        place += 10


def test_shares_of_processes_are_the_rows_of_one():
    def shares(processes):
        streams = [streamed(Own(numbers(9)), spread(mlp())) for _ in range(processes)]
        return [[each.next_of_stream(4, rank, processes) for rank, each in enumerate(streams)] for _ in range(4)]

    for (whole,), parts in zip(shares(1), shares(2), strict=True):
        found = [row.tolist() for batch, empty in parts for row in batch["inputs"] if not empty]
        assert sorted(found) == sorted(whole[0]["inputs"].tolist())
    assert [empty for _, empty in shares(2)[2]] == [False, True]


def test_texts_of_classes_are_tokenized_and_numbered_as_the_model_does(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(save_bert(tmp_path, classifier=True))
    model.config.id2label = {0: "positive", 1: "negative"}
    model.config.label2id = {"positive": 0, "negative": 1}
    texts, names = zip(*sentences(40), strict=True)
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    data = HubDataset.from_dict({"sentence": texts, "label": [int(n == "positive") for n in names]}, features=features)
    student = distill.from_layers(model, [0])
    before = distill.steps(model, student, {}, data.to_iterable_dataset(), objective=[KD(), Labels()],
                           schedule=Schedule(steps=2, batch_size=8))  # fmt: skip
    assert len(list(before)) == 2
    rows = numbered_as(streamed(data.to_iterable_dataset(), model), model)
    found = torch.cat([rows.next_of_stream(20)[0]["labels"] for _ in range(2)])
    assert found.tolist() == [int(name == "negative") for name in names]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 2}, r"epochs=2 of a Own have no known number of steps.*give the number of steps: steps=1000"),
        ({}, "give the number of steps: steps=1000"),
        ({"steps": 2, "schedule": Schedule(workers=1)}, "workers=1 read rows by their numbers"),
        ({"steps": 2, "schedule": Schedule(group_by_length=True)}, "group_by_length=True chooses among all rows"),
        ({"steps": 2, "objective": [CRD(4, 8)]}, r"CRD\(\) remembers the features of every row"),
    ],
)
def test_what_needs_all_rows_is_refused(settings, message):
    with pytest.raises(DistillError, match=message):
        distill.fit(spread(mlp()), spread(mlp(), 1), {}, Own(numbers()), console=QUIET, **settings)


def test_a_stream_with_a_length_has_epochs():
    class Long(Own):
        def __len__(self):
            return len(self.rows)

    teacher, student = spread(mlp()), spread(mlp(), 1)
    result = distill.fit(teacher, student, {}, Long(numbers()), epochs=2, batch_size=10, console=QUIET)
    assert len(result.records) == 10


@pytest.mark.parametrize(
    ("at", "row", "message"),
    [
        (38, {"inputs": [0.0] * 6, "label": 9}, "row 38 of the Own has label 9 and there are 3 classes"),
        (37, {"inputs": [0.0] * 6}, "row 37 of the data has no column 'labels'"),
        (36, {"inputs": "six", "label": 0}, "row 36 of the Own: column 'inputs' cannot become a tensor"),
        (35, 7, "row 35 of the data is a int"),
    ],
)
def test_a_row_that_does_not_fit_is_named(at, row, message):
    rows = numbers()
    rows[at] = row
    training = distill.steps(
        spread(mlp()), spread(mlp(), 1), {}, Own(rows), objective=Labels(), schedule=Schedule(steps=9, batch_size=10)
    )
    done = []
    with pytest.raises(DistillError, match=message):
        done.extend(training)
    assert len(done) == 3


def test_labels_of_text_are_refused():
    with pytest.raises(DistillError, match=r"labels of the Own are texts.*names\.index"):
        streamed(Own([{"x": 1.0, "label": "a"}]), mlp())


def test_rows_of_a_text_that_are_cut_later_are_told_once(recwarn):
    reader = tokenizer("bytes")
    rows = [{"text": "the cat"}] * 40 + [{"text": "the cat sees it " * 40}] * 40
    teacher, student = language_models(reader)
    list(distill.steps(teacher, student, {}, streamed(Own(rows), teacher, reader), objective=KD(),
                       schedule=Schedule(steps=8, batch_size=10)))  # fmt: skip
    told = [str(each.message) for each in recwarn if "are cut there" in str(each.message)]
    assert told == ["of the data rows have more than 64 tokens and are cut there."]


def test_what_was_seen_is_left_out_of_a_measurement():
    rows = vectors(ROWS)
    data = [{"inputs": row["inputs"], "labels": row["labels"]} for row in rows]
    result = distill.fit(spread(mlp()), spread(mlp(), 1), {}, Own(data), steps=2, batch_size=10, console=QUIET)
    assert result.seen.among(rows.table).tolist() == [True] * 20 + [False] * 25


@pytest.mark.filterwarnings("ignore:.*(of the data|is read once)")
@pytest.mark.parametrize("make", [Own, hub])
def test_a_stream_of_texts_is_measured_as_its_rows_are(make):
    rows, reader = [{"text": text} for text in TEXTS if text], tokenizer("bytes")
    model = language_models(reader)[0]
    data = make(rows)
    read = Rows.of(texts_read(data, model, reader))
    expected = Rows.of(texts_read(rows, model, reader))
    assert sorted(map(str, read.table["input_ids"])) == sorted(map(str, expected.table["input_ids"]))
    assert getattr(data, "at", 0) == 0
