"""Directions: means by hand, steering and ablation by hand, coordinates after a clamp."""

import pytest
import torch

from interventions import (
    InterventionError,
    Location,
    ablate_direction,
    direction,
    everywhere,
    intervene,
    load,
    run,
    save,
)
from tests.interventions.analysis.test_sweeps import padded
from tests.interventions.tiny_models import LAYERS, TRANSFORMERS, batch, make, middle, trace

AT = Location(1)


def sets(name):
    return [batch(name), batch(name, seed=7)], [batch(name, seed=2)]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_it_is_the_difference_of_means(name):
    model, (positive, negative) = make(name), sets(name)
    found = direction(model, positive, negative, AT)
    high, low = (torch.cat([run(model, x).vectors(AT)[:, -1] for x in each]) for each in (positive, negative))
    assert torch.allclose(found.vector, high.mean(0) - low.mean(0), atol=1e-6)
    assert torch.allclose(found.positive, high @ found.unit, atol=1e-5)
    assert 0.5 <= found.separation <= 1
    component = direction(model, positive, negative, AT, method="pca")
    every = torch.cat([high, low]) - torch.cat([high, low]).mean(0)
    variance = (every @ component.unit).var()
    others = torch.nn.functional.normalize(torch.randn(50, len(found.vector)), dim=-1)
    assert (every @ others.T).var(0).max() <= variance + 1e-5  # no direction has more
    assert component.positive.mean() > component.negative.mean()


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_steering_ablating_and_clamping_by_hand(name):
    model, (positive, negative), inputs = make(name), sets(name), batch(name, seed=4)
    found = direction(model, positive, negative, AT)
    state = run(model, inputs).activations[AT]
    along = (state @ found.unit)[..., None] * found.unit
    expected = {"add": state - 2 * found.vector, "ablate": state - along, "clamp": state - along - 0.75 * found.unit}
    for verb, arguments in (("add", (-2.0,)), ("ablate", ()), ("clamp", (-0.75,))):
        before = trace(model)
        with intervene(model, getattr(found, verb)(*arguments)):
            after = run(model, inputs, AT).activations[AT]
        assert torch.allclose(after, expected[verb], atol=1e-5), verb
        assert trace(model) == before


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_an_ablated_direction_is_nowhere_in_the_stream(name):
    """After every block, as no part writes along it."""
    model, (positive, negative) = make(name), sets(name)
    found = direction(model, positive, negative, AT)
    places = [Location(layer) for layer in range(LAYERS)]
    with ablate_direction(model, found) as handle:
        kept = run(model, batch(name, seed=4), places).activations
    for place in places:
        assert (kept[place] @ found.unit).abs().max() < 1e-5 * kept[place].abs().max()
    assert len(handle.firings) == 2 * LAYERS + 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side):
    model = make("gpt2")
    inputs = padded(batch("gpt2"), [5, 3, 2], side)
    found = direction(model, [inputs], [batch("gpt2", seed=2)], AT, positions=None)
    assert len(found.positive) == 10
    last = direction(model, [inputs], [batch("gpt2", seed=2)], AT)
    place = 4 if side == "left" else 1
    state = run(model, inputs).activations[AT][2, place]
    assert torch.allclose(last.positive[2], state @ last.unit, atol=1e-5)


def test_models_without_positions_and_heads():
    model = make("mlp")
    at = middle("mlp")
    assert direction(model, [batch("mlp")], [batch("mlp", seed=2)], at).vector.shape == (8,)
    head = Location(1, "attention_heads", heads=1)
    found = direction(make("gpt2"), *sets("gpt2"), head)
    assert found.vector.shape == (8,)
    gpt2, inputs = make("gpt2"), batch("gpt2", seed=4)
    with intervene(gpt2, found.ablate()):
        after = run(gpt2, inputs, head).activations[head]
    assert (after @ found.unit).abs().max() < 1e-5 < (run(gpt2, inputs).activations[head] @ found.unit).abs().max()
    with pytest.raises(InterventionError, match=r"attention_heads.1 has 2 heads, .* name one"):
        direction(make("gpt2"), *sets("gpt2"), head.whole)


def test_interventions_are_saved(tmp_path):
    model, inputs = make("gpt2"), batch("gpt2")
    clamped = direction(model, *sets("gpt2"), AT).clamp(1.0)
    again = load(save(tmp_path / "clamp", clamped, model=model), model).at
    with intervene(model, clamped):
        expected = run(model, inputs).logits
    with intervene(model, again):
        assert torch.allclose(run(model, inputs).logits, expected)


def test_what_has_no_direction_is_refused():
    model, (positive, negative) = make("gpt2"), sets("gpt2")
    with pytest.raises(InterventionError, match=r"the same mean at block_output.1, so there is no direction"):
        direction(model, positive, positive, AT)
    with pytest.raises(InterventionError, match=r"positive is one dict, .*write \[inputs\]"):
        direction(model, positive[0], negative, AT)
    with pytest.raises(InterventionError, match=r"negative holds no vectors"):
        direction(model, positive, [], AT)
    with pytest.raises(InterventionError, match=r"has no direction; use attention_heads"):
        direction(model, positive, negative, Location(1, "attention_pattern"))
    with pytest.raises(InterventionError, match=r"along='a' is no direction; pass direction\("):
        everywhere(model, "a")
