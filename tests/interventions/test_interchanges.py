"""Laws of interchanges, on every model: identity, transport, locality, commuting; and what makes no sense raises."""

import pytest
import torch

from interventions import InterventionError, Location, Mixup, Swap, Zero, interchange, intervene, run, run_to
from tests.interventions.tiny_models import OTHERS, TRANSFORMERS, answer, batch, make, middle, places

EVERY = [*TRANSFORMERS, *OTHERS]
EVERYTHING = {  # all that reaches the output
    **{name: [Location(-1)] for name in TRANSFORMERS},
    "t5": [Location(-1), Location(-1, stack="encoder")],
    "cnn": [Location(module="layer2.1")],
    "lstm": [Location(module="lstm")],
    "lstm-time-first": [Location(module="lstm")],
    "mlp": [Location(module="3")],
}


# --- identity and transport -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", EVERY)
def test_an_interchange_with_itself_changes_no_bit(name, resume):
    model, inputs = make(name), batch(name)
    base = run(model, inputs)
    for place in places(name):
        assert torch.equal(interchange(model, base, inputs, place, resume=resume).logits, base.logits), place
        assert torch.equal(interchange(model, base, base, place, resume=resume).logits, base.logits), place
    assert torch.equal(interchange(model, base, base, places(name), resume=resume).logits, base.logits)


@pytest.mark.parametrize("name", EVERY)
def test_a_swap_of_everything_gives_the_answer_of_the_source(name):
    model, base, source = make(name), batch(name), batch(name, seed=2)
    counterfactual = interchange(model, base, source, EVERYTHING[name]).logits
    assert torch.equal(counterfactual, answer(model, source))
    assert not torch.equal(counterfactual, answer(model, base))


@pytest.mark.parametrize("name", EVERY)
def test_a_swap_changes_its_dims_and_no_others(name):
    model = make(name)
    base, source = run(model, batch(name)), run(model, batch(name, seed=2))
    for dims in (range(3), [5, 1], range(0, 8, 2)):
        place, whole = middle(name, dims=dims), middle(name)
        done = interchange(model, base, source, place, record=whole)
        others = middle(name, dims=[d for d in range(8) if d not in place.dims])
        whole_run = done.vectors(whole)
        assert torch.equal(whole_run[..., list(place.dims)], source.vectors(whole)[..., list(place.dims)])
        assert torch.equal(whole_run[..., list(others.dims)], base.vectors(whole)[..., list(others.dims)])


@pytest.mark.parametrize("name", [name for name in EVERY if name != "mlp"])
def test_a_swap_changes_its_positions_and_no_others(name):
    model, whole = make(name), middle(name)
    base, source = run(model, batch(name)), run(model, batch(name, seed=2))
    before, new = base.vectors(whole), source.vectors(whole)
    for positions, kept, taken in ((1, [0, 2, 3], [1]), ([0, -1], [1, 2], [0, -1]), (slice(1, 3), [0, 3], [1, 2])):
        done = interchange(model, base, source, whole, positions=positions, record=whole).vectors(whole)
        assert torch.equal(done[:, kept], before[:, kept])
        assert torch.equal(done[:, taken], new[:, taken])


def test_source_positions_say_what_is_taken_and_positions_where_it_goes():
    model, place = make("gpt2"), Location(1)
    base, source = run(model, batch("gpt2")), run(model, batch("gpt2", seed=2, length=7))
    done = interchange(model, base, source, place, positions=[0, 3], source_positions=[6, 1], record=place)
    assert torch.equal(done.activations[place][:, [0, 3]], source.activations[place][:, [6, 1]])
    with pytest.raises(InterventionError, match=r"pad both batches to one length, or say which tokens: positions="):
        interchange(model, base, source, place)


@pytest.mark.parametrize("name", EVERY)
def test_swaps_of_disjoint_dims_commute(name):
    model, base, source = make(name), batch(name), batch(name, seed=2)
    parts = [middle(name, dims=range(4)), middle(name, dims=[5, 7])]
    one, other = (interchange(model, base, source, at).logits for at in (parts, parts[::-1]))
    assert torch.equal(one, other)
    assert not torch.equal(one, interchange(model, base, source, parts[0]).logits)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_swaps_at_disjoint_locations_commute(name):
    model, base, source = make(name), batch(name), batch(name, seed=2)
    at = [Location(0, dims=range(4)), Location(2, dims=range(8))]
    assert torch.equal(interchange(model, base, source, at).logits, interchange(model, base, source, at[::-1]).logits)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "mlp"])
