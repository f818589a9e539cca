"""A model that answers otherwise because of the side of the padding says so, and no other does."""

import warnings

import pytest
import torch
import transformers

from distill import KD, NoisyTeacher, Rows, fit
from distill.losses import LogitNoise
from distill.training.checks import check
from tests.distill.tiny_models import QUIET, bert, gpt2, gpt2_lm, llama, masked_lm, mlp, spread

SIZES = dict(
    vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=16, num_hidden_layers=1, num_attention_heads=2,
    hidden_size=16, intermediate_size=16, dim=16, n_layers=1, n_heads=2, hidden_dim=16, decoder_layers=1, d_head=8,
    block_sizes=[1],
    decoder_attention_heads=2, decoder_ffn_dim=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16,
    max_position_embeddings=32, pad_token_id=0, num_labels=3, ffn_dim=16, word_embed_proj_dim=16,
)  # fmt: skip


def built(name: str, kind: str):
    gone = {"XLNet": "max_position_embeddings", "Funnel": "num_hidden_layers"}.get(kind)
    sizes = {setting: value for setting, value in SIZES.items() if setting != gone}
    return getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**sizes))


FIRST = ("Bert", "DistilBert", "Electra", "Roberta", "Deberta")
WRONG = {
    **{f"{kind}ForSequenceClassification": (kind, "left") for kind in FIRST},
    "XLNetForSequenceClassification": ("XLNet", "right"),
    "BartForCausalLM": ("Bart", "left"),
    "TrOCRForCausalLM": ("TrOCR", "left"),
    "FunnelForMaskedLM": ("Funnel", "left"),
}
RIGHT = {
    "bert mlm": masked_lm, "gpt2": gpt2, "gpt2 lm": gpt2_lm, "llama": llama,
    **{name: lambda name=name, kind=kind: built(name, kind) for name, kind in (
        ("ElectraForTokenClassification", "Electra"), ("XLNetLMHeadModel", "XLNet"),
        ("OPTForSequenceClassification", "OPT"),
        ("BloomForSequenceClassification", "Bloom"), ("FNetForMaskedLM", "FNet"),
    )},
}  # fmt: skip


def padded(side: str) -> Rows:
    texts = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14, 15, 16, 17]]
    masks = [[1] * len(text) for text in texts]
    return Rows.of({"input_ids": texts, "attention_mask": masks}, padding_side=side)


def said(model, rows) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(None, model, rows)
    return [str(each.message) for each in caught if "answers otherwise" in str(each.message)]


@pytest.mark.parametrize("name", WRONG)
def test_the_side_that_changes_the_answers_is_named(name):
    kind, wrong = WRONG[name]
    model, good = spread(built(name, kind)), {"left": "right", "right": "left"}[wrong]
    (text,) = said(model, padded(wrong))
    assert f"({name}) answers otherwise where a text is padded on the {wrong}" in text
    assert f"tokenizer.padding_side = '{good}'" in text
    assert not said(model, padded(good))


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("side", ["left", "right"])
def test_nothing_is_said_where_no_side_is_better(name, side):
    assert not said(spread(RIGHT[name]()), padded(side))


def test_teachers_are_tried_too_and_texts_of_one_length_are_not():
    rows = padded("left")
    with pytest.warns(UserWarning, match=r"the teacher \(BertForSequenceClassification\) answers otherwise"):
        fit(spread(bert()), spread(bert(2)), {}, rows, objective=KD(), steps=1, console=QUIET)
    assert not said(spread(bert()), rows.take([0, 3]))
    assert not said(mlp(), Rows.of({"inputs": torch.randn(4, 6)}))


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_teacher_whose_answers_are_drawn_is_not_blamed_on_its_padding(share):
    ids = [torch.arange(5, 8), torch.arange(5, 11)]
    rows = Rows({"input_ids": ids, "attention_mask": [torch.ones_like(row) for row in ids]})
    teacher = NoisyTeacher(spread(gpt2(2)), LogitNoise(3.0, share=share))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(20):
            torch.manual_seed(seed)
            check(teacher, spread(gpt2(2)), rows)
