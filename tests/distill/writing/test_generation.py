import re

import pytest
import torch
from transformers import GenerationConfig

from distill import DistillError
from distill.models.inputs import innermost
from distill.writing.generation import Generation, generate, reads_by_encoder, refuse_unable
from distill.writing.prompts import prompts_for
from tests.distill.tiny_models import VOCABULARY, bert, gpt2_lm, llama, spread
from tests.distill.writing.words import PROMPTS, WRITERS, tensors


def write(model, settings, rows=PROMPTS, seeds=None, tokens=8, known=None):
    columns = prompts_for({}, tensors(rows), 0, by_encoder=reads_by_encoder(model))
    seeds = range(len(rows)) if seeds is None else seeds
    return [each.tolist() for each in generate(model, columns, Generation(tokens, settings), seeds, known)]


@pytest.mark.parametrize("settings", [{}, {"do_sample": False}, {"top_k": 5, "temperature": 0.7, "eos_token_id": 7}])
@pytest.mark.parametrize("kind", WRITERS)
def test_what_a_row_says_is_independent_of_the_rows_beside_it(kind, settings):
    model = WRITERS[kind]()
    together = write(model, settings)
    alone = [write(model, settings, [row], [seed])[0] for seed, row in enumerate(PROMPTS)]
    assert together == alone
    assert len({tuple(each) for each in together}) > 1


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"repetition_penalty": 5.0}])
def test_most_probable_text_is_that_of_transformers(kind, settings):
    model = WRITERS[kind]()
    start = 1 if reads_by_encoder(model) else None
    for row in PROMPTS:
        ids = torch.tensor([row])
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=0, **settings
        )
        expected = found[0, start or len(row) :].tolist()
        if kind == "bart decoder" and 2 in expected:
            expected = expected[: expected.index(2) + 1]
        assert write(model, {"do_sample": False, **settings}, [row]) == [expected]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 6}, {"top_p": 0.7, "temperature": 2.0}])
def test_tokens_are_drawn_from_the_distribution_of_the_model(settings):
    model, count = spread(gpt2_lm(2)), 4000
    columns = prompts_for({}, tensors([PROMPTS[0]] * count), 0, by_encoder=False)
    drawn = torch.cat(generate(model, columns, Generation(1, settings), range(count)))
    shares = torch.bincount(drawn, minlength=VOCABULARY).double() / count
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double() / settings.get("temperature", 1.0)
    if "top_k" in settings:
        logits = logits.where(logits >= logits.topk(6).values[-1], -torch.inf)
    if "top_p" in settings:
        order = logits.sort(descending=True)
        before = order.values.softmax(-1).cumsum(-1) - order.values.softmax(-1)
        logits[order.indices[before >= 0.7]] = -torch.inf
    p = logits.softmax(-1)
    assert bool((shares[p == 0] == 0).all())
    assert bool(((shares - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all())
    assert int((p > 0.02).sum()) > 2


@pytest.mark.parametrize("kind", WRITERS)
def test_nothing_is_left_behind(kind):
    model = WRITERS[kind]().train()
    innermost(model).generation_config = own = GenerationConfig(repetition_penalty=9.0, max_length=3, do_sample=True)
    before, state, config = set(vars(model)), torch.get_rng_state(), model.config.to_dict()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    write(model, {})
    assert model.generation_config is own
    assert own.to_diff_dict() == GenerationConfig(repetition_penalty=9.0, max_length=3, do_sample=True).to_diff_dict()
    assert set(vars(model)) == before
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_settings_of_the_model_are_not_those_of_the_text():
    model = spread(gpt2_lm(2))
    plain = write(model, {"do_sample": False})
    model.generation_config = GenerationConfig(repetition_penalty=50.0, num_beams=4, max_length=2, min_new_tokens=9)
    assert write(model, {"do_sample": False}) == plain
    assert write(model, {"do_sample": False, "repetition_penalty": 50.0}) != plain


def test_text_ends_with_its_end_token():
    model = spread(gpt2_lm(2))
    whole = write(model, {})
    ends = [whole[0][2], whole[2][4]]
    for row, found in zip(whole, write(model, {"eos_token_id": ends}), strict=True):
        first = next((place for place, token in enumerate(row) if token in ends), len(row))
        assert found == row[: first + 1]
    model.generation_config.eos_token_id = ends
    assert write(model, {}) == write(model, {"eos_token_id": ends})


def test_tokens_that_the_other_model_does_not_know_are_not_written():
    model = spread(gpt2_lm(2))
    assert max(map(max, write(model, {"temperature": 9.0}))) >= 20
    assert max(map(max, write(model, {"temperature": 9.0}, known=20))) < 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tempature": 1.0}, "Written has no setting of generation 'tempature', did you mean 'temperature'?"),
        ({"num_return_sequences": 2}, "no setting of generation 'num_return_sequences'"),
        ({"temperature": 0.0}, "cannot be used: .*temperature"),
        ({"top_p": 1.5}, "cannot be used: .*top_p"),
        ({"num_beams": 4}, "num_beams=4 searches for the most probable text; choose one"),
        ({"do_sample": False, "num_beams": 0}, "num_beams=0 searches nothing"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(DistillError, match=message) as error:
        Generation(8, settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tokens", [0, True])
def test_no_tokens(tokens):
    with pytest.raises(DistillError, match=re.escape(f"max_new_tokens={tokens}")):
        Generation(tokens)


def test_model_that_cannot_write():
    with pytest.raises(DistillError, match="the student cannot write: BertForSequenceClassification has no generate"):
        refuse_unable(bert(2), "student")
    with pytest.raises(DistillError, match=r"there is no teacher to write, as teacher=None; .*by='student'"):
        refuse_unable(None, "teacher")
    refuse_unable(llama(2), "teacher")