def test_swaps_of_disjoint_positions_commute(name):
    model, place, inputs = make(name), middle(name), batch(name)
    source = run(model, batch(name, seed=2))

    def nested(*order: int) -> torch.Tensor:
        with (
            intervene(model, place, source=source, positions=order[0]),
            intervene(model, place, source=source, positions=order[1]),
        ):
            return answer(model, inputs)

    assert torch.equal(nested(0, 2), nested(2, 0))
    assert torch.equal(nested(0, 2), interchange(model, inputs, source, place, positions=[0, 2]).logits)


def test_each_location_has_its_own_source_positions_and_operator():
    model = make("gpt2")
    base, first, second = (run(model, batch("gpt2", seed)) for seed in (1, 2, 3))
    low, high = Location(0), Location(1, dims=range(4))
    at, sources = {low: Swap(), high: Swap(), Location(2): Zero()}, {low: first, high: second.inputs}
    done = interchange(model, base, sources, at, positions={low: 0, high: [1, 2]}, record=at).activations
    assert torch.equal(done[low][:, 0], first.activations[low][:, 0])
    assert torch.equal(done[low][:, 1:], base.activations[low][:, 1:])
    assert torch.equal(done[high][:, 1:3], second.activations[high][:, 1:3])
    assert not done[Location(2)].any()


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_one_line_works_as_written(name):
    model, inputs = make(name), batch(name)
    with intervene(model, layer=1, op=Mixup(0.5)) as handle:
        logits = model(**inputs).logits
    assert not torch.equal(logits, model(**inputs).logits)
    assert handle.firings == {Location(1): 1}
    assert handle.change[Location(1)] == pytest.approx(0.56, abs=0.1)  # √(0.5² + 0.5² · 0.5²)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_the_one_line_works_around_generation(name):
    model, inputs = make(name), {key: value for key, value in batch(name).items() if "decoder" not in key}
    with intervene(model, layer=1, op=Zero()) as handle:
        zeroed = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        slow = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(zeroed, slow)
    assert not torch.equal(zeroed, model.generate(**inputs, max_new_tokens=6, do_sample=False))
    assert handle.firings[Location(1)] == 12


def test_a_module_that_runs_twice_is_lined_up_call_by_call():
    model, base, source, place = make("cnn"), batch("cnn"), batch("cnn", seed=2), Location(module="layer2.1.relu")
    assert torch.equal(interchange(model, base, run(model, base, at=place), place).logits, model(base))
    assert torch.equal(interchange(model, base, run(model, source, at=place), place).logits, model(source))
    assert torch.equal(interchange(model, base, source, place).logits, model(source))
    with pytest.raises(InterventionError, match=r"ran 2 times, so there is no one activation"):
        run(model, base).activations[place]
    with intervene(model, place, op=Zero()) as handle:
        assert torch.equal(model(base), model.fc.bias.expand(3, 3))
    assert handle.firings == {place: 2}


