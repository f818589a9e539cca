"""Knockout: cut edges are 0, the rest of each row is as before up to its sum, and nothing else changes."""

import pytest
import torch

from interventions import InterventionError, Knockout, Location, kl, knockout, record, run, sweep
from tests.interventions.analysis.test_sweeps import padded
from tests.interventions.tiny_models import LAYERS, TRANSFORMERS, batch, make, trace


def pattern(layer, heads=None):
    return Location(layer, "attention_pattern", heads=heads)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_edges_are_cut_and_rows_renormalized(name):
    model, inputs = make(name), batch(name)
    places, before = [pattern(layer) for layer in range(LAYERS)], trace(model)
    base = run(model, inputs, places)
    with knockout(model, [-1, 2], [0, 1], layers=1) as handle:
        changed = run(model, inputs, places)
    assert trace(model) == before
    expected = base.activations[pattern(1)].clone()
    rows = [2, expected.shape[2] - 1]
    for row in rows:
        expected[:, :, row, :2] = 0
    expected = expected / expected.sum(-1, keepdim=True)
    assert torch.allclose(changed.activations[pattern(1)], expected, atol=1e-6)
    assert torch.equal(changed.activations[pattern(0)], base.activations[pattern(0)])
    assert not torch.allclose(changed.logits, base.logits)
    assert list(handle.firings) == [Location(1, "attention_scores")]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_positions_count_real_tokens(name, side):
    """Example by example, with padding as without it."""
    model = make(name)
    inputs = padded(batch(name), [5, 3, 4], side)
    with knockout(model, -1, [1], heads=1), record(model, [pattern(2)]) as kept:
        model(**inputs)
    for row, length in enumerate([5, 3, 4]):
        columns = range(length) if side == "right" else range(5 - length, 5)
        found = kept[pattern(2)][row][:, columns][:, :, columns]
        assert found[1, -1, 1] == 0
        assert found[0, -1, 1] > 0
        assert torch.allclose(found.sum(-1), torch.ones(2, length), atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_with_a_cache(name):
    """The newest token attends to none of the two keys, step by step."""
    model, inputs = make(name), batch(name)
    with record(model, [pattern(0)]) as kept, knockout(model, -1, [1, 2]):
        model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=True)
    calls = kept.calls(pattern(0))
    assert [each.shape[-2] for each in calls] == [5, 1, 1, 1]
    for each in calls:
        assert (each[:, :, -1, 1:3] == 0).all()
        assert (each[:, :, -1, 0] > 0).all()
    with knockout(model, slice(1, None), 0), record(model, [pattern(0)]) as kept:
        model(**inputs)
    assert (kept[pattern(0)][:, :, 1:, 0] == 0).all()


def test_windows_of_layers_by_a_sweep():
    model, inputs = make("gpt2"), batch("gpt2")
    windows = {f"{i} to {i + 1}": [Location(j, "attention_scores") for j in (i, i + 1)] for i in range(LAYERS - 1)}
    base = run(model, inputs)
    grid = sweep(model, inputs, None, windows, metric=kl(base), op=Knockout(-1, [1]), positions=None)
    with knockout(model, -1, [1], layers=[0, 1]):
        assert torch.allclose(grid.per_example[0, 0], kl(base)(run(model, inputs)), atol=1e-6)


def test_what_cannot_be_cut_is_refused():
    model, inputs = make("gpt2"), batch("gpt2")
    match = r"token 0 of example 0 attends to no key at all; leave it out"
    for queries, layers in ((0, None), (None, 1)):
        with pytest.raises(InterventionError, match=match), knockout(model, queries, 0, layers=layers):
            model(**inputs)
    with pytest.raises(InterventionError, match=r"layers=\[\] names no block"), knockout(model, 1, 0, layers=[]):
        pass
    with (
        pytest.raises(InterventionError, match=r"Location\(layer=7\) is out of range"),
        knockout(model, 1, 0, layers=7),
    ):
        pass
    with pytest.raises(InterventionError, match=r"needs blocks"), knockout(make("mlp"), 1, 0):
        pass
