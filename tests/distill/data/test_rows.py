import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset as HubDataset
from datasets import DatasetDict
from jaxtyping import TypeCheckError
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import distill
from distill.data import columns
from distill.errors import DistillError
from distill.losses.response import kd
from distill.tasks import Rows
from tests.distill.tiny_models import bert, spread

TOKENS = {
    "input_ids": [torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([9, 10])],
    "attention_mask": [torch.tensor([1, 1, 1]), torch.tensor([1]), torch.tensor([1, 1])],
    "token_type_ids": [torch.tensor([1, 1, 1]), torch.tensor([1]), torch.tensor([1, 1])],
    "special_tokens_mask": [torch.tensor([0, 0, 0]), torch.tensor([0]), torch.tensor([0, 0])],
    "labels": [torch.tensor([1, 2, 3]), torch.tensor([1]), torch.tensor([2, 2])],
    "weight": torch.tensor([0.5, 1.5, 2.5]),
}


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_is_padded_to_its_longest_row_with_the_value_of_each_column(side):
    batch = Rows(TOKENS, pad_id=99, padding_side=side).batch([1, 2])
    padded = {"input_ids": 99, "attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1, "labels": -100}
    for name, pad in padded.items():
        short, long = TOKENS[name][1].tolist(), TOKENS[name][2].tolist()
        assert batch[name].tolist() == [[*short, pad] if side == "right" else [pad, *short], long], name
    assert batch["weight"].tolist() == [1.5, 2.5]
    assert list(batch) == list(TOKENS)


def test_rows_are_not_padded_for_rows_outside_the_batch():
    assert Rows(TOKENS).batch([1])["input_ids"].tolist() == [[8]]


def test_indices_keep_their_order_and_may_repeat_or_count_from_the_end():
    rows = Rows.of({"x": torch.arange(5) * 10, "labels": [0, 1, 2, 3, 4]})
    for indices in ([3, 0, 3, -1], torch.tensor([3, 0, 3, -1])):
        assert rows.batch(indices)["x"].tolist() == [30, 0, 30, 40]
        assert rows.take(indices).batch(range(4))["labels"].tolist() == [3, 0, 3, 4]


def test_take_keeps_padding():
    taken = Rows(TOKENS, pad_id=99, padding_side="left").take([0, 1])
    assert len(taken) == 2
    assert taken.batch([0, 1])["input_ids"].tolist() == [[5, 6, 7], [99, 99, 8]]


def test_one_row_is_a_dict_without_padding_and_iteration_ends():
    rows = Rows(TOKENS)
    assert rows[-1]["input_ids"].tolist() == [9, 10]
    assert [row["weight"].item() for row in rows] == [0.5, 1.5, 2.5]
    with pytest.raises(IndexError, match="row 3 of 3"):
        rows[3]


class Maps(Dataset):
    """A map-style data set that, as many do, raises no IndexError at its end."""

    def __init__(self, make, count=3):
        self.make, self.count = make, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return self.make(i)


PIXELS = np.arange(12, dtype=np.float32).reshape(3, 2, 2)


@pytest.mark.parametrize(
    "data",
    [
        {"labels": [2, 0, 1], "pixels": PIXELS},
        {"labels": torch.tensor([2, 0, 1]), "pixels": PIXELS.tolist()},
        [{"labels": label, "pixels": pixels} for label, pixels in zip([2, 0, 1], PIXELS, strict=True)],
        Maps(lambda i: {"labels": torch.tensor((2, 0, 1)[i]), "pixels": torch.tensor(PIXELS[i])}),
        HubDataset.from_dict({"labels": [2, 0, 1], "pixels": PIXELS.tolist()}),
    ],
    ids=["dict", "dict-of-lists", "list-of-dicts", "torch", "hub"],
)
def test_every_kind_of_data_becomes_the_same_columns(data):
    rows = Rows.of(data)
    assert rows.columns == ("labels", "pixels")
    batch = rows.batch([0, 1, 2])
    assert torch.equal(batch["labels"], torch.tensor([2, 0, 1]))
    assert torch.equal(batch["pixels"], torch.tensor(PIXELS))


@pytest.mark.parametrize(
    "data",
    [
        TensorDataset(torch.arange(6.0).view(3, 2), torch.tensor([1, 0, 1])),
        Maps(lambda i: (torch.arange(2.0) + 2 * i, (i + 1) % 2)),
    ],
)
def test_pairs_become_inputs_and_labels(data):
    batch = Rows.of(data).batch([2, 0])
    assert batch["inputs"].tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert batch["labels"].tolist() == [1, 1]


def test_ragged_data_from_the_hub_library_and_its_chosen_columns():
    data = HubDataset.from_dict(
        {"text": ["a b", "c"], "input_ids": [[4, 5], [6]], "attention_mask": [[1, 1], [1]], "label": [1, 0]}
    )
    data.set_format("torch", columns=["input_ids", "attention_mask", "label"])
    rows = Rows.of(data)
    assert rows.columns == ("input_ids", "attention_mask", "labels")
    assert rows.batch([0, 1])["input_ids"].tolist() == [[4, 5], [6, 0]]


def test_a_rows_is_itself_and_numbers_keep_their_type():
    rows = Rows.of({"x": torch.arange(3, dtype=torch.float64), "y": torch.arange(3, dtype=torch.uint8)})
    assert Rows.of(rows) is rows
    assert [rows[0]["x"].dtype, rows[0]["y"].dtype] == [torch.float64, torch.uint8]


@pytest.mark.parametrize("of", [list, lambda rows: rows, np.asarray], ids=["list", "rows", "array"])
def test_floats_of_numpy_are_those_of_models(of):
    table = {"x": of(np.arange(6, dtype=np.float64).reshape(3, 2)), "y": of(np.arange(3, dtype=np.float64))}
    for data in (table, [{"x": x, "y": y} for x, y in zip(*table.values(), strict=True)]):
        rows = Rows.of(data)
        assert {rows[0]["x"].dtype, rows[0]["y"].dtype} == {torch.float32}
        assert torch.nn.Linear(2, 1)(rows.batch([0, 1])["x"]).shape == (2, 1)


@pytest.mark.parametrize("labels", [np.array([1, 0], dtype=np.int32), np.array([True, False]), [True, False]])
def test_labels_are_whole_numbers_that_losses_take(labels):
    for data in ({"x": [0.5] * len(labels), "label": labels}, [{"x": 1.0, "label": label} for label in labels]):
        assert Rows.of(data).table["labels"].dtype == torch.int64


class Stream(IterableDataset):
    def __iter__(self):
        yield {"x": 1}


@pytest.mark.parametrize("of", [HubDataset.from_dict, dict, pandas.DataFrame], ids=["hub", "dict", "pandas"])
def test_texts_and_records_beside_numbers_are_left_out_and_named(of):
    numbers = {"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1]], "idx": [7, 8], "label": [1, 0]}
    others = {"id": ["a", "b"], "sentence": [None, "x"], "tags": [["y"], ["z"]], "chat": [[{"role": "u"}]] * 2}
    with pytest.warns(UserWarning, match=r"'id', 'sentence', 'tags', 'chat' hold no numbers.*stay are 'input_ids'"):
        rows = Rows.of(of({**numbers, **others}))
    expected = Rows.of(of(numbers))
    assert rows.columns == expected.columns
    for name, column in expected.batch([0, 1]).items():
        assert rows.batch([0, 1])[name].equal(column)
    with pytest.warns(UserWarning, match="'sentence', 'tags', 'chat' hold"):
        assert Rows.of(of({**numbers, **others}), clusters="id").clusters.tolist() == [[0], [1]]


def test_vectors_of_several_lengths_are_padded_by_zeros_and_train_as_embeddings():
    draw = torch.Generator().manual_seed(0)
    vectors = [torch.randn(length, 16, generator=draw) for length in (2, 4, 3, 3)]
    data = {"inputs_embeds": vectors, "attention_mask": [torch.ones(len(each)).long() for each in vectors]}
    batch = Rows.of(data).batch([1, 0])
    assert batch["inputs_embeds"].shape == (2, 4, 16)
    assert batch["inputs_embeds"][0].equal(vectors[1])
    assert batch["inputs_embeds"][1, :2].equal(vectors[0])
    assert not batch["inputs_embeds"][1, 2:].any()
    assert batch["attention_mask"][1].tolist() == [1, 1, 0, 0]
    teacher, student = spread(bert(2), 0), spread(bert(1), 1)
    schedule = distill.Schedule(steps=2, batch_size=4, lr=1e-3)
    (first, *_) = distill.steps(teacher, student, {}, data, objective=distill.KD(), schedule=schedule)
    student = spread(bert(1), 1)
    with torch.no_grad():
        one, other = (
            torch.cat([model(inputs_embeds=row[None]).logits for row in vectors]) for model in (student, teacher)
        )
    assert first.loss == pytest.approx(float(kd(one, other, temperature=2.0)), rel=1e-5)


def test_streams_end_where_memory_for_them_does(monkeypatch):
    monkeypatch.setattr(columns, "MOST_OF_STREAM", 200)
    stream = HubDataset.from_dict({"x": [[1, 2, 3]] * 50}).to_iterable_dataset()
    with (
        pytest.warns(UserWarning, match="is read once"),
        pytest.raises(DistillError, match=r"its first 8 rows fill .*save_to_disk\('folder'\).*stream\.take\(4\)"),
    ):
        Rows.of(stream)


class NoLength:
    def __getitem__(self, index):
        return {"x": index}


def test_a_stream_is_read_once_which_is_said():
    with pytest.warns(UserWarning, match=r"a Stream without length.*give a Dataset with __len__ and __getitem__"):
        rows = Rows.of(Stream())
    assert rows.table["x"].tolist() == [1]
    datasets = pytest.importorskip("datasets")
    columns = {"x": [[1, 2], [3]], "labels": [0, 1]}
    with pytest.warns(UserWarning, match=r"a IterableDataset without length"):
        rows = Rows.of(datasets.Dataset.from_dict(columns).to_iterable_dataset())
    expected = Rows.of(datasets.Dataset.from_dict(columns)).batch([0, 1])
    assert all(column.equal(expected[name]) for name, column in rows.batch([0, 1]).items())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"x": []}, "no rows"),
        ([], "no rows"),
        ({}, "dict of 0 data sets"),
        ({"x": [1, 2], "labels": [1]}, "differ in length: 'x' 2, 'labels' 1"),
        (3, "type int cannot be read as rows"),
        ("my.csv", "type str cannot"),
        (NoLength(), "type NoLength cannot .* __len__"),
        (DatasetDict(train=HubDataset.from_dict({"x": [1]})), r"\('train'\); give one of them"),
        (torch.zeros(2, 3), "row 0 of the data is a Tensor"),
        ([{"x": 1}, {"y": 1}], r"rows 0 and 1 .* \['x'\] and \['y'\]"),
        ({"text": ["good", "bad"]}, "'text' cannot become a tensor .* tokenizer"),
        ({"x": [1, None]}, "'x' cannot become a tensor"),
        ({"x": torch.tensor(1.0)}, "'x' is a single number"),
        ({"x": [np.zeros((2, 2)), np.zeros((2, 3))]}, r"'x' differ in shape: \(2, 2\) and \(2, 3\)"),
        ({"x": [np.zeros(2), np.zeros(())]}, r"'x' differ in shape: \(\) and \(2,\)"),
        ({"input_ids": [[1, 2], [3]]}, "no 'attention_mask'"),
    ],
)
def test_what_cannot_be_rows_says_why(data, message):
    with pytest.raises(DistillError, match=message):
        Rows.of(data)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 5], "rows 0 to 5 .* 3 rows"),
        ([-4], "rows -4 to -4"),
        ([], "non-empty"),
        (torch.tensor([True, False, True]), "torch.bool"),
        (torch.tensor([[0]]), r"shape \(1, 1\)"),
    ],
)
def test_indices_that_choose_no_rows_are_errors(indices, message):
    with pytest.raises(DistillError, match=message):
        Rows(TOKENS).batch(indices)


def test_an_unknown_padding_side_is_an_error():
    with pytest.raises((DistillError, TypeCheckError), match="padding_side"):
        Rows({"x": torch.ones(1)}, padding_side="middle")
