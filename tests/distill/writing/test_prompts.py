import re

import datasets
import pandas
import pytest
import torch

from distill import DistillError, Rows
from distill.writing.prompts import as_prompts, as_tokens, completed, lengths, prompts_for, split
from tests.distill.writing.words import COMPLETIONS, PROMPTS, pairs, prompts, tensors


def listed(rows):
    return [row.tolist() for row in rows]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("by_encoder", [False, True])
def test_prompt_and_completion_of_a_row(side, by_encoder):
    rows = as_prompts(pairs(by_encoder), by_encoder=by_encoder)
    batch = Rows(rows.table, pad_id=8, padding_side=side).batch(range(len(rows)))
    found = split(batch, by_encoder=by_encoder)
    assert [listed(each) for each in found] == [PROMPTS, COMPLETIONS]
    assert [each.tolist() for each in lengths(batch, by_encoder=by_encoder)] == [
        list(map(len, PROMPTS)), list(map(len, COMPLETIONS))
    ]  # fmt: skip


@pytest.mark.parametrize("by_encoder", [False, True])
def test_prompts_alone(by_encoder):
    rows = as_prompts(prompts(), by_encoder=by_encoder)
    found = split(rows.batch(range(len(rows))), by_encoder=by_encoder)
    assert [listed(each) for each in found] == [PROMPTS, [[]] * 4]
    dense = as_prompts(Rows({"input_ids": torch.tensor([[5, 6], [7, 8]])}), by_encoder=by_encoder)
    assert listed(split(dense.batch([1, 0]), by_encoder=by_encoder)[0]) == [[7, 8], [5, 6]]


@pytest.mark.parametrize("by_encoder", [False, True])
def test_side_of_the_padding_of_prompts(by_encoder):
    found = prompts_for({"pixel_values": torch.ones(4, 2)}, tensors(PROMPTS), 3, by_encoder=by_encoder)
    assert set(found) == {"pixel_values", "input_ids", "attention_mask"}
    assert found["input_ids"][1].tolist() == ([8, 3, 3, 3, 3] if by_encoder else [3, 3, 3, 3, 8])
    assert found["attention_mask"][1].tolist() == ([1, 0, 0, 0, 0] if by_encoder else [0, 0, 0, 0, 1])


@pytest.mark.parametrize("side", ["right", "left"])
def test_completed_rows_are_those_that_the_data_would_hold(side):
    table = pairs().table
    special = [(each == 16).long() | (each == 5).long() for each in table["input_ids"]]
    rows = Rows({**table, "special_tokens_mask": special}, pad_id=9, padding_side=side)
    batch = rows.batch(range(4))
    extra = {"weight": torch.arange(4.0)}
    made = completed(rows, batch | extra, tensors(PROMPTS), tensors(COMPLETIONS), [16], by_encoder=False)
    assert made.keys() == batch.keys() | extra.keys()
    assert all(torch.equal(made[name], each) for name, each in (batch | extra).items())


def test_completed_rows_of_an_encoder():
    rows = Rows(pairs(True).table, pad_id=9)
    batch = rows.batch(range(4))
    made = completed(rows, batch, tensors(PROMPTS), tensors(COMPLETIONS), [], by_encoder=True)
    assert made.keys() == batch.keys()
    assert all(torch.equal(made[name], each) for name, each in batch.items())


ids, mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"x": torch.ones(2, 3)}, "completes rows of tokens, and the prompts have x"),
        ({"input_ids": ids, "labels": torch.tensor([1])}, r"labels of the prompts are torch.int64 of shape \[\] a row"),
        ({"input_ids": ids, "labels": torch.tensor([[6, 7, -100]])}, "labels of row 0 of the prompts are not its tok"),
        ({"input_ids": ids, "labels": ids[:, :2]}, r"labels of the prompts are torch.int64 of shape \[2\] a row"),
        ({"input_ids": ids, "position_ids": ids}, "the column 'position_ids' of the prompts has a value for each tok"),
        ({"input_ids": [ids[0]], "attention_mask": [mask[0]], "starts": [ids[0]]}, "the column 'starts'"),
    ],
)
def test_prompts_that_cannot_be(table, message):
    with pytest.raises(DistillError, match=message) as error:
        as_prompts(Rows(table), by_encoder=False)
    assert "\n" not in str(error.value)


def test_an_encoder_reads_no_first_tokens():
    with pytest.raises(DistillError, match="parts rows that a decoder reads, and an encoder reads a prompt of its own"):
        as_prompts(pairs(True), 2, by_encoder=True)


