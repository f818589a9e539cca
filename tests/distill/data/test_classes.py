"""Labels are the classes that model and data both name: in whatever order, case or form they are written."""

import copy
import json
import warnings
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from datasets import ClassLabel, Features, List, Value
from datasets import Dataset as HubDataset
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification, BertForTokenClassification

import distill
from distill import DistillError, Ensemble, Labels, NoisyTeacher, Rows, Served, Specialists, Task
from distill.data.classes import are_names, matched, ranked, stated
from distill.losses import LogitNoise
from distill.models.class_names import check_alike, class_names, name_classes, real_names
from distill.tasks import load, numbered_as
from tests.distill.conftest import WORDS, save_bert, write_csv
from tests.distill.tiny_models import QUIET, bert, gpt2_lm

NAMES = ("music", "sport", "war")
ORDERS = list(permutations(NAMES))
SHORT = {"steps": 1, "batch_size": 16, "lr": 1e-5, "console": QUIET}
ROWS = [(f"{word} {WORDS[i]}", NAMES[number]) for number, word in enumerate(WORDS[:3]) for i in range(3, 13)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier that is right on every row, in the order of NAMES, with its tokenizer."""
    path = save_bert(tmp_path_factory.mktemp("knows"), classifier=True, layers=2, labels=3)
    config, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    config.initializer_range = 0.3  # it learns faster
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
    inputs = tokenizer([text for text, _ in ROWS], return_tensors="pt", padding=True)
    labels = torch.tensor([NAMES.index(name) for _, name in ROWS])
    optimizer = torch.optim.Adam(model.parameters(), 0.004)
    for _ in range(60):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    assert bool((model.eval()(**inputs).logits.argmax(-1) == labels).all())
    model.save_pretrained(path)
    return path


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def answering(folder, order, *, called=None):
    """The classifier with its outputs in another order, which its configuration names (or calls something else)."""
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    places = torch.tensor([NAMES.index(name) for name in order])
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[places])
        model.classifier.bias.copy_(model.classifier.bias[places])
    named(model, order if called is None else called)
    return model


def named(model, names):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    return model


def unnamed(model):
    """A copy whose configuration says nothing."""
    return named(copy.deepcopy(model), ("LABEL_0", "LABEL_1", "LABEL_2"))


def hub(tokenizer, *, features):
    """The rows as a data set of the hub's library, labels as `ClassLabel` in an order of its own, or as text."""
    encoded = tokenizer([text for text, _ in ROWS])
    table = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    own = ("war", "music", "sport")
    labels = [own.index(name) for _, name in ROWS] if features else [name for _, name in ROWS]
    kind = ClassLabel(names=list(own)) if features else Value("string")
    columns = {"input_ids": List(Value("int64")), "attention_mask": List(Value("int64")), "label": kind}
    return HubDataset.from_dict({**table, "label": labels}, features=Features(columns))


def forms(tmp_path, tokenizer):
    """The same data in every form that knows its classes."""
    path = write_csv(tmp_path / "x.csv", ROWS)
    encoded = tokenizer([text for text, _ in ROWS])
    numbers = torch.tensor([NAMES.index(name) for _, name in ROWS])
    plain = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    rows = Rows.of({**plain, "labels": numbers})
    task = load(data=path, tokenizer=tokenizer)
    lines = tmp_path / "x.jsonl"
    lines.write_text("\n".join(json.dumps({"text": text, "label": name.upper()}) for text, name in ROWS))
    return {
        "file": path,
        "path as text": str(path),
        "other case": lines,
        "task of a file": task,
        "rows of a task": task.test,
        "embedded task": Task("own", rows, rows, NAMES),
        "ClassLabel": hub(tokenizer, features=True),
        "text in a data set": hub(tokenizer, features=False),
        "text in rows": {**plain, "labels": [name for _, name in ROWS]},
        "text in dicts": [
            {"input_ids": a, "attention_mask": b, "label": name}
            for a, b, (_, name) in zip(*plain.values(), ROWS, strict=True)
        ],
    }


FORMS = ("file", "path as text", "other case", "task of a file", "rows of a task", "embedded task", "ClassLabel",
         "text in a data set", "text in rows", "text in dicts")  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_perfect_teacher_is_perfect_in_every_order(form, tmp_path, folder, tokenizer):
    data = forms(tmp_path, tokenizer)[form]
    for order in ORDERS:
        teacher = answering(folder, order)
        assert distill.evaluate(None, teacher, None, data).accuracy.value == 1.0


@pytest.mark.parametrize("form", FORMS)
def test_a_student_learns_the_numbers_of_its_teacher(form, tmp_path, folder, tokenizer):
    data = forms(tmp_path, tokenizer)[form]
    teacher = answering(folder, ORDERS[3])
    student = distill.from_layers(teacher, 2)  # as good as its teacher, so its loss is small where labels are right
    result = distill.fit(teacher, student, {}, data, objective=Labels(), eval_data=data, **SHORT)
    assert result.records[0].loss < 0.1
    assert result.accuracy == 1.0
    assert student.config.id2label == teacher.config.id2label
    assert distill.evaluate(teacher, student, None, data).accuracy.value == result.accuracy


@pytest.mark.parametrize("wrap", [
    lambda model: Ensemble([model, copy.deepcopy(model)]), lambda model: NoisyTeacher(model, LogitNoise(1e-6)),
    lambda model: Specialists(model, {copy.deepcopy(model): [0, 1, 2]}), lambda model: Served(model),
    lambda model: Ensemble([unnamed(model), model]),
], ids=["ensemble", "noisy", "specialists", "served", "half named"])  # fmt: skip
def test_the_names_are_those_of_the_network_inside(wrap, folder):
    model = answering(folder, ORDERS[4])
    assert real_names(wrap(model)) == ORDERS[4]


def test_whole_numbers_are_the_indices_of_the_model(tmp_path, folder, tokenizer):
    order = ORDERS[5]
    some = [(text, order.index(name)) for text, name in ROWS if name != order[0]]
    path = write_csv(tmp_path / "x.csv", some)  # labels 1 and 2 of three classes
    for called in (order, ("LABEL_0", "LABEL_1", "LABEL_2"), ("0", "1", "2")):
        teacher = answering(folder, order, called=called)
        for data in (path, load(data=path, tokenizer=tokenizer), load(data=path, tokenizer=tokenizer).test):
            assert distill.evaluate(None, teacher, None, data).accuracy.value == 1.0
    assert numbered_as(load(data=path, tokenizer=tokenizer), answering(folder, order)).classes == order


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["b", "a"], ["a", "b"], (1, 0)),
        (["NEGATIVE", "Positive"], ["positive", "negative"], (1, 0)),
        (["2", "0"], ["a", "b", "c"], (2, 0)),
        (["01", "02"], ["02", "01"], (1, 0)),
        (["1", "2"], ["01", "02"], (0, 1)),
        (["1", "3"], ["1", "2", "3"], (0, 2)),  # names before indices
        (["1.0", "0.0"], ["no", "yes"], (1, 0)),
        (["True", "False"], ["false", "true"], (1, 0)),
        (["Straße"], ["strasse", "weg"], (0,)),
        (["e\u0301te\u0301"], ["hiver", "\u00e9t\u00e9"], (1,)),
        (["Good", "good"], ["GOOD", "bad"], (0, 0)),
        (["Good", "good"], ["good", "Good"], (1, 0)),
        (["-0"], ["a", "b"], (0,)),
    ],
)
def test_labels_are_matched_as_written_then_folded_then_as_numbers(labels, names, numbers):
    assert matched(labels, names) == numbers


