"""Laws of runs, on every model: they answer as the model does, and keep what its modules gave."""

from functools import partial

import pytest
import torch

from interventions import InterventionError, Location, Mixup, interchange, record, run, run_to
from tests.interventions.tiny_models import LAYERS, OTHERS, TRANSFORMERS, answer, batch, make, places

EVERY = [*TRANSFORMERS, *OTHERS]


def of_rows(inputs: object, rows: torch.Tensor) -> object:
    return {key: value[rows] for key, value in inputs.items()} if isinstance(inputs, dict) else inputs[rows]


@pytest.mark.parametrize("name", EVERY)
def test_a_run_answers_as_the_model_does(name):
    model, inputs = make(name), batch(name)
    assert torch.equal(run(model, inputs, places(name)).logits, answer(model, inputs))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_block_outputs_are_the_hidden_states_of_transformers(name):
    model, inputs = make(name), batch(name)
    output = model(**inputs, output_hidden_states=True)
    hidden = output.decoder_hidden_states if name == "t5" else output.hidden_states
    found = run(model, inputs).activations
    assert torch.equal(found[Location(site="embedding")], hidden[0])
    for layer in range(LAYERS - 1):  # some models normalise the last one
        assert torch.equal(found[Location(layer)], hidden[layer + 1])
        assert torch.equal(found[Location(layer + 1, "block_input")], hidden[layer + 1])


@pytest.mark.parametrize("name", EVERY)
def test_asked_fetched_recorded_and_read_to_are_the_same_activation(name):
    model, inputs = make(name), batch(name)
    asked, fetched, read = run(model, inputs, places(name)), run(model, inputs), run_to(model, inputs, places(name))
    with record(model, places(name)) as recorded:
        answer(model, inputs)
    for place in places(name):
        for other in (fetched.activations, recorded, read.activations):
            assert torch.equal(asked.activations[place], other[place]), place


def test_dims_are_those_of_the_axis_of_channels():
    found = run(make("cnn"), batch("cnn"))
    whole = found.activations[Location(module="conv1")]
    assert torch.equal(found.activations[Location(module="conv1", dims=[3, 1])], whole[:, [3, 1]])
    assert torch.equal(found.vectors(Location(module="conv1")), whole.flatten(2).mT)


@pytest.mark.parametrize("name", EVERY)
def test_taken_examples_are_the_run_of_those_examples(name):
    model, inputs, rows = make(name), batch(name, size=4), torch.tensor([2, 0, 2])
    taken, direct = run(model, inputs, places(name)).take(rows), run(model, of_rows(inputs, rows), places(name))
    assert torch.allclose(taken.logits, direct.logits, atol=1e-5)
    assert torch.equal(answer(model, taken.inputs), answer(model, direct.inputs))
    for place in places(name):
        assert torch.allclose(taken.activations[place], direct.activations[place], atol=1e-4), place


def test_examples_are_taken_by_number_or_by_a_mask():
    model, at = make("mlp"), places("mlp")[0]
    done = run(model, batch("mlp"), [at])
    wanted = done.take(torch.tensor([0, 2]))
    for rows in (
        [0, 2],
        (0, -1),
        range(0, 3, 2),
        slice(0, 3, 2),
        torch.tensor([True, False, True]),
        [True, False, True],
    ):
        taken = done.take(rows)
        assert torch.equal(taken.activations[at], wanted.activations[at])
        assert torch.equal(taken.logits, wanted.logits)
    assert len(done.take(-1).logits) == 1
    for wrong in ([3], -4, torch.tensor([0, 7])):
        with pytest.raises(InterventionError, match=r"is not in this run, which has 3: 0 to 2"):
            done.take(wrong)
    for wrong in ("a", None, [0.5], [[0]], [True], torch.tensor(1.0), []):
        with pytest.raises(InterventionError, match=r"names no examples of this run, which has 3; .*take\(\[0, 2\]\)"):
            done.take(wrong)


def test_taken_examples_bring_no_cache_of_the_others():
    model, inputs = make("gpt2"), {**batch("gpt2"), "use_cache": True}
    assert run(model, inputs).output.past_key_values is not None
    assert run(model, batch("gpt2")).output.get("past_key_values") is None
    assert run(model, inputs).take(torch.tensor([0])).output.get("past_key_values") is None


