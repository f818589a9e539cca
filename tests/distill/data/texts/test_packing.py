"""Packed rows: nothing is lost, little is wasted, and documents in a row do not see each other."""

import pytest
import torch

from distill.data.texts.packing import _best_fit, _in_order, packed
from distill.tasks import load
from tests.distill.data.texts.test_language import CHATS, PROMPTS, TEXTS
from tests.distill.data.texts.tokenizers import CHATML, tokenizer


def lengths(kind, count=3000):
    draw = torch.Generator().manual_seed(1)
    if kind == "even":
        return torch.randint(1, 129, (count,), generator=draw).tolist()
    return torch.randn(count, generator=draw).mul(0.9).add(3).exp().long().clamp(1, 128).tolist()


@pytest.mark.parametrize("place", [_best_fit, _in_order])
@pytest.mark.parametrize("kind", ["even", "tail"])
def test_every_document_is_in_one_row_that_is_not_too_long(place, kind):
    given = lengths(kind)
    rows = place(given, 128)
    assert sorted(number for row in rows for number in row) == list(range(len(given)))
    assert all(sum(given[number] for number in row) <= 128 for row in rows)
    assert rows == sorted(map(sorted, rows))
    fewest = sum(given) / 128
    if place is _best_fit:
        assert len(rows) <= 11 / 9 * fewest + 1
        assert len(rows) < len(_in_order(given, 128)) or kind == "tail"
    else:
        assert [number for row in rows for number in row] == list(range(len(given)))
        assert len(rows) <= 2 * fewest + 1


def test_columns_are_joined_and_positions_begin_anew():
    table = {"input_ids": [torch.tensor([5, 6, 7]), torch.tensor([8, 9]), torch.tensor([4])],
             "labels": [torch.tensor([-100, 6, 7]), torch.tensor([8, 9]), torch.tensor([4])]}  # fmt: skip
    joined = packed(table, 4, "in order")
    assert [each.tolist() for each in joined["input_ids"]] == [[5, 6, 7], [8, 9, 4]]
    assert [each.tolist() for each in joined["labels"]] == [[-100, 6, 7], [8, 9, 4]]
    assert [each.tolist() for each in joined["position_ids"]] == [[0, 1, 2], [0, 1, 0]]
    assert [each.tolist() for each in packed(table, 4)["input_ids"]] == [[5, 6, 7, 4], [8, 9]]


@pytest.mark.parametrize("packing", ["best-fit", "in order"])
def test_packed_texts_are_all_their_tokens(packing):
    """Longer ones continue in another row; each piece is a document of its own."""
    reader = tokenizer(adds=True)
    data = [*TEXTS, {"text": "the cat likes the bird " * 30}]
    whole = load("text", data=data, tokenizer=reader, eval_data=data[:1], max_length=1000).train
    blocks = load("text", data=data, tokenizer=reader, eval_data=data[:1], block_size=32, packing=packing).train
    assert sorted(torch.cat(list(whole.table["input_ids"])).tolist()) == sorted(
        torch.cat(list(blocks.table["input_ids"])).tolist()
    )
    assert max(map(len, blocks.table["input_ids"])) <= 32
    assert all(len(row["attention_mask"]) == len(row["input_ids"]) == len(row["labels"]) for row in blocks)
    starts = sum(int((row["position_ids"] == 0).sum()) for row in blocks)
    assert starts == sum(-(-len(row["input_ids"]) // 32) for row in whole)


def test_packed_chats_keep_their_labels_and_are_cut_with_a_line():
    reader = tokenizer(template=CHATML)
    for data in (PROMPTS, CHATS):
        whole = load("chat", data=data, tokenizer=reader, eval_data=data[:1]).train
        blocks = load("chat", data=data, tokenizer=reader, eval_data=data[:1], packing="in order").train
        for name in ("input_ids", "labels", "special_tokens_mask"):
            assert torch.cat(list(whole.table[name])).equal(torch.cat(list(blocks.table[name])))
        assert len(blocks) < len(whole) / 4
    with pytest.warns(UserWarning, match="of 20 rows of the data have more than 8 tokens and are cut there"):
        load("chat", data=PROMPTS, tokenizer=reader, block_size=8)