class Loop(torch.nn.Module):
    """As many turns as there are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = x[:, 0]
        for token in x.unbind(1):
            state = self.layer(state + token).tanh()
        return state


def test_more_calls_than_the_source_has_raise():
    model, place = Loop(), Location(module="layer")
    with pytest.raises(
        InterventionError, match=r"ran 3 times in one call of the model and its source holds 2 activations"
    ):
        interchange(model, torch.randn(2, 3, 4), run(model, torch.randn(2, 2, 4), at=place), place)


# --- what is asked for must make sense --------------------------------------------------------------------------------


def test_a_function_is_given_a_source_where_there_is_one():
    model, inputs, place = make("mlp"), batch("mlp"), Location(module="2")

    def halfway(base, source, generator):
        return base if source is None else (base + source) / 2

    base, source = run(model, inputs), run(model, batch("mlp", seed=2))
    done = interchange(model, base, source, {place: halfway}, record=place).activations[place]
    assert torch.equal(done, (base.activations[place] + source.activations[place]) / 2)
    assert torch.equal(interchange(model, base, None, {place: halfway}).logits, base.logits)


def test_a_counterfactual_can_be_a_source():
    model, place = make("gpt2"), Location(2)
    first = interchange(model, batch("gpt2"), None, {Location(0): Zero()}, record=place)
    done = interchange(model, run(model, batch("gpt2", seed=2)), first, place)
    assert torch.equal(done.logits, first.logits)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda m, x: interchange(m, x, None, Location(1)),
            r"no operator was given; write op=Zero\(\), or source=… to swap",
        ),
        (
            lambda m, x: interchange(m, x, None, Location(1), op=Swap()),
            r"Swap at block_output\.1 takes from a source and none",
        ),
        (lambda m, x: interchange(m, x, {Location(2): x}, Location(1)), r"none was given; pass source=inputs or a Run"),
        (
            lambda m, x: interchange(m, x, {Location(1): x, Location(2): x}, Location(1)),
            r"a source for block_output\.2 was given and nothing is written there; add it to at",
        ),
        (
            lambda m, x: interchange(m, x, x, {Location(1): Zero()}),
            r"a source was given and Zero takes none; leave it out",
        ),
        (
            lambda m, x: interchange(m, x, x, Location(1), op=Swap),
            r"<class .*Swap'> at block_output\.1 is not an operator",
        ),
        (lambda m, x: interchange(m, x, x, {Location(1): Swap()}, op=Swap()), r"were both given; leave op out"),
        (lambda m, x: interchange(m, x, x, []), r"no location was given; write at=Location\(3\)"),
        (
            lambda m, x: interchange(m, x, x, Location(1), positions={Location(2): 0}),
            r"positions for block_output\.2 were given and nothing is written there",
        ),
        (
            lambda m, x: interchange(m, x, run(make("gpt2"), x), Location(1)),
            r"the source is a run of another model \(GPT2LMHeadModel\); run it on this one: run\(model, inputs\)",
        ),
        (
            lambda m, x: run(m, {**x, "past_key_values": m(**x).past_key_values}),
            r"the inputs hold past_key_values, .* pass the whole sequence instead",
        ),
        (
            lambda m, x: interchange(m, x, {**x, "past_key_values": m(**x).past_key_values}, Location(1)),
            r"the inputs hold past_key_values",
        ),
        (lambda m, x: run(m.transformer, x).logits, r"hidden_state.* is not known; say which: answers="),
        (lambda m, x: run_to(m, x, Location(module="transformer.h")), r"never ran in the source run; look at describe"),
    ],
)
def test_what_makes_no_sense_raises(call, match):
    with pytest.raises(InterventionError, match=match):
        call(make("gpt2"), batch("gpt2"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            dict(op=Zero()),
            r"give one place: intervene\(model, Location\(3\), op=Zero\(\)\) or intervene\(model, layer=3",
        ),
        (
            dict(at=Location(1), layer=1, op=Zero()),
            r"give one place: .* both at=Location\(1\) and \{'layer': 1\} were given",
        ),
        (
            dict(layer=1, head=2, op=Zero()),
            r"'head'; the keywords of a location are layer, site, heads, dims, .*, module, io and operation",
        ),
        (dict(layer=9, op=Zero()), r"Location\(layer=9\) is out of range"),
        (dict(layer=1), r"no operator was given"),
        (dict(layer=1, op=Zero), r"is not an operator; write Swap\(\), Zero\(\), or a function"),
    ],
    ids=str,
)
def test_a_place_is_given_once(options, match):
    with pytest.raises(InterventionError, match=match), intervene(make("gpt2"), **options):
        pass


def test_an_error_of_the_model_is_not_covered_up():
    model = make("cnn")
    with pytest.raises(TypeError, match=r"no_such"), intervene(model, module="fc", op=Zero()):
        model(batch("cnn"), no_such=1)


def test_text_forms_name_places_everywhere():
    model, inputs = make("gpt2"), batch("gpt2")
    base = run(model, inputs, "block_output.1[dims=0:4]")
    assert torch.equal(base.activations["block_output.1[dims=0:4]"], base.activations[Location(1)][..., :4])
    done = interchange(model, base, inputs, ["block_output.0"], positions={Location(0): 0}, record="block_output.1")
    assert torch.equal(done.activations["block_output.1"], base.activations["block_output.1"])


@torch.no_grad()
def test_a_base_that_runs_in_full_may_be_older_than_the_weights():
    model, source = make("gpt2"), batch("gpt2", seed=2)
    base = run(model, batch("gpt2"))
    model.transformer.h[0].mlp.c_fc.weight.add_(1)
    full = interchange(model, base, source, Location(1, dims=[0]), resume=False).logits
    assert torch.equal(full, interchange(model, batch("gpt2"), source, Location(1, dims=[0])).logits)
    with pytest.raises(InterventionError, match="the run is older than the model"):
        interchange(model, base, source, Location(1, dims=[0]))


@torch.no_grad()
def test_a_base_that_its_inputs_do_not_describe_is_refused():
    model, source = make("gpt2"), batch("gpt2", seed=2)
    changed = interchange(model, batch("gpt2"), source, Location(0))
    for resume in (True, False):
        with pytest.raises(InterventionError, match=r"itself a counterfactual run; .* or base\.inputs inside a `with"):
            interchange(model, changed, source, Location(1), resume=resume)
        with pytest.raises(InterventionError, match=r"the base is a run of another model \(GPT2LMHeadModel\)"):
            interchange(model, run(make("gpt2"), batch("gpt2")), source, Location(1), resume=resume)
