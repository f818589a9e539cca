"""Promise 6 for sites inside blocks and in generation, and what an operator may do: draw, and call the model."""

import pytest
import torch

from interventions import Add, Location, Mixup, Noise, Zero, interchange, intervene, run
from interventions.locations import BLOCK_SITES
from tests.interventions.tiny_models import VOCABULARY, answer, batch, make

from .attentions import at

SITES = [site for site in BLOCK_SITES if site != "attention_scores"]
PROMPTS = torch.randint(1, VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(3))
SETTINGS = dict(input_ids=PROMPTS, attention_mask=torch.ones_like(PROMPTS), max_new_tokens=4, eos_token_id=None)


@torch.no_grad()
@pytest.mark.parametrize("op", [Noise(0.5), Mixup(0.5)], ids=["Noise", "Mixup"])
@pytest.mark.parametrize("site", SITES)
def test_a_generator_is_the_only_source_of_chance(site, op):
    model, inputs, before = make("llama"), batch("llama"), torch.get_rng_state()
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    one, same, other = (
        interchange(model, inputs, None, {at(site): op}, generator=generator).logits for generator in generators
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    shape = run(model, inputs, at=[at(site)]).vectors(at(site)).shape
    expected = torch.Generator().manual_seed(1)
    torch.randn(shape, generator=expected)
    assert torch.equal(generators[0].get_state(), expected.get_state())  # drawn once, and no more than is written


@torch.no_grad()
@pytest.mark.parametrize("site", ["query", "attention_heads", "mlp_activation"])
def test_without_a_generator_the_default_one_is_drawn_from(site):
    model, inputs, after = make("llama"), batch("llama"), []
    for generator in (torch.default_generator, None):
        torch.manual_seed(0)
        after.append(interchange(model, inputs, None, {at(site): Noise(0.5)}, generator=generator).logits)
        after.append(torch.get_rng_state())
    assert torch.equal(after[0], after[2])
    assert torch.equal(after[1], after[3])


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("site", BLOCK_SITES)
def test_a_resumed_counterfactual_has_the_dropout_of_the_base(name, site):
    """Fails if dropout is drawn anew below, beside or above the write."""
    place = at(site)
    new = run(make(name), batch(name, 2), at=[place]).vectors(place).detach()
    model, op = make(name).train(), lambda base, source, generator: new.clone()
    torch.manual_seed(0)
    base = run(model, batch(name))
    outside = torch.get_rng_state()
    resumed = interchange(model, base, None, {place: op}).logits
    assert torch.equal(torch.get_rng_state(), outside)
    torch.manual_seed(0)
    with intervene(model, place, op=op):
        naive = answer(model, batch(name))
    assert torch.equal(resumed, naive)
    with intervene(model, place, op=op):
        assert not torch.equal(answer(model, batch(name)), naive)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{"num_beams": 2, "do_sample": True}, {"do_sample": True}], ids=["beams", "samples"]
)
def test_seeded_sampling(settings):
    model, answers = make("llama"), []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(seed)
        with intervene(model, at("attention_heads"), op=Noise(2.0), generator=generator):
            answers.append(model.generate(**SETTINGS, **settings))
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


def pipeline_of(model):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w0", padding_side="left")
    return pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=4, do_sample=False)


@torch.no_grad()
@pytest.mark.parametrize(("steps", "positions"), [(0, -1), (slice(1, None), None), (None, [1, -1]), (None, None)])
def test_a_pipeline(steps, positions):
    model, texts, push = make("gpt2"), ["w3 w4 w5", "w7 w8 w9 w10"], Add(torch.linspace(-3, 3, 16))
    generates = pipeline_of(model)
    plain = [answers[0]["generated_text"] for answers in generates(texts, batch_size=2)]
    with intervene(model, Location(1), op=push, steps=steps, positions=positions):
        together = [answers[0]["generated_text"] for answers in generates(texts, batch_size=2)]
        if positions is not None or steps is not None:
            assert together == [generates(text)[0]["generated_text"] for text in texts]
    assert together != plain
    assert [answers[0]["generated_text"] for answers in generates(texts, batch_size=2)] == plain


def calling(model, inputs, found: list):
    """An operator that calls the model for a metric of its own, and adds."""
    busy = []

    def op(base, source, generator):
        if busy:
            return base
        busy.append(1)
        found.append(model(**inputs).logits)
        busy.clear()
        return base + 1.5

    return op


@torch.no_grad()
@pytest.mark.parametrize("site", ["query", "attention_heads", "key", "value"])
def test_an_operator_that_calls_the_model_while_it_generates(site):
    model, answers = make("llama"), []
    for cached in (True, False):
        op = calling(model, {"input_ids": PROMPTS[:, :3]}, [])
        with intervene(model, at(site), op=op, positions=slice(None)):
            out = model.generate(**SETTINGS, do_sample=False, use_cache=cached, output_logits=True,
                                 return_dict_in_generate=True)  # fmt: skip
        answers.append(torch.stack(out.logits))
    assert torch.allclose(*answers, atol=1e-4)


@torch.no_grad()
def test_a_metric_that_calls_the_model_while_it_generates():
    model, busy, found = make("llama"), [], []

    def metric(*_):
        if not busy:
            busy.append(1)
            found.append(model(input_ids=PROMPTS[:, :3]).logits)
            busy.clear()

    with intervene(model, Location(1), op=Zero(), steps=0, positions=-1):
        expected = model(input_ids=PROMPTS[:, :3]).logits
        with model.lm_head.register_forward_hook(metric):
            model.generate(**SETTINGS, do_sample=False)
    assert len(found) == 4
    assert all(torch.equal(each, expected) for each in found)


@torch.no_grad()
@pytest.mark.parametrize(
    ("steps", "positions"),
    [
        (None, None),
        *(
            pytest.param(*each, marks=pytest.mark.xfail(strict=True, reason="a second sequence without a cache"))
            for each in ((0, None), (None, -1), (slice(1, None), -1))
        ),
    ],
)
def test_guidance_calls_the_model_while_it_generates(steps, positions):
    """Its calls without the prompt are a sequence of their own, with a cache of their own.

    Without a cache they cannot be told from single calls, so their steps are lost: known, and marked.
    """
    model, answers = make("llama"), []
    for cached in (True, False):
        with intervene(model, at("attention_heads"), op=Add(torch.tensor(1.5)), steps=steps, positions=positions):
            settings = dict(SETTINGS, do_sample=False, guidance_scale=1.7, use_cache=cached, output_logits=True)
            answers.append(torch.stack(model.generate(**settings, return_dict_in_generate=True).logits))
            answers.append(model.generate(**settings).float())
    assert torch.allclose(answers[0], answers[2], atol=1e-4)
    assert torch.equal(answers[1], answers[3])
