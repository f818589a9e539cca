import pytest
import torch
from torch import nn

from distill import DistillError
from distill.models.inputs import device_of, inputs_of, real_tokens, to_device, vocabulary_of
from tests.distill.tiny_models import CNN, LSTM, VOCABULARY, bert, gpt2_lm, images, mlp, t5, text, vectors, vit

CPU = torch.device("cpu")


def test_a_model_gets_the_columns_that_its_forward_names_and_never_labels():
    batch = text().batch([0, 1])
    given = inputs_of(bert(), batch)
    assert list(given) == ["input_ids", "attention_mask"]  # BERT's forward names labels too
    assert torch.equal(given["input_ids"], batch["input_ids"])
    assert set(inputs_of(LSTM(), batch)) == {"input_ids"}
    assert set(inputs_of(vit(), images().batch([0]))) == {"pixel_values"}


def test_one_column_of_another_name_is_given_by_position():
    batch = vectors().batch([0, 1])
    (given,) = inputs_of(mlp(), batch)
    assert given is batch["inputs"]


def test_adapters_and_parallel_models_are_looked_through():
    class Adapter(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.base = model

        def get_base_model(self):
            return self.base

        def forward(self, *args, **kwargs):
            return self.base(*args, **kwargs)

    batch = text().batch([0])
    assert set(inputs_of(Adapter(LSTM()), batch)) == {"input_ids"}
    assert set(inputs_of(nn.DataParallel(LSTM()), batch)) == {"input_ids"}


def test_no_column_fits():
    with pytest.raises(DistillError, match=r"CNN.forward takes pixel_values and the data has a, b.*'inputs': x"):
        inputs_of(CNN(), {"a": torch.zeros(1), "b": torch.zeros(1)})


def test_real_tokens_are_those_of_the_named_mask():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    other = torch.tensor([[0, 1], [1, 1]])
    batch = {"attention_mask": mask, "decoder_attention_mask": other}
    assert torch.equal(real_tokens(batch, 2, 3, CPU), mask.bool())
    assert torch.equal(real_tokens(batch, 2, 2, CPU, column="decoder_attention_mask"), other.bool())
    assert real_tokens({}, 2, 3, CPU).all()
    with pytest.raises(
        DistillError, match=r"attention_mask has shape \[2, 3\] and the mapped locations have 4 positions"
    ):
        real_tokens(batch, 2, 4, CPU)


def test_vocabularies():
    assert vocabulary_of(bert()) == vocabulary_of(gpt2_lm()) == vocabulary_of(t5()) == VOCABULARY
    assert vocabulary_of(vit()) is vocabulary_of(mlp()) is vocabulary_of(LSTM()) is None


def test_devices():
    batch = vectors().batch([0])
    moved = to_device(batch, torch.device("meta"))
    assert {column.device.type for column in moved.values()} == {"meta"}
    assert device_of(mlp().to("meta")).type == "meta"
    assert device_of(nn.ReLU()) == CPU
