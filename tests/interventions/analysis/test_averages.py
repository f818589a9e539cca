"""Means over data sets: against a loop by hand, whatever the batches."""

import pytest
import torch

from interventions import InterventionError, Location, intervene, mean_of, run
from tests.interventions.tiny_models import answer, batch, make

PLACES = [Location(1), Location(1, "attention_heads", heads=1), Location(0, "mlp_activation", dims=range(4))]


def padded() -> dict:
    inputs = batch("bert", size=6)
    inputs["attention_mask"][1, 3:] = 0
    inputs["attention_mask"][4, 2:] = 0
    return inputs


def test_the_mean_is_over_real_tokens_whatever_the_batches():
    model, inputs = make("bert"), padded()
    found = run(model, inputs, at=PLACES)
    for sizes in ([6], [1, 5], [2, 2, 2]):
        parts = [part.split(sizes) for part in inputs.values()]
        batches = [dict(zip(inputs, rows, strict=True)) for rows in zip(*parts, strict=True)]
        for location, mean in mean_of(model, PLACES, batches).items():
            expected = found.vectors(location)[inputs["attention_mask"].bool()].double().mean(0)
            assert torch.allclose(mean.value.double(), expected, atol=1e-6)


def test_positions_and_writing():
    model, inputs = make("bert"), padded()
    means = mean_of(model, [Location(1)], [inputs], positions=0)
    expected = run(model, inputs).vectors(Location(1))[:, 0].mean(0)
    assert torch.allclose(means[Location(1)].value, expected, atol=1e-6)
    with intervene(model, means, positions=0), torch.no_grad():
        state = run(model, inputs, at=[Location(1)]).vectors(Location(1))
    assert torch.allclose(state[:, 0], expected.expand(6, -1), atol=1e-6)


@pytest.mark.parametrize(("name", "shape"), [("cnn", (8,)), ("mlp", (8,)), ("llama", (4, 4))])
def test_shapes(name, shape):
    location = {"cnn": Location(module="conv1"), "mlp": Location(module="0"), "llama": Location(1, "query")}[name]
    model = make(name)
    means = mean_of(model, location, [batch(name, 1), batch(name, 2)])
    assert means[location].value.shape == shape
    plain = answer(model, batch(name))
    with intervene(model, means):
        assert not torch.equal(answer(model, batch(name)), plain)


def test_what_has_no_mean_raises():
    model = make("bert")
    with pytest.raises(InterventionError, match=r"no batches were given, so there is no mean"):
        mean_of(model, Location(1), [])
    with pytest.raises(InterventionError, match=r"batches is one dict, and an iterable of inputs .* write \[inputs\]"):
        mean_of(model, Location(1), padded())
    with pytest.raises(InterventionError, match=r"as wide as each batch is long, so it has no mean"):
        mean_of(model, Location(1, "attention_pattern"), [padded()])
    next(each for each in model.modules() if isinstance(each, torch.nn.Dropout)).train()  # one module of many
    with pytest.raises(InterventionError, match=r"module '.*dropout' of the model is in train mode"):
        mean_of(model, Location(1), [padded()])
    for mixed in (model, model.train()):
        with pytest.raises(InterventionError, match=r"in train mode, where dropout differs .*; call model\.eval"):
            mean_of(mixed, Location(1), [padded()])