class Letters:
    """A tokenizer of letters that begins with 20 and ends with 7, if its template does not."""

    pad_token_id, eos_token_id, chat_template = None, 7, "{{ messages }}"

    def __call__(self, texts, add_special_tokens=True, **settings):
        ids = [[ord(letter) - 97 for letter in text] for text in texts]
        return {"input_ids": [[20, *row, 7] if add_special_tokens else row for row in ids]}

    def get_chat_template(self, name, tools):
        return self.chat_template

    def apply_chat_template(self, messages, add_generation_prompt=False, **settings):
        return "".join(each["content"] + "x" for each in messages) + "y" * add_generation_prompt


CHAT = [{"role": "user", "content": "ab"}]
ANSWERED = [*CHAT, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "prompts",
    [
        ["ab", "cde"],
        ({"prompt": "ab"}, {"prompt": "cde", "id": 1}),
        {"prompt": ["ab", "cde"], "id": [1, 2]},
        datasets.Dataset.from_dict({"prompt": ["ab", "cde"]}),
        pandas.DataFrame({"prompt": ["ab", "cde"]}),
        [{"text": "ab"}, {"text": "cde"}],
        datasets.Dataset.from_dict({"text": ["ab", "cde"]}),
        pandas.Series(["ab", "cde"]),
        [{"prompt": "ab", "completion": None}, {"prompt": "cde", "completion": None}],
        {"prompt": ["ab", "cde"], "completion": [None, None]},
        datasets.Dataset.from_dict({"prompt": ["ab", "cde"], "completion": [None, None]}),
        pandas.DataFrame({"prompt": ["ab", "cde"], "completion": [None, float("nan")]}),
    ],
)
def test_texts(prompts):
    rows = as_tokens(prompts, Letters, by_encoder=False)
    assert (listed(rows.table["input_ids"]), rows.pad_id) == ([[20, 0, 1], [20, 2, 3, 4]], 7)
    ended = as_tokens(prompts, Letters, by_encoder=True)
    assert listed(ended.table["input_ids"]) == [[20, 0, 1, 7], [20, 2, 3, 4, 7]]
    assert as_tokens(rows, Letters, by_encoder=False) is rows
    with pytest.raises(DistillError, match="no tokenizer was saved with the models"):
        as_tokens(prompts, lambda: None, by_encoder=False)


def test_instructions_are_refused_with_what_makes_prompts_of_them():
    rows = [{"instruction": "a", "input": "b", "output": "c"}]
    for given in (rows, datasets.Dataset.from_list(rows), pandas.DataFrame(rows)):
        with pytest.raises(DistillError, match="how they make a prompt is not said") as error:
            as_tokens(given, Letters, by_encoder=False)
    code = re.search(r"write it: (.*)\.$", str(error.value)).group(1)
    assert eval(code, {"data": rows}) == [{"prompt": "a\n\nb", "completion": "c"}]


def test_chats():
    rows = as_tokens([{"prompt": CHAT}, {"prompt": "c"}, {"prompt": CHAT * 2}], Letters, by_encoder=False)
    assert listed(rows.table["input_ids"]) == [[0, 1, 23, 24], [20, 2], [0, 1, 23, 0, 1, 23, 24]]
    for asked in ([{"messages": CHAT}], {"conversations": [[{"from": "human", "value": "ab"}]]}):
        assert listed(as_tokens(asked, Letters, by_encoder=False).table["input_ids"]) == [[0, 1, 23, 24]]
    mute = type("Mute", (Letters,), {"chat_template": None})
    with pytest.raises(DistillError, match="row 0 of the prompts is a chat, and the tokenizer"):
        as_tokens([{"prompt": CHAT}], mute, by_encoder=False)
    with pytest.raises(DistillError, match="row 1 of the prompts has 3 in 'prompt', which is no message"):
        as_tokens([{"prompt": CHAT}, {"prompt": 3}], Letters, by_encoder=False)


@pytest.mark.parametrize(
    "prompts",
    [
        {"prompt": ["a"], "completion": ["b"]},
        [{"text": "a", "label": 1}],
        {"messages": [ANSWERED]},
        [],
        {},
        "data.csv",
        None,
        ["a.csv", "b.jsonl"],
    ],
)
def test_data_of_other_kinds_is_left_to_others(prompts):
    assert as_tokens(prompts, Letters, by_encoder=False) is prompts