@pytest.mark.parametrize(
    ("labels", "names", "why"),
    [
        (["a", "x"], ["a", "b"], "x is none of them"),
        (["x", "y"], ["a", "b"], "x, y are none of them"),
        (["0", "1", "2"], ["1", "2", "3"], "0 is none of them"),
        (["1", "2"], ["a", "b"], "2 is neither a name nor an index"),
        (["-1", "1"], ["a", "b"], "-1 is neither a name nor an index"),
        (["1", "2"], ["1 star", "2 stars", "3 stars"], "they are not the numbers in the names"),
        (["good"], ["Good", "GOOD"], "'good' may be each of 0 and 1"),
        (["a"], ["a", "a"], "'a' may be each of 0 and 1"),
        (["1", "other"], ["a", "b"], "1, other are none of them"),
    ],
)
def test_what_is_no_class_is_refused_with_both_lists(labels, names, why):
    with pytest.raises(DistillError) as raised:
        matched(labels, names)
    told = str(raised.value)
    assert why in told
    assert "\n" not in told
    assert f"labels of the data are {', '.join(labels)} and the classes of the model {', '.join(names)}:" in told
    assert "--classes" in told


@pytest.mark.parametrize("form", ["file", "task of a file", "ClassLabel", "text in rows", "embedded task"])
def test_half_a_match_is_refused_before_anything_is_trained_or_measured(form, tmp_path, folder, tokenizer):
    data = forms(tmp_path, tokenizer)[form]
    teacher = answering(folder, NAMES, called=("music", "sport", "peace"))
    before = copy.deepcopy(teacher.state_dict())
    student = distill.from_layers(teacher, 1)
    for act in (
        lambda: distill.fit(teacher, student, {}, data, steps=1, console=QUIET),
        lambda: distill.fit(None, teacher, None, data, objective=Labels(), steps=1, console=QUIET),
        lambda: distill.mutual([teacher, student], data, console=QUIET),
        lambda: distill.chain([teacher, student], data=data, mapping={}, console=QUIET),
        lambda: distill.evaluate(teacher, student, None, data),
    ):
        with pytest.raises(DistillError, match=r"war is none of them; .*classes=\[…\]"):
            act()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_names_that_say_nothing_are_taken_in_sorted_order_and_that_is_said(tmp_path, folder, tokenizer):
    path = write_csv(tmp_path / "x.csv", ROWS)
    teacher = answering(folder, NAMES, called=("LABEL_0", "LABEL_1", "LABEL_2"))
    with pytest.warns(UserWarning, match="0 is music, 1 is sport, 2 is war; if it was trained in another") as told:
        assert distill.evaluate(None, teacher, None, path).accuracy.value == 1.0
    assert len(told) == 1
    student = distill.from_layers(teacher, 1)
    with pytest.warns(UserWarning, match="sorted order") as told:
        distill.fit(teacher, student, {}, path, objective=distill.KD(), steps=1, console=QUIET)
    assert len(told) == 1
    assert student.config.id2label == dict(enumerate(NAMES))  # what it learned
    plain = Plain()
    with pytest.warns(UserWarning, match="sorted order"):
        distill.fit(None, plain, data=load(data=path, tokenizer=tokenizer), objective=Labels(), steps=1, console=QUIET)


