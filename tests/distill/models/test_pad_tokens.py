"""Classifiers that answer at the last token that is no padding, as they come: without a padding token."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

import distill
from distill import DistillError, Rows
from distill.evaluation.metrics import accuracy
from distill.models.inputs import inputs_of
from interventions import run
from tests.distill.tiny_models import CLASSES, QUIET, VOCABULARY, spread, text

END = 39
SAID = "has no padding token, so texts are padded with its end token 39"
TYPES = ("gpt2", "llama", "qwen2", "gpt_neox", "opt", "mistral", "phi3", "gemma2")


def classifier(model_type: str, seed: int = 0, **settings) -> torch.nn.Module:
    """As a checkpoint comes: an end token and no padding token."""
    told = {"eos_token_id": END, "pad_token_id": None, **settings}
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, intermediate_size=24, ffn_dim=24, word_embed_proj_dim=16,
        max_position_embeddings=24, num_labels=CLASSES, bos_token_id=0, **told,
    )  # fmt: skip
    config.pad_token_id = told["pad_token_id"]
    return spread(AutoModelForSequenceClassification.from_config(config), seed)


@pytest.mark.parametrize("model_type", TYPES)
def test_each_is_answered_as_if_it_were_alone_and_left_as_it_was(model_type):
    """Whatever pads the rows; the teacher knows no padding token afterwards either, the student does."""
    teacher, student, data = classifier(model_type), classifier(model_type, 1), text(8)
    alone = [_alone(teacher, data, row) for row in range(4)]
    with pytest.warns(UserWarning, match=SAID), distill.metrics.evaluating(teacher), torch.no_grad():
        together = run(teacher, inputs_of(teacher, data.batch(range(4)))).logits
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)
    assert teacher.config.pad_token_id is None
    with pytest.warns(UserWarning, match=SAID):
        distill.fit(teacher, student, "full", data, steps=1, batch_size=4, console=QUIET)
    with pytest.warns(UserWarning, match=SAID):
        assert (
            distill.evaluate(
                teacher, student, distill.layer_mapping(teacher, student, "full"), data, pairs=8
            ).interchange
            is not None
        )
    assert (teacher.config.pad_token_id, student.config.pad_token_id) == (None, END)


def _alone(model, data, row):
    with torch.no_grad():
        return model(input_ids=data[row]["input_ids"][None]).logits[0]


def test_rows_padded_with_another_token_than_the_models_are_answered_alike():
    """Rows are padded with 0 where nobody says otherwise; this model takes 38 for padding, and reads 0 as a word."""
    model, rows = classifier("gpt2", pad_token_id=38), text(8)
    with torch.no_grad():
        found = run(model, inputs_of(model, rows.batch(range(8)))).logits
    assert torch.allclose(found, torch.stack([_alone(model, rows, row) for row in range(8)]), atol=1e-5)


def test_no_end_token_either_is_one_line_with_the_way_out():
    model, rows = classifier("gpt2", eos_token_id=None), text(8)
    with pytest.raises(DistillError, match=r"has no padding token: config.pad_token_id=None; name one"):
        accuracy(model, rows)
    assert accuracy(model, Rows({name: column[:1] for name, column in rows.table.items()})).count == 1


def test_what_fails_leaves_the_student_without_one():
    student = classifier("gpt2")
    with pytest.warns(UserWarning, match=SAID), pytest.raises(DistillError, match="weights names"):
        distill.fit(classifier("gpt2", 1), student, {}, text(8), weights={"no": 1.0}, steps=1, console=QUIET)
    assert student.config.pad_token_id is None