def test_a_detached_run_has_no_graph():
    model, inputs = make("gpt2"), batch("gpt2")
    base = run(model, inputs, [Location(1)])
    assert base.activations[Location(1)].requires_grad
    cut = base.detach()
    assert not any(
        state.requires_grad for state in (cut.logits, *map(cut.activations.get, map(Location, range(LAYERS))))
    )
    grads = torch.autograd.grad(
        interchange(model, cut, None, {Location(1): Mixup(0.5)}).logits.sum(),
        [model.transformer.h[0].mlp.c_fc.weight, model.transformer.h[2].mlp.c_fc.weight],
        allow_unused=True,
    )
    assert grads[0] is None
    assert grads[1] is not None


def test_activations_are_stored_as_asked():
    model, inputs, place = make("gpt2"), batch("gpt2"), Location(1)
    found = run(model, inputs, [place], detach=True, device="meta").activations
    assert [found[p].requires_grad for p in (place, Location(0))] == [False, False]
    assert [found[p].device.type for p in (place, Location(0))] == ["meta", "meta"]


def test_each_call_is_recorded_in_order():
    model, place, inputs = make("mlp"), Location(module="0"), [batch("mlp", seed) for seed in (1, 2)]
    with record(model, place) as activations:
        for given in inputs:
            model(given)
    assert all(torch.equal(state, model[0](x)) for state, x in zip(activations.calls(place), inputs, strict=True))
    with pytest.raises(InterventionError, match=r"ran 2 times.*take activations\.calls"):
        activations[place]


def test_what_was_not_recorded_raises():
    model = make("gpt2")
    with record(model, Location(1)) as activations:
        answer(model, batch("gpt2"))
        with pytest.raises(
            InterventionError, match=r"was not recorded; ask for it: record\(model, \[Location\(0\)\]\)"
        ):
            activations[Location(0)]
    with pytest.raises(InterventionError, match=r"never ran in this record block"), record(model, Location(1)):
        pass


# --- runs up to a place that are bases too ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*TRANSFORMERS, "cnn", "mlp"])
def test_an_interchange_resumes_from_a_run_up_to_its_place(name, training):
    """Bit for bit what it is from a run of everything, with the same dropout, and at all places up to there."""
    model = make(name).train(training)
    torch.manual_seed(0)
    source = run_to(model, batch(name, seed=2), places(name))
    for last in places(name):
        found = []
        for base in (run, partial(run_to, at=[last], resumable=True)):
            torch.manual_seed(1)
            made = base(model, batch(name))
            torch.manual_seed(2)
            found.append(interchange(model, made, source, last).logits)
        assert torch.equal(*found), last


def test_blocks_below_the_place_run_once_and_those_above_once():
    model, calls = make("gpt2"), []
    for number, block in enumerate(model.transformer.h):
        block.ln_1.forward = partial(lambda forward, number, x: calls.append(number) or forward(x),
                                     block.ln_1.forward, number)  # fmt: skip
    layers = len(model.transformer.h)
    base = run_to(model, batch("gpt2"), Location(1), resumable=True)
    source = run_to(model, batch("gpt2", seed=2), [Location(0, "mlp_output"), Location(1)])
    assert calls == [0, 1, 0, 1]
    calls.clear()
    low, high = (interchange(model, base, source, at) for at in (Location(0, "mlp_output"), Location(1)))
    assert calls == [*range(layers), *range(2, layers)]
    assert base.output is None
    assert not torch.equal(low.logits, high.logits)


def test_a_run_up_to_a_place_that_cannot_be_resumed_keeps_no_blocks():
    model = make("gpt2")
    assert run_to(model, batch("gpt2"), Location(1)).recording is None
    kept = run_to(model, batch("gpt2"), Location(1), resumable=True).recording
    assert len(kept.calls) == 2


def test_a_run_up_to_a_place_says_what_it_did_not_read():
    model = make("gpt2")
    for resumable in (False, True):
        found = run_to(model, batch("gpt2"), Location(1), resumable=resumable)
        with pytest.raises(InterventionError, match=r"mlp_output\.0 was not read in this run, which stops after block"):
            _ = found.activations[Location(0, "mlp_output")]
        assert torch.equal(found.activations[Location(1, dims=[0])], found.activations[Location(1)][..., [0]])
    below = run(model, batch("gpt2")).activations[Location(0)]
    assert torch.equal(found.activations[Location(0)], below)
