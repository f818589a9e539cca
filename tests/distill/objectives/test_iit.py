"""Interchange intervention training: on networks wired by hand its loss and accuracy are known."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

import distill
from distill import IIT, CausalModel, DistillError
from distill.causal.feed import Samples
from distill.interchange.mapping import entries_of
from distill.objectives import Step
from interventions import Location, run
from tests.distill.wired import SUM, Wired

QUIET = Console(quiet=True)
RIGHT = {"inner": Location(module="hidden", dims=0)}
CONSTANT = {"inner": Location(module="hidden", dims=2)}


def step_of(network, values, pairs, generator):
    base = run(network, SUM.encode(values))
    return Step(values, network, lambda: base, None, pairs, generator, feed=Samples(SUM, 0, len(base.logits)))


def terms(network, mapping, objective, n=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = SUM.sample(n, torch.Generator().manual_seed(1))
    pairs = entries_of(mapping, SUM, network) if mapping else ()
    return objective(step_of(network, values, pairs, generator))


def test_a_network_that_computes_the_model_has_no_loss_and_accuracy_one():
    network = Wired()
    found = terms(network, RIGHT, IIT())
    assert set(found) == {"task", "iit"}
    assert max(term.item() for term in found.values()) < 1e-4
    measured = distill.interchange_accuracy(SUM, network, RIGHT, pairs=500)
    assert measured.iia == 1.0
    assert measured.overall.effective_iia == 1.0
    assert 0.3 < measured.overall.effect_rate < 0.9


def test_a_constant_place_has_the_accuracy_of_doing_nothing():
    measured = distill.interchange_accuracy(SUM, Wired(), CONSTANT, pairs=500).overall
    assert measured.iia.value == measured.do_nothing == pytest.approx(1 - measured.effect_rate)
    assert measured.effective_iia == 0.0
    assert terms(Wired(), CONSTANT, IIT())["iit"] > 1


def test_figures_do_not_depend_on_the_batch_size():
    network = Wired()
    with torch.no_grad():
        network.hidden.weight += 0.3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    figures = [distill.interchange_accuracy(SUM, network, RIGHT, pairs=100, batch_size=size) for size in (7, 100)]
    small, large = (replace(each.overall, kl=None) for each in figures)
    assert small == large
    assert figures[0].overall.kl == pytest.approx(figures[1].overall.kl, rel=1e-6)
    assert 0 < figures[0].iia < 1


def test_strict_places_must_not_matter():
    assert terms(Wired(), RIGHT, IIT(strict=[Location(module="hidden", dims=2)]))["siit"] < 1e-4
    assert terms(Wired(), RIGHT, IIT(strict=["module:hidden[dims=0]"]))["siit"] > 1


def test_gradients_reach_the_source_unless_it_is_detached():
    network, values = Wired(), SUM.sample(50, torch.Generator().manual_seed(1))
    grads = []
    for detach in (False, True):
        network.zero_grad()
        terms(network, {"inner": Location(module="hidden", dims=range(2))}, IIT(detach_source=detach))["iit"].backward()
        grads.append(network.hidden.weight.grad.clone() if network.hidden.weight.grad is not None else None)
    assert grads[0].abs().sum() > 0
    assert grads[1] is None or grads[1].abs().sum() == 0
    assert len(values) == 3


def test_an_empty_mapping_trains_on_answers_alone():
    assert set(terms(Wired(), {}, IIT())) == {"task"}


@pytest.mark.parametrize("seed", [0, 1])
def test_fit_of_three_arguments_is_decided_by_the_seed(seed):
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
        result = distill.fit(
            SUM,
            network,
            {"inner": Location(module="0", dims=range(4))},
            steps=5,
            batch_size=16,
            seed=seed,
            console=QUIET,
        )
        weights.append(network[0].weight.detach().clone())
    assert torch.equal(*weights)
    assert set(result.records[0].terms) == {"task", "iit"}
    assert result.evaluation.accuracy is not None
    assert result.iia is not None


@pytest.mark.parametrize(
    ("mapping", "match"),
    [
        ({"iner": Location(module="hidden", dims=0)}, r"names 'iner', which is no variable .* it has a, b, c, inner"),
        ({"inner": Location(module="hidden", dims=0), "c": Location(module="hidden", dims=[0, 1])}, r"to c and inner"),
        ({"inner": Location(module="hidden")}, r"inner is aligned with all of module:hidden, .* give it a part"),
    ],
)
def test_mappings_that_make_no_sense_raise(mapping, match):
    with pytest.raises(DistillError, match=match):
        distill.interchange_accuracy(SUM, Wired(), mapping, pairs=10)


def test_what_does_not_fit_is_said_before_training():
    network = nn.Linear(3, 4)
    with pytest.raises(
        DistillError, match=r"the causal model has 3 answers and the network 4 logits \(.*\); give its last"
    ):
        distill.fit(SUM, network, {}, steps=1, console=QUIET)
    with pytest.raises(
        DistillError, match=r"data is an object of type str and the teacher is a causal model; give a di"
    ):
        distill.fit(SUM, nn.Linear(3, 3), {}, data="pvr", steps=1, console=QUIET)
    with pytest.raises(DistillError, match=r"the teacher is a causal model; use objective=IIT\(\)"):
        distill.fit(SUM, nn.Linear(3, 3), {}, objective=distill.KD(), steps=1, console=QUIET)
    never = CausalModel(
        {"a": range(2)},
        {"x": lambda a: a * 0, "y": lambda x: x > 5},
        "y",
        encode=lambda values: values["a"][:, None].float(),
    )
    network = nn.Sequential(nn.Linear(1, 2))
    with pytest.raises(DistillError, match=r"none of 10 interchanges of x changes the answer"):
        distill.interchange_accuracy(never, network, {"x": Location(module="0", dims=0)}, pairs=10)
