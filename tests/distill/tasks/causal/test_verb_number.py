"""Agreement of verb and subject: what the prompts say, and that a real, tiny language model agrees."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.errors import DistillError
from distill.tasks.causal.verb_number import BEFORE, BETWEEN, NOUNS, verb_number
from tests.distill.tasks.causal.test_prompts import at, real, small

FORMS = {form: (noun, number) for noun, pair in enumerate(NOUNS) for number, form in enumerate(pair)}
SAID = [t.format(subject=form, attractor=form) + " was were" for t in (*BEFORE, *BETWEEN) for form in FORMS]


def draw(model, n=200):
    return model.sample(n, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("templates", [BEFORE, BETWEEN], ids=["before", "between"])
@pytest.mark.parametrize(("bos", "side"), [(False, "left"), (True, "left"), (False, "right"), (True, "right")])
def test_the_number_is_that_of_the_subject(templates, bos, side):
    tokenizer = small(bos=bos, side=side, corpus=SAID)
    model = verb_number(tokenizer, templates=templates)
    values = draw(model)
    encoded = model.encode(values)
    places = {
        name: at(tokenizer, encoded, model.select(name, values)[:, 0]) for name in ("subject", "attractor", "end")
    }
    for row, text in enumerate(tokenizer.batch_decode(encoded["input_ids"], skip_special_tokens=True)):
        said = [word.strip(",") for word in text.lstrip("!").split() if word.strip(",") in FORMS]
        subject, attractor = said if templates is BETWEEN else said[::-1]
        assert FORMS[subject] == (values["subject"][row], model.answers(values)[row])
        assert FORMS[attractor] == (values["attractor"][row], values["attractor_number"][row])
        assert FORMS[subject][0] != FORMS[attractor][0]
        assert subject.endswith(places["subject"][row])
        assert attractor.endswith(places["attractor"][row])
        assert text.endswith(places["end"][row])


def test_numbers_and_nouns_are_all_drawn():
    model = verb_number(small(corpus=SAID))
    values = draw(model, 500)
    for name in model.inputs:
        assert values[name].unique().tolist() == model.domains[name].values.tolist()
    assert 0.3 < (values["subject_number"] != values["attractor_number"]).float().mean() < 0.7


def test_a_noun_alone_is_its_own_attractor():
    values = draw(verb_number(small(corpus=SAID), nouns=[("mouse", "mice")]), 20)
    assert values["subject"].tolist() == values["attractor"].tolist() == [0] * 20


def test_forms_of_a_number_count_together():
    tokenizer = small("words", corpus=[*SAID, "is are"])
    model = verb_number(tokenizer, verbs=[("was", "were"), ("is", "are")])
    values = draw(model, 3)
    encoded = model.encode(values)
    weights = {"was": 3.0, "is": 5.0, "were": 7.0, "are": 2.0}
    weight = torch.ones(*encoded["input_ids"].shape, len(tokenizer))
    last = encoded["attention_mask"].sum(1) - 1
    for form, each in weights.items():
        weight[torch.arange(3), last, tokenizer.convert_tokens_to_ids(form)] = each
    torch.testing.assert_close(model.decode(weight.log(), values).exp(), torch.tensor([[8.0, 9.0]] * 3))


def agreement(tokenizer, network, **given):
    """How often a network agrees with the subject: where the attractor has its number, and where it has the other."""
    model = verb_number(tokenizer, **given)
    values = draw(model, 1000)
    with torch.no_grad():
        logits = network(**model.encode(values)).logits
    right = (model.decode(logits, values).argmax(1) == model.answers(values)).float()
    other = values["subject_number"] != values["attractor_number"]
    return right[~other].mean().item(), right[other].mean().item()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tiny_language_model_agrees_with_the_noun_before_the_verb(shared_data, side):
    tokenizer = real("stories260K", shared_data, side)
    network = AutoModelForCausalLM.from_pretrained(shared_data / "models" / "stories260K").eval()
    before = agreement(tokenizer, network, templates=BEFORE)
    between = agreement(tokenizer, network, templates=BETWEEN)
    print(f"accuracy (attractor of the same number, of the other): before {before}, between {between}")
    assert min(before) > 0.95
    assert between[0] > 0.75 > 0.35 > between[1]  # it goes by the nearest noun, so it must be read, not assumed


def test_with_the_tokenizer_of_gpt2(shared_data):
    gpt2 = real("gpt2", shared_data)
    model = verb_number(gpt2, templates=BETWEEN, verbs=[("was", "were"), ("is", "are"), ("has", "have")])
    values = draw(model)
    encoded = model.encode(values)
    subjects = at(gpt2, encoded, model.select("subject", values)[:, 0])
    assert [FORMS[form] for form in subjects] == list(
        zip(values["subject"].tolist(), model.answers(values).tolist(), strict=True)
    )
    logits = torch.zeros(*encoded["input_ids"].shape, len(gpt2))
    plural = gpt2(" have")["input_ids"][0]
    logits[torch.arange(len(subjects)), encoded["attention_mask"].sum(1) - 1, plural] = 1.0
    assert model.decode(logits, values).argmax(1).tolist() == [1] * len(subjects)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nouns": ["dogs"]}, r"nouns must be a sequence, each a sequence, each a text"),
        ({"verbs": []}, r"verbs must be pairs of a singular and a plural: \[\]; give verbs=\[\('was', 'were'\)\]"),
        ({"verbs": [("was", "was")]}, r"the answers 'was' and 'was' share their first token 'was' after"),
        ({"verbs": [("was", "were"), ("was", "are")]}, r"the answers 'was' and 'was' share their first token 'was'"),
        ({"templates": ["The noun near the {attractor}"]}, r"a template must name the \{subject\}: 'The noun near"),
    ],
)  # fmt: skip
def test_what_it_refuses(given, message):
    with pytest.raises(DistillError, match=message):
        verb_number(small("words", corpus=SAID), **given)
