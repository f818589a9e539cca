"""Circuits: all edges are the base, none the source, all but one a path patch, and what is kept is measured."""

import pytest
import torch

from interventions import InterventionError, circuit, edge_attribution, logit_difference, path_patch, run
from interventions.attribution.circuits import _CircuitRun, connected
from tests.interventions.tiny_models import batch, make, trace

METRIC = logit_difference(0, 1)


def case(name):
    """A model with base and source, its edges, and the function that runs a set of them."""
    model, base, source = make(name), batch(name), batch(name, seed=2)
    edges = edge_attribution(model, base, source, METRIC)
    places = [at.whole for at in [*edges.senders.values(), *edges.receivers.values()] if at.site != "logits"]
    before, after = run(model, base, places), run(model, source, places)
    return (
        model,
        before,
        after,
        edges,
        _CircuitRun(model, before, {at: after.activations[at] for at in places}, edges, METRIC),
    )


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "llama"])
@torch.no_grad()
def test_all_edges_are_the_base_and_none_the_source(name):
    model, before, after, edges, measured = case(name)
    hooks = trace(model)
    assert measured(edges.ordered()) == pytest.approx(float(METRIC(before).mean()), abs=1e-6)
    assert measured([]) == pytest.approx(float(METRIC(after).mean()), abs=1e-6)
    assert trace(model) == hooks


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_without_one_edge_it_is_the_path_patch(name):
    """All edges but one: the sender's value of the source along the direct path alone."""
    model, before, after, edges, measured = case(name)
    every = edges.ordered()
    draw = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:6].tolist()
    for sender, receiver, _ in [every[number] for number in draw]:
        rest = [edge for edge in every if edge[:2] != (sender, receiver)]
        patched = path_patch(model, before, after, edges.senders[sender], edges.receivers[receiver])
        assert measured(rest) == pytest.approx(float(METRIC(patched).mean()), abs=1e-5), (sender, receiver)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_edges_that_carry_nothing_change_nothing(name):
    *_, edges, measured = case(name)
    for count in (8, 30):
        kept = edges.ordered()[:count]
        found = connected([edge[:2] for edge in kept], edges)
        assert len(found) < count
        assert measured(kept) == pytest.approx(measured([edge for edge in kept if edge[:2] in found]), abs=1e-6)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_what_is_kept_was_measured(share):
    model, before, after, edges, measured = case("vit")
    found = circuit(model, before, after, METRIC, edges, faithfulness=share)
    with torch.no_grad():
        again = (measured(found.edges) - found.source) / (found.base - found.source)
    assert found.faithfulness == pytest.approx(again, abs=1e-5)
    assert share - 1e-5 <= found.faithfulness
    assert len(found.edges) < found.total
    assert found.measured[0] == (0, 0.0)
    assert found.measured[-1] == (found.total, 1.0)
    drawn = [text.get_text() for text in found.plot().axes[0].texts if text.get_text()]
    assert {"embedding", "logits"} <= set(drawn)


def test_what_is_no_circuit_is_refused():
    model, before, after, edges, _ = case("gpt2")
    with pytest.raises(InterventionError, match=r"faithfulness=0 is no share to keep; write faithfulness=0.8"):
        circuit(model, before, after, METRIC, edges, faithfulness=0)
    with pytest.raises(InterventionError, match=r"so there is nothing to keep; choose another pair"):
        circuit(model, before, before, METRIC, edges)