class Plain(nn.Module):
    """A network without a configuration."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, 3)

    def forward(self, input_ids):
        return self.words(input_ids).mean(1)


def test_the_order_can_be_stated(tmp_path, folder, tokenizer):
    path, order = write_csv(tmp_path / "x.csv", ROWS), ("war", "music", "sport")
    for called in (("LABEL_0", "LABEL_1", "LABEL_2"), ("w", "m", "s")):
        teacher = answering(folder, order, called=called)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            task = load(data=path, tokenizer=tokenizer, classes=order)
            assert distill.accuracy(teacher, task.test).value == 1.0
        rows = Rows.of(hub(tokenizer, features=True), classes=("war", "music", "sport"))  # the numbers it has
        assert distill.accuracy(teacher, rows).value == 1.0
    with pytest.raises(DistillError, match="'war' has another number there; leave classes out"):
        distill.accuracy(answering(folder, NAMES), task.test)
    with pytest.raises(DistillError, match="3 and 2 classes"):
        numbered_as(task, bert(1, labels=2))
    with pytest.raises(DistillError, match="war is none of them"):
        load(data=path, tokenizer=tokenizer, classes=("music", "sport", "peace"))
    for wrong in (("a",), ("a", "a"), "ab", ()):
        with pytest.raises(DistillError, match="does not say which class is which"):
            stated(wrong)


def test_fewer_labels_than_unnamed_classes_are_ambiguous(tmp_path, folder, tokenizer):
    path = write_csv(tmp_path / "x.csv", [row for row in ROWS if row[1] != "war"])
    with pytest.raises(DistillError, match="does not name its 3 classes, so their order is not known"):
        distill.evaluate(None, answering(folder, NAMES, called=("LABEL_0", "LABEL_1", "LABEL_2")), None, path)
    assert distill.evaluate(None, answering(folder, ORDERS[2]), None, path).accuracy.value == 1.0
    stars = write_csv(tmp_path / "y.csv", [(text, NAMES.index(name) + 1) for text, name in ROWS])
    with pytest.warns(UserWarning, match="0 is 1, 1 is 2, 2 is 3"):  # none is an index, and there are as many
        distill.evaluate(None, answering(folder, NAMES, called=("LABEL_0", "LABEL_1", "LABEL_2")), None, stars)
    with pytest.raises(DistillError, match="the model has one output, a real number"):
        distill.evaluate(None, bert(1, labels=1), None, load(data=stars, tokenizer=tokenizer))


def test_teacher_and_student_number_their_classes_alike(tmp_path, folder, tokenizer):
    path = write_csv(tmp_path / "x.csv", ROWS)
    teacher, other = answering(folder, NAMES), answering(folder, ORDERS[1])
    task = load(data=path, tokenizer=tokenizer)
    mapping = distill.layer_mapping(teacher, other, "full")
    for act in (
        lambda: distill.fit(teacher, other, {}, path, steps=1, console=QUIET),
        lambda: distill.fit(Ensemble([teacher]), other, {}, task, steps=1, console=QUIET),
        lambda: distill.interchange_accuracy(teacher, other, mapping, task, pairs=4),
        lambda: distill.mutual([teacher, other], task, console=QUIET),
        lambda: Ensemble([teacher, other]),
        lambda: check_alike(NoisyTeacher(teacher, LogitNoise(1)), other),
    ):
        with pytest.raises(DistillError, match="other order, and their answers are compared output by output"):
            act()
    with pytest.raises(DistillError, match="other names, and"):
        check_alike(teacher, answering(folder, NAMES, called=("a", "b", "c")))
    check_alike(teacher, answering(folder, NAMES, called=("MUSIC", "Sport", "war")))
    check_alike(teacher, bert(1))
    special = named(copy.deepcopy(teacher), ("war", "sport", "rest"))
    with pytest.raises(DistillError, match=r"specialist 1 calls its class 0 'war', which is class 2 of the generalist"):
        Specialists(teacher, {special: [0, 1]})
    Specialists(teacher, {special: [2, 1]})


def test_eval_data_is_numbered_as_the_training_data(tmp_path, folder, tokenizer):
    teacher = answering(folder, ORDERS[3])
    path = write_csv(tmp_path / "x.csv", ROWS)
    others = write_csv(tmp_path / "y.csv", [(f"{text} plot", name) for text, name in ROWS if name != "music"])
    fit = {"objective": Labels(), **SHORT}
    result = distill.fit(teacher, distill.from_layers(teacher, 2), {}, path, eval_data=others, **fit)
    assert result.evaluation.accuracy.count == 20  # all rows of the file, of two of the three classes
    assert result.accuracy == 1.0
    unnamed_one = unnamed(answering(folder, NAMES))
    with pytest.warns(UserWarning, match="sorted order") as told:
        result = distill.fit(unnamed_one, distill.from_layers(unnamed_one, 2), {}, path, eval_data=others, **fit)
    assert (result.accuracy, len(told)) == (1.0, 1)
    same = distill.fit(teacher, distill.from_layers(teacher, 1), {}, path, eval_data=path, **fit)
    assert same.evaluation.accuracy.count == len(load(data=path, tokenizer=tokenizer).test)  # not what it trained on
    strange = write_csv(tmp_path / "z.csv", [("the cat", "peace"), ("a dog", "war")] * 2)
    student = distill.from_layers(teacher, 1)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(DistillError, match="peace is none of them"):
        distill.fit(teacher, student, {}, path, eval_data=strange, **fit)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_that_no_class_has_is_refused_where_it_is_measured(label, folder, tokenizer):
    teacher, texts = answering(folder, NAMES), tokenizer(["the cat", "a dog"])
    rows = Rows.of({name: texts[name] for name in ("input_ids", "attention_mask")} | {"labels": [0, label]})
    student = distill.from_layers(teacher, 1)
    for act in (
        lambda: distill.accuracy(teacher, rows),
        lambda: distill.calibration(teacher, rows),
        lambda: distill.evaluate(None, teacher, None, rows),
        lambda: distill.fit(teacher, student, {}, rows.take([0]), steps=1, eval_data=rows, console=QUIET),
    ):
        with pytest.raises(DistillError, match=rf"label {label} and the \w+ (has )?3 classes"):
            act()
    ignored = replace(rows, table={**rows.table, "labels": torch.tensor([0, -100])})
    assert distill.accuracy(teacher, ignored).count == 1


def test_labels_of_tokens_are_matched_too(folder, tokenizer):
    names = ["O", "B", "I"]
    model = BertForTokenClassification.from_pretrained(folder, id2label=dict(enumerate("IOB"))).eval()
    columns = {"input_ids": List(Value("int64")), "attention_mask": List(Value("int64")),
               "labels": List(ClassLabel(names=names))}  # fmt: skip
    table = {"input_ids": [[5, 6], [7]], "attention_mask": [[1, 1], [1]], "labels": [[0, -100], [2]]}
    data = HubDataset.from_dict(table, features=Features(columns | {"labels": List(Value("int64"))}))
    assert Rows.of(data).classes is None
    rows = Rows.of({**table, "labels": [["O", "B"], ["I"]]})
    assert [each.tolist() for each in numbered_as(rows, model).table["labels"]] == [[1, 2], [0]]
    own = replace(Rows.of(data), classes=tuple(names))
    assert [each.tolist() for each in numbered_as(own, model).table["labels"]] == [[1, -100], [0]]
    assert Rows.of(data.remove_columns("labels").add_column("labels", [[0, 1], [2]]).cast_column(
        "labels", List(ClassLabel(names=names)))).classes == tuple(names)  # fmt: skip


def test_configurations_that_contradict_themselves_are_refused():
    model = named(bert(1), NAMES)
    model.config.label2id = {name: 2 - i for i, name in enumerate(NAMES)}
    with pytest.raises(DistillError, match="numbers its classes in two ways: id2label music, sport, war and label2id"):
        class_names(model)
    model.config.id2label, model.config.label2id = {"0": "a", "1": "b", "2": "c"}, None  # as JSON has them
    assert class_names(model) == ("a", "b", "c")
    model.config.id2label = {"1": "a", "2": "b", "3": "c"}
    with pytest.raises(DistillError, match="numbers its classes '1', '2', '3'; number them from 0"):
        class_names(model)
    unnamed = bert(1)
    unnamed.config.label2id = {"a": 2, "b": 1, "c": 0}
    assert class_names(unnamed) == ("c", "b", "a")  # given label2id alone
    two = named(bert(1), ("a", "b"))
    rows = Rows.of({"input_ids": [[1], [2]], "labels": [0, 1]})
    with pytest.raises(DistillError, match="answers with 3 classes and its configuration names 2: a, b"):
        distill.fit(None, two, data=rows, objective=Labels(), steps=1, console=QUIET)


def test_a_language_model_has_no_classes():
    model = named(gpt2_lm(1), ("a", "b"))
    assert class_names(model) is None
    rows = Rows.of({"input_ids": [[1, 2], [2, 3]], "labels": [[1, 2], [2, 3]]})
    assert numbered_as(rows, model) is rows
    name_classes(model, ("x", "y"))
    assert model.config.id2label == {0: "a", 1: "b"}


def test_names_and_numbers():
    assert are_names(["LABEL_1", "LABEL_0"])
    assert not are_names(["class 0", "Class 1"])
    assert ranked(["10", "9", "2", "2"]) == ("2", "9", "10")
    model = bert(1)
    name_classes(model, NAMES)
    assert (class_names(model), model.config.label2id["war"]) == (NAMES, 2)
    name_classes(model, ("a", "b", "c"))  # it has names
    assert class_names(model) == NAMES


def test_a_probe_needs_no_classes_of_the_model(tmp_path, folder, tokenizer):
    model = answering(folder, NAMES, called=("x", "y", "z"))
    table = {name: tokenizer([text for text, _ in ROWS])[name] for name in ("input_ids", "attention_mask")}
    train = Rows.of({**table, "labels": [name for _, name in ROWS]})
    some = [i for i, (_, name) in enumerate(ROWS) if name != "music"]
    test = Rows.of({name: [column[i] for i in some] for name, column in table.items()}
                   | {"labels": [ROWS[i][1] for i in some]})  # fmt: skip
    assert distill.linear_probe(model, train, test).value == 1.0
