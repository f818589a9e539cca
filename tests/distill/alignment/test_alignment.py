"""Alignments are mappings that can be saved: what is loaded measures the same to the bit."""

import json

import pytest
import torch
from rich.console import Console
from torch import nn

import distill
from distill import Alignment, DistillError
from distill.interchange.mapping import entries_of
from interventions import PCA, BoundlessRotation, InterventionError, Location, Mask, Rotation
from tests.distill.wired import SUM, TOKENS, Reader, Wired, turned

QUIET = Console(quiet=True)
SHORT = dict(steps=20, batch_size=32, console=QUIET, pairs=200)


@pytest.mark.parametrize(
    "subspace", [lambda: Rotation(1), lambda: BoundlessRotation(), Mask, lambda: PCA(1), lambda: Mask(within=PCA(2))]
)
def test_saved_is_loaded_to_the_bit(subspace, tmp_path):
    network = turned()
    found = distill.align(SUM, network, {"inner": Location(module="hidden", subspace=subspace())}, **SHORT)
    found.save(tmp_path / "alignment", network)
    loaded = Alignment.load(tmp_path / "alignment", turned())
    assert loaded.accuracy == found.accuracy
    assert loaded.records == found.records
    assert list(loaded) == ["inner"]
    first, second = (distill.interchange_accuracy(SUM, network, each, pairs=300) for each in (found, loaded))
    assert first == second
    states = [each["inner"][0].subspace.state_dict() for each in (found, loaded)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_positions_go_into_the_file(tmp_path):
    network, places = Reader(), (Location(module="hidden", dims=range(2)), Location(module="hidden", dims=range(2, 5)))
    for number, positions in enumerate(["first", 0, [0], slice(0, 1), torch.tensor([0])]):
        alignment = Alignment(entries_of({"first": places}, TOKENS, network, positions))
        alignment.save(tmp_path / str(number), network)
        loaded = Alignment.load(tmp_path / str(number), network)
        assert loaded["first"] == places
        assert distill.interchange_accuracy(TOKENS, network, loaded, pairs=100).iia == 1.0
    function = Alignment(entries_of({"first": places}, TOKENS, network, lambda values: values["a"] * 0))
    assert distill.interchange_accuracy(TOKENS, network, function, pairs=100).iia == 1.0
    with pytest.raises(DistillError, match=r"are a function, and files hold no code; give them a name"):
        function.save(tmp_path / "function", network)


def test_what_cannot_be_loaded_says_why(tmp_path):
    with pytest.raises(DistillError, match=r"holds no alignment: there is no alignment.json; write one with"):
        Alignment.load(tmp_path, Wired())
    network = Wired()
    alignment = Alignment(entries_of({"inner": Location(module="hidden", dims=0)}, SUM, network))
    alignment.save(tmp_path / "a", network)
    with pytest.raises(DistillError, match=r"holds an alignment; choose another folder, or write overwrite=True"):
        alignment.save(tmp_path / "a", network)
    alignment.save(tmp_path / "a", network, overwrite=True)
    with pytest.raises(InterventionError, match=r"does not fit this model: .* type is 'Wired', and that of this one i"):
        Alignment.load(tmp_path / "a", Reader())
    told = json.loads((tmp_path / "a" / "alignment.json").read_text())
    (tmp_path / "a" / "alignment.json").write_text(json.dumps(told | {"format": 99}))
    with pytest.raises(DistillError, match=r"of format 99 and this version reads up to 1; upgrade"):
        Alignment.load(tmp_path / "a", network)


def test_it_prints_and_draws():
    network = Wired()
    first = Location(module="hidden", dims=range(2), subspace=Rotation(1))
    mapping = {"inner": first, ("a", "b"): Location(module="hidden", dims=2)}
    found = distill.align(SUM, network, mapping, controls="all", **SHORT)
    assert set(found) == {"inner", ("a", "b")}
    assert found["a", "b"] == (Location(module="hidden", dims=2),)
    assert found.iia == found.accuracy.iia
    assert "control: network" in str(found)
    assert "inner ↔ module:hidden[dims=0:2](Rotation); a + b ↔ module:hidden[dims=2]" in repr(found)
    labels = [text.get_text() for text in found.plot().axes[0].get_yticklabels()]
    assert labels[-3:] == ["control: subspace", "control: labels", "control: network"]
    unmeasured = distill.align(SUM, network, mapping, **SHORT | {"pairs": 0})
    assert unmeasured.iia is None
    with pytest.raises(DistillError, match=r"was not measured; write interchange_accuracy\(causal_model, network, al"):
        unmeasured.plot()


def test_a_new_network_is_another_one():
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)).train()
    network.register_parameter("own", nn.Parameter(torch.arange(6.0)))
    before, random = {k: v.clone() for k, v in network.state_dict().items()}, torch.random.get_rng_state()
    first, again, other = (distill.reinitialized(network, seed) for seed in (0, 0, 1))
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    for name in ("0.weight", "2.bias", "own"):
        assert torch.equal(first.state_dict()[name], again.state_dict()[name])
        assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
        assert not torch.equal(first.state_dict()[name], before[name])
    assert torch.equal(first.state_dict()["1.weight"], torch.ones(4))  # as a new layer norm has
    assert first.training


def test_one_place_with_several_tokens_is_measured_and_loaded_again(tmp_path):
    network, place = Reader(), Location(module="hidden")
    mapping = {"first": place, "last": place}
    found = Alignment(entries_of(mapping, TOKENS, network, {"first": "first", "last": "last"}))
    assert distill.interchange_accuracy(TOKENS, network, found, pairs=99).iia == 1.0
    found.save(tmp_path / "a", network)
    loaded = Alignment.load(tmp_path / "a", network)
    assert loaded.pairs == found.pairs
    assert distill.interchange_accuracy(TOKENS, network, loaded, pairs=99).iia == 1.0
    best = distill.search_alignment(TOKENS, network, at=["module:hidden"], pairs=99).best
    assert distill.interchange_accuracy(TOKENS, network, best, pairs=99).iia == best.iia == 1.0


def test_entries_that_read_alike_are_counted_apart():
    first, second = (Location(module="hidden", subspace=Rotation(1, 3, seed=seed)) for seed in range(2))
    measured = distill.interchange_accuracy(SUM, Wired(), {"inner": first, ("inner",): second}, pairs=99)
    assert list(measured.per_pair) == [f"inner ↔ module:hidden(Rotation) ({i})" for i in (1, 2)]
