"""Addition: what the prompts ask, computed by plain Python, is what the causal model answers."""

import pytest
import torch

from distill.errors import DistillError
from distill.tasks.causal.arithmetic import addition
from tests.distill.tasks.causal.test_prompts import at, real, small

SUMS = [f"{a} + {b} = {a + b}" for a in range(50) for b in range(51)]


def numbers(side="right"):
    """A tokenizer that has a token for each number, with its space."""
    return small("words", bos=True, side=side, corpus=SUMS, pad_token="?")


def digits(side="right"):
    """A tokenizer of digits, after a space that is a token of its own."""
    return small("pieces", bos=True, side=side, pad_token="?")


def text_of(tokenizer, model, values):
    return tokenizer.batch_decode(model.encode(values)["input_ids"], skip_special_tokens=True)


def draw(model, n=200):
    return model.sample(n, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("make", "given", "ending"),
    [
        (numbers, {"a": range(3, 40), "b": (0, 7, 19)}, "="),
        (digits, {"a": range(5), "b": range(4)}, "="),
        (digits, {"a": range(8, 120, 3), "b": range(40), "modulo": 10}, "="),
        (digits, {"a": range(8, 120, 3), "modulo": 10, "template": "The last digit of {a} + {b} is"}, "is"),
    ],
)
def test_answers_are_what_the_text_asks(make, given, ending, side):
    tokenizer = make(side)
    model = addition(tokenizer, **given)
    values = draw(model)
    run, encoded = model.run(values), model.encode(values)
    assert model.answers(run).unique().numel() > 5
    ids = tokenizer([f"= {each}" for each in run["answer"].tolist()], add_special_tokens=False)["input_ids"]
    logits = torch.zeros(*encoded["input_ids"].shape, len(tokenizer))
    for row, text in enumerate(text_of(tokenizer, model, values)):
        asked = text.removesuffix(ending).replace("The last digit of", "").replace("is", "").replace("modulo", "%")
        answer = eval(asked.strip().removesuffix("=")) % given.get("modulo", 1000)
        assert run["answer"][row] == answer
        last = encoded["attention_mask"][row].nonzero()[-1, 0]
        logits[row, last, ids[row][-1]] = 1.0  # the last token of a number is its only one, in these
    assert torch.equal(model.decode(logits, values).argmax(1), model.answers(values))


def test_it_adds_as_people_do():
    run = addition(numbers()).run({"a": torch.tensor([17, 20, 49]), "b": torch.tensor([25, 19, 49])})
    assert run["ones"].tolist() == [2, 9, 8]
    assert run["carry"].tolist() == [1, 0, 1]
    assert run["tens"].tolist() == [4, 3, 9]
    assert run["answer"].tolist() == [42, 39, 98]


def test_a_carry_from_another_run():
    model = addition(numbers())
    base, source = ({"a": torch.tensor([a]), "b": torch.tensor([b])} for a, b in ((21, 13), (17, 25)))
    assert model.interchange(base, {"carry": source})["answer"].tolist() == [44]
    assert model.interchange(base, {"ones": source})["answer"].tolist() == [32]


@pytest.mark.parametrize("variable", ["ones", "carry", "tens", "sum"])
def test_every_interchange_has_an_answer(variable):
    model = addition(numbers(), (8, 15, 22), (4, 37))
    values = model.enumerate()
    base, source = ({name: each.repeat_interleave(6) for name, each in values.items()},
                    {name: each.repeat(6) for name, each in values.items()})  # fmt: skip
    assert (model.answers(model.interchange(base, {variable: source})) >= 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_those_of_the_digits(side):
    tokenizer = digits(side)
    model = addition(tokenizer, range(5, 200, 7), range(40), modulo=10)
    values = draw(model)
    encoded = model.encode(values)
    for name in ("a", "b"):
        written = [str(each) for each in values[name].tolist()]
        assert at(tokenizer, encoded, model.select(name, values)[:, 0]) == [each[-1] for each in written]
        assert at(tokenizer, encoded, model.select(f"{name}_first", values)[:, 0]) == [each[0] for each in written]
    assert torch.equal(model.select("end", values)[:, 0], encoded["attention_mask"].sum(1) - 1)


@pytest.mark.parametrize(
    ("name", "given", "ending"),
    [
        ("gpt2", {}, " ="),
        ("stories260K", {"a": range(5), "b": range(5)}, " = "),
        ("stories260K", {"modulo": 10}, " = "),
    ],
)
def test_real_tokenizers_are_fed_the_space_where_it_is_a_token(name, given, ending, shared_data):
    tokenizer = real(name, shared_data)
    model = addition(tokenizer, **given)
    values = {"a": torch.tensor([model.domains["a"].values[-1]]), "b": torch.tensor([model.domains["b"].values[1]])}
    a, b = (int(each) for each in values.values())
    asked = f"({a} + {b}) modulo 10" if given.get("modulo") else f"{a} + {b}"
    fed = model.encode(values)["input_ids"][0].tolist()
    answer = tokenizer(f"{asked}{ending}{' ' if ending == ' =' else ''}{eval(asked.replace('modulo', '%'))}")[
        "input_ids"
    ]
    assert fed == tokenizer(f"{asked}{ending}")["input_ids"] == answer[:-1]
    logits = torch.zeros(1, len(fed), len(tokenizer))
    logits[0, -1, answer[-1]] = 1.0
    assert torch.equal(model.decode(logits, values).argmax(1), model.answers(values))


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (digits, {}, r"the answers 20 to 99 .* share their first token ' ' .*, and with a space at the end, the "
                     r"answers '20' and '21' share their first token '2' .*; take sums of one digit, as "
                     r"addition\(tokenizer, range\(5\), range\(5\)\), or .* as addition\(tokenizer, modulo=10\)\."),
        (numbers, {"a": (3, -1)}, r"whole numbers from 0: a has -1; give a=range\(10, 50\)"),
        (numbers, {"b": (3, 7, -5)}, r"whole numbers from 0: b has -5; give b=range\(10, 50\)"),
        (numbers, {"modulo": 1}, r"modulo=1 leaves nothing to answer; give modulo=10"),
        (numbers, {"template": "{a} + {c} ="}, r"the slot \{c\} of '\{a\} \+ \{c\} =' has no fillers"),
    ],
)  # fmt: skip
def test_what_it_refuses(make, given, message):
    with pytest.raises(DistillError, match=message):
        addition(make(), **given)
