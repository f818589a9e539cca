"""Texts in forms without columns are read as those with columns are; what is read once is said to be."""

import warnings

import datasets
import numpy
import pandas
import pytest
import torch
from torch.utils.data import IterableDataset

from distill import KD, CausalLM, DistillError, Written, fit, from_layers
from distill.data.texts.given import first_value, names_of, with_columns
from distill.tasks import load
from distill.tasks.named import as_rows
from tests.distill.data.texts.tokenizers import tokenizer
from tests.distill.tiny_models import QUIET

TEXTS = ["the cat", "What is it? It is a dog!", "yes.", "no.txt"]
HUB = datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1, 1, 0]})
NAMED = HUB.cast_column("label", datasets.ClassLabel(names=["no", "yes"]))


def writer():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer()), n_embd=8, n_layer=2, n_head=2, n_positions=64))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"text": text} for text in TEXTS])


FORMS = {
    "list": lambda: list(TEXTS),
    "tuple": lambda: tuple(TEXTS),
    "array": lambda: numpy.array(TEXTS),
    "Series": lambda: pandas.Series(TEXTS),
    "generator of texts": lambda: (text for text in TEXTS),
    "generator of rows": lambda: ({"text": text} for text in TEXTS),
    "stream of torch": Stream,
    "stream of the hub": lambda: HUB.remove_columns("label").to_iterable_dataset(),
    "shuffled stream": lambda: HUB.remove_columns("label").to_iterable_dataset().shuffle(seed=0, buffer_size=1),
    "transform": lambda: HUB.with_transform(lambda rows: {"text": rows["text"]}),
}


@pytest.mark.filterwarnings("ignore:.*read once")
@pytest.mark.parametrize("form", FORMS)
def test_a_language_model_reads_every_form_of_texts_alike(form):
    model, reader = writer(), tokenizer()
    expected, found = (as_rows(data, model, reader) for data in ({"text": TEXTS}, FORMS[form]()))
    assert found.columns == expected.columns
    for name in found.columns:
        assert found.batch(range(4))[name].equal(expected.batch(range(4))[name])
    task = load("text", data=FORMS[form](), tokenizer=reader)
    assert len(task.train) + len(task.test) == 4


@pytest.mark.filterwarnings("ignore:.*have no token to learn")  # an empty text
@pytest.mark.parametrize("data", [["a b", "c"], [""], ("see notes.txt", "x.csv", "no file")])
def test_texts_are_no_files(data):
    assert with_columns(data) == {"text": list(data)}
    result = fit(model := writer(), from_layers(model, 1), {}, [*data, "the dog"], objective=[KD(), CausalLM()],
                 steps=1, tokenizer=tokenizer(), console=QUIET)  # fmt: skip
    assert len(result.records) == 1


@pytest.mark.filterwarnings("ignore:.*read once")
def test_what_is_read_once_is_said_and_what_a_transform_makes_is_what_is_read():
    louder = NAMED.with_transform(lambda rows: {**rows, "text": [text + "!" for text in rows["text"]]})
    with pytest.warns(UserWarning, match="transform of the data makes texts, which are read once"):
        found = with_columns(louder)
    assert list(found["text"]) == [text + "!" for text in TEXTS]
    assert found.features["label"].names == ["no", "yes"]
    assert with_columns(NAMED.to_iterable_dataset()).features["label"].names == ["no", "yes"]
    with pytest.warns(UserWarning, match="a Stream without length"):
        with_columns(Stream())


@pytest.mark.parametrize(
    "data",
    [HUB, {"x": [1]}, [], [1, 2], [{"text": "a"}], "data.csv", None, torch.zeros(2), numpy.zeros(2), pandas.Series([1]),
     HUB.with_transform(lambda rows: {"input_ids": [[1]] * len(rows["text"])}), HUB.with_format("torch")],
)  # fmt: skip
def test_other_data_is_returned_as_it_is(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert with_columns(data) is data


def test_a_transform_that_makes_tokens_is_left_to_draw_them_anew():
    made = HUB.with_transform(lambda rows: {"input_ids": [[len(text)] * 2 for text in rows["text"]]})
    rows = as_rows(made, writer(), tokenizer())
    assert rows.table["input_ids"].tolist() == [[len(text)] * 2 for text in TEXTS]
    assert rows.source is not None


def test_first_value_is_the_first_that_is_not_missing():
    columns = {"text": [None, "a"]}
    forms = [columns, datasets.Dataset.from_dict(columns), pandas.DataFrame({"text": [float("nan"), "a"]})]
    assert [first_value(each, "text") for each in [*forms, [{"text": None}, {"text": "a"}]]] == ["a"] * 4
    assert first_value({"text": iter("a")}, "text") is None
    assert [names_of(each) for each in (*forms, [columns], [], 5, "a")] == [("text",)] * 4 + [()] * 3
    with pytest.raises(DistillError, match="row 0 of the data has None as 'text'"):
        as_rows(columns, writer(), tokenizer())


@pytest.mark.parametrize(
    "form",
    [
        dict,
        datasets.Dataset.from_dict,
        pandas.DataFrame,
        lambda each: [{"prompt": "a"}],
        lambda each: {**each, "completion": [None, None]},
    ],
)
def test_prompts_alone_are_for_a_model_that_writes(form):
    data, model = form({"prompt": ["the cat", "yes"]}), writer()
    with pytest.raises(DistillError, match=r"'prompt' and no 'completion'.*distill.Written\(rows\)"):
        fit(model, from_layers(model, 1), {}, data, tokenizer=tokenizer(), console=QUIET)
    written = Written(data, max_new_tokens=3)
    result = fit(
        model, from_layers(model, 1), {}, written, objective=KD(), steps=1, tokenizer=tokenizer(), console=QUIET
    )
    assert len(result.records) == 1
