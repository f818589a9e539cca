"""Steps of IIT and DAS: what blocks they run, and what they compute by full runs with plain hooks."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from distill import DAS, IIT, CausalModel
from distill.causal import mechanisms
from distill.causal.feed import Samples
from distill.interchange.mapping import entries_of
from distill.training.computation import Computation
from interventions import Location, Rotation
from tests.distill.objectives.test_diito_costs import Counted, differ, gradients
from tests.distill.tiny_models import bert_with, gpt2, spread

SUM = CausalModel(
    inputs={name: range(5) for name in "abc"},
    mechanisms={"ab": lambda a, b: a + b, "answer": lambda ab, c: (ab + c) % 3},
    output="answer",
    domains={"ab": range(9), "answer": range(3)},
    encode=lambda values: {"input_ids": torch.stack([values[name] + 5 for name in "abc"], 1)},
)
PLACES = {"ab": Location(1, dims=range(8)), "c": Location(2, dims=range(8, 12))}
FAMILIES = {"bert": partial(bert_with, "SequenceClassification", num_labels=3), "gpt2": gpt2}
STACKS = {"bert": "bert.encoder.layer", "gpt2": "transformer.h"}


def network_of(name: str, layers: int = 5) -> nn.Module:
    network = spread(FAMILIES[name](layers), 1, 0.4)
    network.config.pad_token_id = 0
    return network


def step_of(network, mapping, objective, *, trained=None, rows=6, seed=0):
    """A step of one objective on some samples, and the values of the bases."""
    entries = entries_of(mapping, SUM, network)
    values = SUM.sample(rows, torch.Generator().manual_seed(1))
    computation = Computation(None, network, entries, [objective], feed=Samples(SUM, 0, rows), trained=trained)
    return computation(values, torch.Generator().manual_seed(seed)), values


def draws_of(seed: int, rows: int, choices: tuple[int, ...]):
    """The sources that a step draws, and a number below each of `choices`."""
    step = torch.Generator().manual_seed(seed)
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=step)))
    sources = SUM.sample(rows, generator)
    return sources, [int(torch.randint(each, (), generator=generator)) for each in choices]


def ran(name, network, values, written=None):
    """The logits and the states of a full run; `written` is {layer: function of the state}."""
    states, handles = {}, []
    for number, block in enumerate(network.get_submodule(STACKS[name])):

        def hook(module, args, output, number=number):
            state = output[0] if isinstance(output, tuple) else output
            new = state if written is None or number not in written else written[number](state)
            states[number] = new
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handles.append(block.register_forward_hook(hook))
    try:
        return network(**SUM.encode(values)).logits, states
    finally:
        for handle in handles:
            handle.remove()


def dims_swapped(state, source, dims):
    new = state.clone()
    new[..., dims.start : dims.stop] = source[..., dims.start : dims.stop]
    return new


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_iit_is_three_full_runs_with_plain_hooks(name, detach, seed):
    network = network_of(name).train()
    strict = Location(3, dims=range(4))
    found, values = step_of(network, PLACES, IIT(strict=[strict], detach_source=detach), seed=seed)
    ours = gradients(network, found)
    sources, (entry, _) = draws_of(seed, 6, (2, 1))
    variable, place = list(PLACES.items())[entry]
    base, source = SUM.run(values), SUM.run(sources)
    logits, _ = ran(name, network, values)
    _, states = ran(name, network, sources)
    states = {number: state.detach() if detach else state for number, state in states.items()}
    expected = {"task": cross_entropy(logits, base["answer"])}
    for term, at, after in (("iit", place, SUM.interchange(base, {variable: source})), ("siit", strict, base)):
        swapped = partial(dims_swapped, source=states[at.layer], dims=at.dims)
        expected[term] = cross_entropy(ran(name, network, values, {at.layer: swapped})[0], after["answer"])
    assert {name: term.item() for name, term in found.items()} == {name: each.item() for name, each in expected.items()}
    assert differ(ours, gradients(network, expected)) <= 1e-6


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("seed", "strict"), [(0, None), (1, None), (0, 3), (1, 0)])
def test_iit_runs_the_source_up_to_its_places_once_and_the_rest_from_the_write(name, seed, strict):
    network = network_of(name).train()
    count = Counted(name, network)
    objective = IIT() if strict is None else IIT(strict=[Location(strict, dims=range(4))])
    terms, _ = step_of(network, PLACES, objective, seed=seed)
    sum(terms.values()).backward()
    _, (entry,) = draws_of(seed, 6, (2,))
    written = [list(PLACES.values())[entry].layer, *([] if strict is None else [strict])]
    bound = [1 + (layer <= max(written)) + sum(layer > each for each in written) for layer in range(5)]
    assert count.forward == count.backward == bound


def rotations(names):
    """A place for each variable, with a rotation of its own."""
    return {each: Location(PLACES[each].layer, subspace=Rotation(3, width=16, seed=i)) for i, each in enumerate(names)}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("names", [("ab",), ("ab", "c")])
def test_das_is_full_runs_with_plain_hooks(name, names):
    network, places = network_of(name).requires_grad_(False), rotations(names)
    trained = nn.ModuleList(at.subspace for at in places.values())
    found, values = step_of(network, places, DAS(), trained=trained)
    ours = gradients(trained, found)
    sources, _ = draws_of(0, 6, ())
    base, source = SUM.run(values), SUM.run(sources)
    _, states = ran(name, network, sources)
    losses = []
    for variable, at in places.items():

        def rotated(state, at=at):
            turn = at.subspace.directions
            return state + (states[at.layer] @ turn - state @ turn) @ turn.T

        logits, _ = ran(name, network, values, {at.layer: rotated})
        losses.append(cross_entropy(logits, SUM.interchange(base, {variable: source})["answer"]))
    expected = {"das": torch.stack(losses).sum()}
    torch.testing.assert_close(found["das"], expected["das"], atol=1e-6, rtol=1e-6)
    assert differ(ours, gradients(trained, expected)) <= 1e-5  # the frame is computed in another order


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("names", [("ab",), ("c",), ("ab", "c")])
def test_das_runs_bases_and_sources_up_to_their_places_and_each_entry_from_its_own(name, names):
    network, places = network_of(name).requires_grad_(False), rotations(names)
    count, trained = Counted(name, network), nn.ModuleList(at.subspace for at in places.values())
    step_of(network, places, DAS(), trained=trained)[0]["das"].backward()
    layers = [at.layer for at in places.values()]
    assert count.forward == [2 * (layer <= max(layers)) + sum(layer > each for each in layers) for layer in range(5)]
    assert count.backward == [sum(layer > each for each in layers) for layer in range(5)]


def test_das_beside_another_objective_takes_the_base_run_that_is_there():
    network, places = network_of("gpt2").train(), rotations(("ab", "c"))
    entries = entries_of(places, SUM, network)
    computation = Computation(None, network, entries, [IIT(), DAS()], feed=Samples(SUM, 0, 6))
    count = Counted("gpt2", network)
    computation(SUM.sample(6, torch.Generator().manual_seed(1)), torch.Generator().manual_seed(0))
    assert count.forward[0] == 3  # the base, and the sources of both


def test_a_step_checks_what_a_causal_model_computes_once(monkeypatch):
    counted, original = [], mechanisms.first_outside

    def first_outside(values, domains, what):
        counted.extend(values)
        return original(values, domains, what)

    network = network_of("gpt2")
    SUM.run(SUM.sample(2, torch.Generator()))  # which checks one row alone, the first time
    monkeypatch.setattr(mechanisms, "first_outside", first_outside)
    step_of(network, {"ab": PLACES["ab"]}, IIT())
    assert counted.count("ab") == 2
    assert counted.count("answer") == 3  # that of the interchange too
