"""Data sets: rows by number and batches by iteration are read alike, and other data is refused."""

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from distill import Rows
from interventions import InterventionError, Location, mean_of
from interventions.analysis.data_batches import are_batches, are_rows, batches_of, count_of
from tests.interventions.tiny_models import batch, make

BLOCK = Location(1)


class Numbered:
    """Rows that are read by their numbers, with columns beside those that models take."""

    def __init__(self, columns: dict) -> None:
        self.columns_ = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns_.values())))

    def batch(self, numbers):
        return {name: column[torch.as_tensor(numbers)] for name, column in self.columns_.items()}


def test_rows_are_read_in_order_without_columns_that_the_model_does_not_take():
    inputs = batch("bert", size=7)
    rows = Numbered({**inputs, "labels": torch.zeros(7).long(), "text_number": torch.arange(7)})
    found = list(batches_of(make("bert"), rows, 3))
    assert [each.rows for each in found] == [range(3), range(3, 6), range(6, 7)]
    assert [each.number for each in found] == [0, 1, 2] == list(range(count_of(rows, 3)))
    read = [each.inputs() for each in found]
    assert all(set(each) == set(inputs) for each in read)
    assert torch.equal(torch.cat([each["input_ids"] for each in read]), inputs["input_ids"])


def test_an_encoder_decoder_keeps_labels_that_become_its_inputs():
    inputs = batch("t5")
    labels = {"labels": inputs["decoder_input_ids"]}
    encoder = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert "labels" in next(batches_of(make("t5"), Numbered({**encoder, **labels}))).inputs()
    assert "labels" not in next(batches_of(make("t5"), Numbered({**inputs, **labels}))).inputs()


@pytest.mark.parametrize("name", ["gpt2", "mlp"])
def test_means_of_rows_and_of_batches_are_the_same(name):
    model, inputs = make(name), batch(name, size=7)
    place = Location(module="0") if name == "mlp" else BLOCK
    rows = Rows.of({"inputs": inputs} if name == "mlp" else inputs)
    assert are_rows(rows)
    whole = mean_of(model, place, [inputs])[place].value
    assert torch.allclose(mean_of(model, place, rows, batch_size=2)[place].value, whole, atol=1e-6)
    assert torch.allclose(mean_of(model, place, iter([inputs]))[place].value, whole, atol=1e-6)


def test_one_call_and_several_batches_are_told_apart():
    model, inputs = make("gpt2"), batch("gpt2")
    one = [inputs, inputs["input_ids"], (inputs["input_ids"],), [inputs["input_ids"]], [{"no argument": inputs}]]
    assert not any(are_batches(model, each) for each in one)
    assert are_batches(model, [inputs, inputs])
    assert are_batches(model, iter([inputs]))
    assert are_batches(model, DataLoader([inputs], batch_size=None))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda inputs: inputs, r"data is one dict, and an iterable of inputs is needed.*write \[inputs\]"),
        (lambda inputs: "text", r"data is one str"),
        (lambda inputs: 3, r"data is one int"),
        (lambda inputs: [inputs, {}], r"batch 1 of data is \{\}, which holds no rows of tensors"),
        (lambda inputs: ["a text"], r"batch 0 of data is 'a text', which holds no rows"),
        (lambda inputs: Dataset.from_dict({"text": ["a", "b"]}), r"rows 0 to 1 of this Dataset were read as .*tensor"),
        (lambda inputs: Numbered({"a": torch.ones(2), "b": torch.ones(2)}), r"columns a, b and the model"),
        (lambda inputs: Numbered({"input_ids": torch.ones(2)[:, None].long()[:0]}), None),
    ],
)  # fmt: skip
def test_other_data_is_refused_in_one_line(data, message):
    given = data(batch("gpt2"))
    if message is None:
        assert list(batches_of(make("gpt2"), given)) == []
        return
    with pytest.raises(InterventionError, match=message) as error:
        [each.inputs() for each in batches_of(make("gpt2"), given)]
    assert "\n" not in str(error.value)


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(InterventionError, match="batch_size=0 holds no row; write batch_size=32"):
        next(batches_of(make("gpt2"), [batch("gpt2")], 0))
