"""Vocabularies of one tokenizer that are padded to other sizes: the answers of both are cut to its tokens."""

import copy
import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from distill import DIITO, KD, CausalLM, DistillError, fit, steps
from distill.losses.chunked import _Mean
from distill.models import head as heads
from distill.models.outputs import Leading, cut_to_tokens
from distill.training.schedule import Schedule
from tests.distill.tiny_models import QUIET, spread

TOKENS, ROWS, LENGTH = 40, 8, 9


def tokenizer_of(words: int = TOKENS, prefix: str = "w") -> transformers.PreTrainedTokenizerFast:
    vocabulary = {f"{prefix}{number}": number for number in range(words)}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token=f"{prefix}0"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=whole, pad_token=f"{prefix}1", unk_token=f"{prefix}0")


def llama(vocabulary: int, layers: int, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    return spread(transformers.LlamaForCausalLM(config), seed).double()


def data() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(2, TOKENS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))}


def cut(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with the tokens alone."""
    made = copy.deepcopy(model)
    made.resize_token_embeddings(TOKENS)
    return made


SETTINGS = dict(steps=3, batch_size=4, lr=1e-3, console=QUIET)
NOTE = "the teacher knows 48 tokens and the student 64, of which 40 are those of their tokenizer"


@pytest.mark.parametrize("large", [2**62, 1], ids=["whole", "in parts"])
def test_a_padded_student_of_a_padded_teacher_learns_what_models_of_the_tokens_do(large, monkeypatch):
    monkeypatch.setattr(heads, "LARGE", large)
    made, differentiate = [], _Mean.value_and_gradients
    monkeypatch.setattr(_Mean, "value_and_gradients", lambda mean: made.append(mean) or differentiate(mean))
    teacher, student = llama(48, 3), llama(64, 2, 1)
    plain, objectives = cut(student), lambda: [KD(2.0), CausalLM(), DIITO()]
    expected = fit(cut(teacher), plain, "full", data(), objective=objectives(), **SETTINGS)
    with pytest.warns(UserWarning, match=NOTE):
        found = fit(teacher, student, "full", data(), objective=objectives(), tokenizer=tokenizer_of(), **SETTINGS)
    assert len(made) == (0 if large > 1 else 2 * 3 * SETTINGS["steps"])  # both trainings, three terms a step
    for one, other in zip(found.records, expected.records, strict=True):
        assert one.terms == pytest.approx(other.terms, rel=1e-9)
    torch.testing.assert_close(student.lm_head.weight[:TOKENS], plain.lm_head.weight, rtol=0, atol=1e-9)
    assert json.dumps(found.settings["answers"])
    assert student.lm_head.weight[TOKENS:].any()


def test_tokenizers_that_lie_beside_the_models_are_found(tmp_path):
    teacher, student = llama(48, 3), llama(64, 2, 1)
    for name, each in (("teacher", teacher), ("student", student)):
        each.save_pretrained(tmp_path / name)
        tokenizer_of().save_pretrained(tmp_path / name)
    loaded = [
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / name).double() for name in ("teacher", "student")
    ]
    with pytest.warns(UserWarning, match=NOTE):
        records = list(steps(*loaded, {}, data(), objective=KD(2.0), schedule=Schedule(steps=2, batch_size=4)))
    assert len(records) == 2
    tokenizer_of(prefix="v").save_pretrained(tmp_path / "student")
    with pytest.raises(DistillError, match="they read different vocabularies"):
        list(steps(*loaded, {}, data(), objective=KD(2.0), schedule=Schedule(steps=2, batch_size=4)))


@pytest.mark.parametrize("tokenizer", [None, tokenizer_of(50), tokenizer_of(TOKENS)], ids=["none", "too many", "far"])
def test_vocabularies_that_are_not_known_to_be_padded_are_refused(tokenizer):
    student = llama(64, 2) if tokenizer is None or len(tokenizer) == 50 else llama(2000, 2)
    with pytest.raises(
        DistillError, match=r"the teacher knows 48 tokens and the student .*fit\(…, tokenizer=tokenizer\)"
    ):
        fit(llama(48, 3), student, {}, data(), objective=KD(2.0), tokenizer=tokenizer, **SETTINGS)


def test_rules_of_the_user_are_cut_too():
    with pytest.warns(UserWarning, match=NOTE):
        rules = cut_to_tokens(llama(48, 1), llama(64, 1), ("logits", None), tokenizer_of())
    assert rules == (Leading(TOKENS, "logits"), Leading(TOKENS))
    assert not rules[0].reads_logits
    assert rules[1].reads_logits


def test_models_of_one_size_keep_their_rules():
    model = llama(48, 1)
    assert cut_to_tokens(model, model, "logits", tokenizer_of()) == "logits"
    assert cut_to_tokens(None, model, None, tokenizer_of()) is None
