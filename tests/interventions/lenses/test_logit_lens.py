"""Lenses: the last layer is the model, each other one is norm and head by hand, and a tuned lens is never worse."""

import pytest
import torch
from transformers import SwinConfig, SwinForImageClassification

from interventions import InterventionError, Location, TunedLens, fit_lens, intervene, logit_lens, run
from interventions.lenses.logit_lens import logits_at
from interventions.lenses.tuned_lens import states_of
from tests.interventions.analysis.test_sweeps import padded
from tests.interventions.tiny_models import LAYERS, TRANSFORMERS, answer, batch, make, trace

HEADS = {
    "gpt2": lambda model, state: model.lm_head(model.transformer.ln_f(state)),
    "llama": lambda model, state: model.lm_head(model.model.norm(state)),
    "vit": lambda model, state: model.classifier(model.vit.layernorm(state)[:, 0]),
    "bert": lambda model, state: model.classifier(model.bert.pooler(state)),
    "distilbert": lambda model, state: model.classifier(model.pre_classifier(state[:, 0]).relu()),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_last_layer_is_the_model(name):
    """In the lens, and also where the state goes through it as those of the other layers do."""
    model, inputs = make(name), batch(name)
    before = trace(model)
    found = logit_lens(model, inputs)
    with torch.no_grad():
        assert torch.equal(found.logits[-1], answer(model, inputs))
        done = run(model, inputs)
        layers = states_of(model, None)
        assert torch.equal(logits_at(done, layers, LAYERS, None), done.logits)
    assert found.logits.shape == (LAYERS + 1, *done.logits.shape)
    assert found.kl[-1].abs().max() == 0
    assert found.kl[0].min() > 0
    assert trace(model) == before


@pytest.mark.parametrize("name", HEADS)
def test_each_layer_is_norm_and_head_by_hand(name):
    model, inputs = make(name), batch(name)
    found = logit_lens(model, inputs)
    with torch.no_grad():
        states = [run(model, inputs).activations[layer] for layer in found.layers]
        for row, state in zip(found.logits, states, strict=True):
            assert torch.allclose(row, HEADS[name](model, state), atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit"])
def test_a_tuned_lens_is_never_worse_on_its_data(name):
    """Layer by layer, over the real tokens of all batches; the model keeps its weights and gets no gradients."""
    model = make(name)
    data = [
        padded(batch(name, seed=i), [5, 3, 2], "right") if name == "gpt2" else batch(name, seed=i) for i in range(2)
    ]
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def mean_kl(lens):
        found = [logit_lens(model, each, lens=lens) for each in data]
        return torch.stack([torch.cat([each.kl[layer][each.real] for each in found]).mean() for layer in range(LAYERS)])

    lens = fit_lens(model, data, steps=20, lr=1e-2)
    logit, tuned = mean_kl(None), mean_kl(lens)
    assert (tuned <= logit + 1e-6).all()
    assert (tuned < 0.9 * logit).any()
    spoiled = fit_lens(model, data, steps=1, lr=100.0)  # too large a step: no layer may be worse for it
    assert (mean_kl(spoiled) <= logit + 1e-6).all()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in [*model.parameters(), *lens.parameters()])


def test_training_is_a_function_of_the_seed():
    model, data = make("gpt2"), [batch("gpt2", seed=i) for i in range(3)]
    torch.manual_seed(0)
    first = fit_lens(model, data, steps=3, seed=1)
    torch.manual_seed(5)
    for seed, same in ((1, True), (2, False)):
        other = fit_lens(model, data, steps=3, seed=seed)
        equal = [torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)]
        assert all(equal) == same


def test_a_lens_is_saved_and_loaded(tmp_path):
    model, inputs = make("gpt2"), batch("gpt2")
    lens = fit_lens(model, [inputs], steps=2)
    again = TunedLens.load(lens.save(tmp_path / "folder" / "lens.safetensors"))
    assert torch.equal(logit_lens(model, inputs, lens=again).logits, logit_lens(model, inputs, lens=lens).logits)
    with pytest.raises(InterventionError, match=r"exists already; choose another file"):
        lens.save(tmp_path / "folder" / "lens.safetensors")
    with pytest.raises(InterventionError, match=r"holds no tuned lens .*fit_lens"):
        TunedLens.load(tmp_path / "nothing")
    with pytest.raises(InterventionError, match=r"the lens is of 4 layers, .* and this model has 4, .* fit one to it"):
        logit_lens(make("t5"), batch("t5"), lens=fit_lens(make("t5"), [batch("t5")], steps=1, stack="encoder"))


def test_what_is_seen_of_it():
    class Tokenizer:
        def decode(self, ids):
            return f"▁{ids[0]}"

    model, inputs = make("gpt2"), padded(batch("gpt2"), [5, 3, 2], "left")
    found = logit_lens(model, inputs, tokenizer=Tokenizer())
    assert found.real.tolist() == inputs["attention_mask"].bool().tolist()
    axes = found.plot(example=2).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == [str(at) for at in found.layers[::-1]]
    ids = inputs["input_ids"][2][-2:].tolist()
    assert [text.get_text() for text in axes.get_xticklabels()] == [f"{n} {token}" for n, token in enumerate(ids)]
    assert [text.get_text().strip() for text in axes.texts[:2]] == [str(n) for n in found.top[-1, 2, -2:].tolist()]
    table = found.to_pandas()
    assert table.loc["block_output.2", "KL [nats]"] == 0
    assert table.loc["block_output.2", "agreement"] == 1
    with pytest.raises(InterventionError, match=r"example=3 does not exist: there are 3"):
        found.plot(3)


def test_it_sees_interventions():
    """A lens inside a block of interventions is that of the changed model."""
    model, inputs = make("gpt2"), batch("gpt2")
    with intervene(model, Location(1), op=lambda base, _source, _generator: base * 0):
        changed = logit_lens(model, inputs)
        with torch.no_grad():
            assert torch.allclose(changed.logits[-1], answer(model, inputs), atol=1e-6)
    assert not torch.allclose(changed.logits[2], logit_lens(model, inputs).logits[2])


def test_what_has_no_lens_is_refused():
    with pytest.raises(InterventionError, match=r"needs blocks and this Sequential has none"):
        logit_lens(make("mlp"), batch("mlp"))
    with pytest.raises(InterventionError, match=r"tokenizer=3 has no decode\(ids\)"):
        logit_lens(make("gpt2"), batch("gpt2"), tokenizer=3)
    with pytest.raises(InterventionError, match=r"steps=0, lr=0.001 train nothing"):
        fit_lens(make("gpt2"), [batch("gpt2")], steps=0)

    swin = SwinForImageClassification(
        SwinConfig(
            image_size=16, patch_size=2, num_channels=1, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=2
        )
    ).eval()
    for verb in (lambda x: fit_lens(swin, [x]), lambda x: logit_lens(swin, x)):
        with pytest.raises(InterventionError, match=r"states of 2 shapes, .* whose blocks have one width"):
            verb({"pixel_values": torch.ones(2, 1, 16, 16)})
