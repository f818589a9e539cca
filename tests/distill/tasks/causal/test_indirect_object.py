"""Indirect object identification: what the prompts say, read by plain Python, is what the causal model computes."""

import json
from functools import cache

import pytest
import torch

from distill.errors import DistillError
from distill.tasks.causal.indirect_object import NAMES, OBJECTS, PLACES, TEMPLATES, indirect_object
from tests.distill.tasks.causal.test_prompts import at, real, small

LISTS = {"templates": TEMPLATES, "names": NAMES, "places": PLACES, "objects": OBJECTS}


@cache
def tokenizer(side="right"):
    return small("bytes", bos=True, side=side, corpus=tuple(said() * 3), pad_token="Q")


def said():
    """The default lists as sentences, from which a tokenizer may learn the names."""
    filled = zip(TEMPLATES, PLACES, OBJECTS, strict=False)
    return [t.format(name_A=a, name_B=b, name_C=a, place=p, object=o)
            for t, p, o in filled for a in NAMES for b in NAMES[:2]]  # fmt: skip


def names(tokenizer):
    """Those of NAMES that begin with different tokens."""
    by_token = {tokenizer(f" {name}", add_special_tokens=False)["input_ids"][0]: name for name in NAMES}
    return [name for name in NAMES if name in by_token.values()]


def draw(model, n=300, seed=0):
    return model.sample(n, torch.Generator().manual_seed(seed))


def texts(tokenizer, model, values):
    return tokenizer.batch_decode(model.encode(values)["input_ids"], skip_special_tokens=True)


def in_order(text, names):
    """The names that a text says, as it says them, and where each ends."""
    words = [word.strip(".,") for word in text.split()]
    return [word for word in words if word in names]


@pytest.fixture(params=["left", "right"])
def side(request):
    return request.param


@pytest.fixture
def setting(side):
    chosen = names(tokenizer(side))
    return tokenizer(side), indirect_object(tokenizer(side), names=chosen), chosen


def test_the_answer_is_the_name_that_is_said_once(setting):
    tokenizer, model, names = setting
    values = draw(model)
    run = model.run(values)
    for row, text in enumerate(texts(tokenizer, model, values)):
        first, second, third = in_order(text, names)
        assert first != second
        assert third == (second if values["order"][row] == 0 else first)
        assert names[run["subject"][row]] == third
        assert names[model.answers(run)[row]] == (first if third == second else second)
        assert run["position"][row] == int(third == first)


def test_positions_have_the_names_of_papers(setting):
    tokenizer, model, names = setting
    values = draw(model)
    encoded, run = model.encode(values), model.run(values)
    found = {name: model.select(name, values)[:, 0] for name in model.positions}
    ends = {name: at(tokenizer, encoded, place) for name, place in found.items()}
    for row in range(len(values["order"])):
        subject, io = names[run["subject"][row]], names[run["answer"][row]]
        for name, word in {"IO": io, "S1": subject, "S2": subject}.items():
            assert ends[name][row]
            assert word.endswith(ends[name][row])
        assert found["S1"][row] < found["S2"][row] < found["end"][row]
        first, second = ("IO", "S1") if values["order"][row] == 0 else ("S1", "IO")
        assert found["name_A"][row] == found[first][row] < found["name_B"][row] == found[second][row]
    assert torch.equal(found["S1+1"], found["S1"] + 1)
    assert set(ends["end"]) == {"to"}
    assert torch.equal(found["end"], encoded["attention_mask"].sum(1) - 1)


def test_the_answer_is_read_by_the_first_tokens_of_the_names(setting):
    tokenizer, model, names = setting
    values = draw(model, 50)
    encoded = model.encode(values)
    logits = torch.zeros(*encoded["input_ids"].shape, len(tokenizer))
    for row, name in enumerate(model.answers(values).tolist()):
        token = tokenizer(f" {names[name]}", add_special_tokens=False)["input_ids"][0]
        logits[row, encoded["attention_mask"][row].nonzero()[-1, 0], token] = 1.0
    decoded = model.decode(logits, values)
    assert torch.equal(decoded.argmax(1), model.answers(values))
    assert decoded.sum(1).tolist() == [1.0] * 50


def test_signals_of_other_runs():
    model = indirect_object(tokenizer(), names=names(tokenizer())[:4])
    base = {"name_A": [0] * 5, "name_B": [1] * 5, "order": [0, 0, 0, 1, 1]}
    source = {"name_A": [2, 2, 1, 2, 1], "name_B": [3, 0, 2, 3, 2], "order": [1, 0, 1, 1, 1]}
    base, source = ({name: torch.tensor(each.get(name, [0] * 5)) for name in model.inputs} for each in (base, source))
    assert model.answers(base).tolist() == [0, 0, 0, 1, 1]
    # The subject of the sources is no name of the base, its indirect object, its subject, none, its indirect object.
    assert model.answers(model.interchange(base, {"subject": source})).tolist() == [0, 1, 0, 1, 0]
    # Their indirect object stands second, but for one.
    assert model.answers(model.interchange(base, {"position": source})).tolist() == [1, 0, 1, 1, 1]


def test_sampled_names_differ_and_everything_is_drawn():
    model = indirect_object(tokenizer(), names=names(tokenizer())[:3])
    values = draw(model, 2000)
    assert (values["name_A"] != values["name_B"]).all()
    assert len({(a, b) for a, b in zip(values["name_A"].tolist(), values["name_B"].tolist(), strict=True)}) == 6
    for name in model.inputs:
        assert values[name].unique().tolist() == model.domains[name].values.tolist()


def shared_lists(folder):
    return {name: json.loads((folder / f"causal_tasks/ioi_{name}.json").read_text()) for name in LISTS}


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_with_the_tokenizer_of_gpt2(shared_data, shared):
    lists = shared_lists(shared_data) if shared else LISTS
    gpt2 = real("gpt2", shared_data)
    model = indirect_object(gpt2, **lists)
    values = draw(model)
    run, encoded = model.run(values), model.encode(values)
    for name, of in {"IO": "answer", "S1": "subject", "S2": "subject"}.items():
        ends = at(gpt2, encoded, model.select(name, values)[:, 0])
        for end, number in zip(ends, run[of].tolist(), strict=True):  # "Grace" that opens a sentence is "Gr" and "ace"
            assert end
            assert lists["names"][number].endswith(end)
    for row, (ids, mask) in enumerate(zip(encoded["input_ids"], encoded["attention_mask"], strict=True)):
        said = in_order(gpt2.decode(ids[mask.bool()]), lists["names"])
        assert [said.count(lists["names"][run[name][row]]) for name in ("answer", "subject")] == [1, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"names": ["Mary"]}, r"needs two names: names=\['Mary'\]; give names="),
        ({"templates": ["{name_A} and {name_B}"]}, r"must name \{name_A\}, \{name_B\} and \{name_C\} in this order"),
        ({"templates": ["{name_B} saw {name_A}; {name_C} gave it to"]}, r"in this order: '\{name_B\} saw"),
        ({"names": ["Mary", "Tom", "Mary Ann"]}, r"'Mary' and 'Mary Ann' share .* token .* leave out \['Mary Ann'\]"),
        ({"templates": ["{name_A} and {name_B} left the {shop}; {name_C} gave it to"]}, r"the slot \{shop\}"),
    ],
)  # fmt: skip
def test_what_it_refuses(given, message):
    with pytest.raises(DistillError, match=message):
        indirect_object(tokenizer(), **{"names": names(tokenizer()), **given})
