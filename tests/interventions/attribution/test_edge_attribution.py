"""Edges: the path patch of a linear network, and finite differences of path patches in every other."""

import pytest
import torch
from torch import nn

from interventions import (
    Interpolate,
    InterventionError,
    Location,
    Stored,
    Swap,
    architecture,
    edge_attribution,
    interchange,
    logit_difference,
    metrics,
    path_patch,
    run,
)  # fmt: skip
from interventions.analysis.paths import places_between
from tests.interventions.tiny_models import LAYERS, WIDTH, batch, make, trace

METRIC = logit_difference(0, 1)


def double(name):
    """A model with base and source in double precision."""
    model, pair = make(name).double(), [batch(name), batch(name, seed=2)]
    if name == "vit":
        pair = [{key: value.double() for key, value in each.items()} for each in pair]
    return model, *pair


def slope(model, base, source, sender, receiver, step=1e-3):
    """The central difference of the metric along one path, by the share of the sender that is patched."""
    before, origin = run(model, base), run(model, source, [sender.whole])
    frozen = places_between(architecture(model), sender, receiver)
    found = []
    for share in (step, -step):
        ops = {sender: Interpolate(share), **dict.fromkeys(frozen, Swap())}
        sources = {sender: origin, **dict.fromkeys(frozen, before)}
        read = interchange(model, before, sources, ops, record=[receiver.whole]).activations[receiver.whole]
        found.append(METRIC(interchange(model, before, Stored({receiver.whole: read}), receiver).output))
    return ((found[0] - found[1]) / (2 * step)).detach()


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "vit", "llama"])
@torch.no_grad()
def test_a_score_is_the_derivative_of_the_path_patch(name):
    model, base, source = double(name)
    before = trace(model)
    edges = edge_attribution(model, base, source, METRIC)
    assert trace(model) == before
    real = (~edges.scores.isnan()).nonzero().tolist()
    draw = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:10].tolist()
    largest = edges.scores.nan_to_num().abs().max()
    for row, column in [real[number] for number in draw]:
        sender, receiver = list(edges.senders.values())[row], list(edges.receivers.values())[column]
        expected = slope(model, base, source, sender, receiver)
        assert torch.allclose(edges.per_example[row, column], expected, atol=1e-3 * float(largest)), (sender, receiver)
    assert largest > 1e-3


def linear():
    """A GPT-2 without norms and activations, whose heads attend evenly: all of it is linear."""
    model = make("gpt2").double()
    for block in model.transformer.h:
        block.ln_1, block.ln_2, block.mlp.act = nn.Identity(), nn.Identity(), nn.Identity()
        block.attn.c_attn.weight.data[:, : 2 * WIDTH] = 0
        block.attn.c_attn.bias.data[: 2 * WIDTH] = 0
    model.transformer.ln_f = nn.Identity()
    return model.eval()


@pytest.mark.parametrize("steps", [None, 3])
def test_of_a_linear_network_it_is_the_path_patch(steps):
    """For every edge."""
    model, base, source = linear(), batch("gpt2"), batch("gpt2", seed=2)
    edges = edge_attribution(model, base, source, METRIC, steps=steps)
    before, after = run(model, base), run(model, source)
    for row, sender in enumerate(edges.senders.values()):
        for column, receiver in enumerate(edges.receivers.values()):
            if not edges.scores[row, column].isnan():
                with torch.no_grad():
                    patched = METRIC(path_patch(model, before, after, sender, receiver).output)
                assert torch.allclose(edges.per_example[row, column], patched - edges.baseline, atol=1e-9)


def test_edges_and_how_they_are_shown():
    model = make("llama")
    edges = edge_attribution(model, batch("llama"), batch("llama", seed=2), METRIC)
    assert list(edges.senders)[:6] == ["embedding", "head 0.0", "head 0.1", "head 0.2", "head 0.3", "mlp 0"]
    assert list(edges.receivers)[:5] == [f"head 0.{n} query" for n in range(4)] + ["head 0.0 key"]
    assert len(edges.receivers) == LAYERS * (4 + 2 + 2 + 1) + 1
    scores = {(one, other): score for one, other, score in edges.ordered()}
    assert ("mlp 0", "mlp 0") not in scores
    assert ("head 0.0", "mlp 0") in scores
    assert ("mlp 1", "head 1.0 query") not in scores
    assert [edge[2] for edge in edges.largest(3)] == edges.to_pandas()["score"][:3].tolist()
    assert edges.plot().axes[0].get_xlabel() == "receiver"
    assert "→" in repr(edges)


def test_frozen_weights_are_enough():
    model, base, source = make("gpt2"), batch("gpt2"), batch("gpt2", seed=2)
    expected = edge_attribution(model, base, source, METRIC).scores
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        assert torch.allclose(edge_attribution(model, base, source, METRIC).scores, expected, equal_nan=True)


def test_what_has_no_edges_is_refused():
    with pytest.raises(InterventionError, match=r"has a second attention \(cross-attention\)"):
        edge_attribution(make("t5"), batch("t5"), batch("t5", seed=2), METRIC)
    with pytest.raises(InterventionError, match=r"needs blocks"):
        edge_attribution(make("mlp"), batch("mlp"), batch("mlp", seed=2), METRIC)
    model, base = make("gpt2"), batch("gpt2")
    with pytest.raises(InterventionError, match=r"embedding has shape \[3, 5, 16\] in the base run and \[3, 4, 16\]"):
        edge_attribution(model, base, batch("gpt2", seed=2, length=4), METRIC)
    with pytest.raises(InterventionError, match=r"has no derivative"):
        edge_attribution(model, base, batch("gpt2", seed=2), metrics.accuracy(0))
    with pytest.raises(InterventionError, match=r"one number for 3 examples"):
        edge_attribution(model, base, batch("gpt2", seed=2), lambda output: METRIC(output).mean())
    with pytest.raises(InterventionError, match=r"source=None gives no difference"):
        edge_attribution(model, base, None, METRIC)
    whole = Location(site="logits")
    assert list(edge_attribution(model, base, batch("gpt2", seed=2), METRIC).receivers.values())[-1] == whole
