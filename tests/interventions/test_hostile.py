"""What a hostile tester found: answers that were wrong without a word."""

import pytest
import torch

from interventions import (
    Add,
    BoundlessRotation,
    InterventionError,
    Location,
    Mask,
    Noise,
    Zero,
    interchange,
    intervene,
    load,
    mean_of,
    run,
    save,
)
from tests.interventions.tiny_models import VOCABULARY, batch, make

SIZES = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)


def neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPTNeoXConfig(**SIZES, intermediate_size=32, max_position_embeddings=32, eos_token_id=None)
        return GPTNeoXForCausalLM(config).eval()


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = OPTConfig(**SIZES, ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=16)
        return OPTForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("site", ["key", "value"])
def test_a_cache_under_another_name_keeps_what_is_written(site):
    model, ids = neox(), torch.randint(1, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
    settings = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    answers = []
    for cached in (True, False):
        with intervene(model, Location(1, site), op=Add(torch.tensor(2.0)), steps=0, positions=[0, 2]):
            answers.append(torch.stack(model.generate(ids, use_cache=cached, **settings).logits))
    assert torch.allclose(*answers, atol=1e-4)
    assert not torch.allclose(answers[0], torch.stack(model.generate(ids, **settings).logits), atol=1e-3)


@torch.no_grad()
def test_a_run_fetches_what_it_computed_whatever_is_open_now():
    model, inputs, place = make("llama"), batch("llama"), Location(2, "query")
    clean, other = run(model, inputs), run(model, inputs)
    expected = clean.activations[place]
    with intervene(model, Location(0), op=Zero()) as handle:
        inside = run(model, inputs)
        assert torch.equal(other.activations[place], expected)
        assert not torch.equal(inside.activations[place], expected)
        late = run(model, inputs)
    assert handle.firings == {Location(0): 3}
    with pytest.raises(InterventionError, match=r"was not recorded, and the run was made inside a block .* is closed"):
        late.activations[place]
    assert torch.equal(late.activations[Location(2)], inside.activations[Location(2)])
    for resume in (True, False):
        with pytest.raises(InterventionError, match=r"the base is a run made inside a block of .* is closed"):
            interchange(model, late, inputs, Location(2), positions=0, resume=resume)


@torch.no_grad()
def test_examples_and_tokens_on_one_axis_are_told_apart():
    model, ids = opt(), torch.randint(1, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    for site, width in (("mlp_input", 16), ("mlp_activation", 32), ("mlp_output", 16)):
        place = Location(1, site)
        state = run(model, inputs, at=place).activations[place]
        assert state.shape == (2, 6, width)
        found = mean_of(model, place, [inputs])[place].value
        assert torch.allclose(found, state[mask.bool()].mean(0), atol=1e-6)
        with pytest.raises(InterventionError, match=r"has shape \[2, 6, \d+\] in the base run and \[3, 4, \d+\]"):
            interchange(model, inputs, {"input_ids": torch.ones(3, 4, dtype=torch.long)}, place)
        with intervene(model, place, op=Zero(), positions=-1):
            written = run(model, inputs, at=place).activations[place]
        assert not written[:, -1].any()
        assert torch.equal(written[:, :-1], state[:, :-1])


@torch.no_grad()
@pytest.mark.parametrize(
    "op",
    [Zero(), Noise(0.5), Add(torch.ones(1), renormalize=True), lambda b, s, g: b * 1.7],
    ids=["0", "noise", "add", "×"],
)
def test_what_a_mask_hides_stays_hidden(op):
    model, inputs = make("llama"), batch("llama")
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -1] = 1 + inputs["input_ids"][:, -1] % (VOCABULARY - 1)
    answers = []
    for each in (inputs, other):
        with intervene(model, Location(1, "attention_scores"), op=op, generator=torch.Generator().manual_seed(0)):
            answers.append(model(**each).logits)
    assert not answers[0].isnan().any()
    assert torch.equal(answers[0][:, :-1], answers[1][:, :-1])
    assert not torch.equal(answers[0], model(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("make_subspace", [BoundlessRotation, Mask])
@pytest.mark.parametrize("training", [True, False])
def test_a_saved_subspace_keeps_its_mode(make_subspace, training, tmp_path):
    model, base, source = make("llama"), batch("llama", 1), batch("llama", 2)
    place = Location(1, subspace=make_subspace(16).train(training))
    save(tmp_path / "saved", place, model=model)
    (loaded,) = load(tmp_path / "saved", model).at
    assert torch.equal(*(interchange(model, base, source, each).logits for each in (place, loaded)))


def test_damaged_files_text_and_odd_operators_are_refused(tmp_path):
    model = make("bert")
    folder = save(tmp_path / "saved", {Location(1): Zero()}, model=model)
    next(folder.glob("*.json")).write_text("{")
    with pytest.raises(InterventionError, match=r"is damaged .*; save the interventions again"):
        load(folder, model)
    for inputs in ("hello", ["hello"], None):
        with pytest.raises(InterventionError, match=r"holds no tensors; tokenise text: tokenizer\(text"):
            run(model, inputs)
    with (
        pytest.raises(InterventionError, match=r"the operator at block_output\.1 takes \(b, s\) and is called"),
        intervene(model, Location(1), op=lambda b, s: b),
    ):
        pass
