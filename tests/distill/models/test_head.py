import pytest
import torch
from torch import nn

from distill import DistillError
from distill.models.head import penultimate
from distill.models.inputs import inputs_of
from interventions import Location, run
from tests.distill.tiny_models import (
    CLASSES,
    CNN,
    LSTM,
    VOCABULARY,
    batch_of,
    bert,
    gpt2,
    gpt2_lm,
    llama,
    masked_lm,
    mlp,
    same,
    spread,
    t5,
    vit,
    weights,
)

SMALL = dict(vocab_size=VOCABULARY, num_labels=CLASSES)


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(DistilBertConfig(**SMALL, dim=16, n_layers=2, n_heads=2, hidden_dim=24))


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(
        RobertaConfig(**SMALL, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                      max_position_embeddings=40, pad_token_id=0)
    )  # fmt: skip


HEADS = {
    bert: "classifier",
    distilbert: "classifier",
    roberta: "classifier.out_proj",
    masked_lm: "cls.predictions.decoder",
    gpt2: "score",
    gpt2_lm: "lm_head",
    llama: "lm_head",
    t5: "lm_head",
    vit: "classifier",
    mlp: "4",
    CNN: "fc",
    LSTM: "head",
}


@pytest.mark.parametrize("make", HEADS)
def test_the_head_gives_the_answer_from_the_features(make):
    model = spread(make())
    at = penultimate(model)
    assert at == Location(module=HEADS[make], io="input")
    inputs = inputs_of(model, batch_of(make))
    assert penultimate(model, inputs) == at
    with torch.no_grad():
        found = run(model, inputs, at)
        answers = model.get_submodule(at.module)(found.activations[at])
    if make is gpt2:  # answers from its last token
        mask = batch_of(make)["attention_mask"]
        answers = answers[torch.arange(3), mask.sum(1) - 1]
    assert torch.allclose(answers, found.logits, atol=1e-6)


def test_nothing_is_changed():
    model = CNN().train()
    model.fc.eval()
    before, state = weights(model), torch.random.get_rng_state()
    penultimate(model, inputs_of(model, batch_of(CNN)))
    assert same(before, weights(model))  # the running statistics of the normalisations among them
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    assert not model.fc.training


class HeadFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.body, self.unused = nn.Linear(5, 2), nn.Linear(6, 5), nn.Linear(3, 3)

    def forward(self, inputs):
        return self.head(self.body(inputs).tanh())


class Softmaxed(HeadFirst):
    def forward(self, inputs):
        return super().forward(inputs).log_softmax(-1)


def test_a_forward_finds_the_head_whatever_the_order():
    assert penultimate(HeadFirst()).module == "unused"
    assert penultimate(HeadFirst(), torch.randn(4, 6)).module == "head"
    assert penultimate(Softmaxed(), torch.randn(4, 6)).module == "body"  # the last registered that ran


def test_adapters_and_torch_attention_are_no_heads():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(mlp(), LoraConfig(target_modules=["4"]))
    assert penultimate(adapted).module.endswith("model.4")
    attention = nn.Sequential(nn.Linear(8, 4), nn.MultiheadAttention(8, 2))
    assert penultimate(attention).module == "0"


def test_conv1d_is_linear():
    from transformers.pytorch_utils import Conv1D

    assert penultimate(nn.Sequential(nn.Linear(4, 8), Conv1D(3, 8))).module == "1"


def test_without_a_head():
    with pytest.raises(DistillError, match=r"LlamaModel ends in blocks .*'layers.3.mlp.down_proj'.*Location\(-1\)"):
        penultimate(llama().model)
    with pytest.raises(DistillError, match="GPT2Model ends in blocks"):
        penultimate(gpt2().transformer)
    with pytest.raises(DistillError, match="Sequential has no linear layer"):
        penultimate(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))
    net = HeadFirst()
    net.forward = lambda inputs: inputs * 2
    with pytest.raises(DistillError, match="no linear layer of HeadFirst ran"):
        penultimate(net, torch.randn(4, 6))
