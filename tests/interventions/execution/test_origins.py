"""Sources from another model, other places, and from what was kept: the bits of the same by hand, over families."""

import copy

import numpy as np
import pytest
import torch

from interventions import (
    SITES,
    Interpolate,
    InterventionError,
    Location,
    Mean,
    Rotation,
    Stored,
    Swap,
    Zero,
    architecture,
    interchange,
    intervene,
    logit_difference,
    run,
    sweep,
)
from interventions.execution.origins import origin_of
from tests.interventions.tiny_models import OTHERS, TRANSFORMERS, answer, batch, make, middle, places, trace

EVERY = [*TRANSFORMERS, *OTHERS]


def sites(name: str) -> list[Location]:
    """Every site of a block in the middle, those with heads too; or every module."""
    if name in OTHERS:
        return places(name)
    stack, model = "decoder" if name == "t5" else None, make(name)
    inner = [Location(1, site, stack=stack) for site in SITES if site not in ("embedding", "final_norm", "logits")]
    return [at for at in inner if exists(model, at)]


def exists(model: torch.nn.Module, location: Location) -> bool:
    try:
        architecture(model).place(location)
    except InterventionError:
        return False
    return True


def first(value):
    return value if isinstance(value, torch.Tensor) else first(value[0])


def with_first(value, new):
    return new if isinstance(value, torch.Tensor) else type(value)((with_first(value[0], new), *value[1:]))


def by_hand(model, other, location, base, source):
    """The answer of `model` on the base, with what a plain hook saw of `other` on the source put in."""
    seen = []
    note = (
        architecture(other)
        .place(location)
        .module.register_forward_hook(lambda module, given, output: seen.append(first(output).clone()))
    )
    answer(other, source)
    note.remove()
    put = (
        architecture(model)
        .place(location)
        .module.register_forward_hook(lambda module, given, output: with_first(output, seen[0]))
    )
    result = answer(model, base)
    put.remove()
    return result


@pytest.mark.parametrize("name", EVERY)
def test_a_copy_of_the_model_gives_the_bits_of_the_model(name):
    model, base, source = make(name), batch(name), batch(name, seed=2)
    twin, taken = copy.deepcopy(model), run(model, base)
    at, ran = sites(name), run(twin, source)
    for place in at:
        alone = interchange(model, taken, source, place).logits
        assert torch.equal(interchange(model, taken, source, place, source_model=twin).logits, alone), place
    assert torch.equal(interchange(model, taken, ran, at[-1], source_model=twin).logits, alone)
    assert torch.equal(interchange(model, base, source, at[-1], source_model=model).logits, alone)


@pytest.mark.parametrize("name", EVERY)
def test_other_weights_are_what_a_hand_written_hook_puts_in(name):
    model, other, base, source = make(name), make(name, seed=7), batch(name), batch(name, seed=2)
    before, ran = (trace(model), trace(other)), run(other, source)
    for place in [place for place in places(name) if architecture(model).place(place).io == "output"]:
        expected = by_hand(model, other, place, base, source)
        found = interchange(model, base, source, place, source_model=other).logits
        assert torch.equal(found, expected), place
        with intervene(model, place, source=ran, source_model=other):
            assert torch.equal(answer(model, base), expected), place
    assert (trace(model), trace(other)) == before


@pytest.mark.parametrize("name", EVERY)
def test_what_was_kept_is_a_source_at_every_site(name):
    model, other, base, source = make(name), make(name, seed=7), batch(name), batch(name, seed=2)
    before, ran = run(model, base), run(other, source)
    for place in sites(name):
        kept = Stored({place: ran.activations[place].detach()})
        across = interchange(model, before, ran, place, source_model=other).logits
        assert torch.equal(interchange(model, before, kept, place).logits, across), place
        op = written(ran.vectors(place))
        assert torch.equal(interchange(model, before, None, {place: op}).logits, across), place


def written(value):
    """An operator that writes what it was made with."""

    def put(base, source, generator):
        return value.reshape(base.shape)

    put.needs_source = False
    return put


@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if name != "t5"])
def test_another_place_may_be_read_than_is_written(name):
    model, other, base, source = make(name), make(name, seed=7), batch(name), batch(name, seed=2)
    low, high = Location(0), Location(2)
    state = run(other, source).activations[high]
    expected = interchange(model, base, Stored({low: state}), low, positions=[0, 2]).logits
    across = interchange(model, base, source, low, positions=[0, 2], source_model=other, source_at={low: high}).logits
    assert torch.equal(across, expected)
    assert torch.equal(
        interchange(model, base, source, low, positions=[0, 2], source_model=other, source_at=high).logits, expected
    )
    of_itself = run(model, source).activations[high]
    expected = interchange(model, base, Stored({low: of_itself}), low).logits
    assert torch.equal(interchange(model, base, source, low, source_at=high).logits, expected)


def test_parts_of_places_of_two_widths():
    model, other = make("bert"), make("bert")
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    other = BertForSequenceClassification(
        BertConfig(vocab_size=30, hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=32)
    ).eval()
    base, source = batch("bert"), batch("bert", seed=2)
    wide = run(other, source).vectors(Location(3))
    for written_at, read_at in (
        (Location(1, dims=range(4)), Location(3, dims=range(20, 24))),
        (Location(1, dims=[3, 1]), Location(3, dims=[23, 0])),
    ):
        done = interchange(
            model, base, source, written_at, source_model=other, source_at=read_at, record=Location(1)
        ).vectors(Location(1))
        assert torch.equal(done[..., list(written_at.dims)], wide[..., list(read_at.dims)])
    head = Location(1, "attention_heads", heads=1), Location(3, "attention_heads", heads=2)
    done = interchange(model, base, source, head[0], source_model=other, source_at=head[1], record=head[0].whole)
    assert torch.equal(done.vectors(head[0].whole)[:, :, 1], run(other, source).vectors(head[1].whole)[:, :, 2])
    with pytest.raises(
        InterventionError, match=r"1 is \[3, 5, 16\] where it is written and .* \[3, 5, 24\].*dims=range\(0, 16\)"
    ):
        interchange(model, base, source, Location(1), source_model=other, source_at=Location(3))
    subspaces = Location(1, subspace=Rotation(3, 16)), Location(3, subspace=Rotation(3, 24))
    interchange(model, base, source, subspaces[0], source_model=other, source_at=subspaces[1])
    wider = Location(3, subspace=Rotation(4, 24))
    with pytest.raises(InterventionError, match="do not fit"):
        interchange(model, base, source, subspaces[0], source_model=other, source_at=wider)


def test_the_padding_is_that_of_the_other_run():
    model, other = make("gpt2"), make("gpt2", seed=7)
    base, source = batch("gpt2"), batch("gpt2", seed=2)
    longer = {key: torch.cat([torch.zeros_like(value[:, :2]), value], 1) for key, value in source.items()}
    state = run(other, longer).vectors(Location(1))
    done = interchange(model, base, longer, Location(1), positions=0, source_model=other, record=Location(1))
    assert torch.equal(done.vectors(Location(1))[:, 0], state[:, 2])  # the first real token, after the padding
    kept = Stored({Location(1): state}, longer["attention_mask"])
    stored = interchange(model, base, kept, Location(1), positions=0).logits
    assert torch.equal(stored, done.logits)


def test_each_operator_takes_from_the_other_model():
    model, other, base, source = make("bert"), make("bert", seed=7), batch("bert"), batch("bert", seed=2)
    at, taken = Location(1), run(other, source).activations[Location(1)]
    half = interchange(model, base, source, at, op=Interpolate(0.5), source_model=other, record=at)
    assert torch.equal(half.activations[at], torch.lerp(run(model, base).activations[at], taken, 0.5))
    mean = interchange(model, base, source, at, op=Mean(), source_model=other, record=at)
    torch.testing.assert_close(mean.activations[at], taken.mean((0, 1)).expand_as(taken))


def test_gradients_reach_both_models():
    model, other, base, source = make("bert"), make("bert", seed=7), batch("bert"), batch("bert", seed=2)
    interchange(model, base, source, Location(1), source_model=other).logits.sum().backward()
    blocks = [each.bert.encoder.layer for each in (model, other)]
    assert blocks[1][0].output.dense.weight.grad is not None
    assert blocks[1][2].output.dense.weight.grad is None  # it stops after what is read
    assert blocks[0][2].output.dense.weight.grad is not None


@pytest.mark.parametrize("positions", ["each", None, [0, -1]])
def test_a_sweep_is_its_interchanges(positions):
    model, other, base, source = make("gpt2"), make("gpt2", seed=7), batch("gpt2"), batch("gpt2", seed=2)
    at, metric = [Location(0), Location(1)], logit_difference(1, 2)
    read = {Location(0): Location(2)}
    grid = sweep(model, base, source, at, metric=metric, positions=positions, source_model=other, source_at=read)
    columns = range(5) if positions == "each" else [None] if positions is None else positions
    for row, place in enumerate(at):
        for column, position in enumerate(columns):
            one = interchange(
                model,
                base,
                run(other, source),
                place,
                positions=position,
                source_model=other,
                source_at={place: read.get(place, place)},
            )
            torch.testing.assert_close(
                grid.values[row, column], metric(one.output).detach().mean(), rtol=1e-5, atol=1e-5
            )
    with pytest.raises(InterventionError, match=r"run of another model.*source_model=other"):
        sweep(model, base, run(other, source), at, metric=metric)
    with pytest.raises(InterventionError, match="train mode"):
        sweep(model, base, source, at, metric=metric, source_model=copy.deepcopy(other).train())


# --- a source of an inner block ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "cnn", "mlp"])
def test_a_source_given_as_inputs_runs_under_the_blocks_around_it(name):
    model, base, source = make(name), batch(name), batch(name, seed=2)
    low, high = (places(name)[0], places(name)[3]) if name in OTHERS else (Location(0), Location(2))
    outside = run(model, source)
    with torch.no_grad(), intervene(model, low, op=Zero()):
        inside = run(model, source, [high])
    with torch.no_grad(), intervene(model, low, op=Zero()), intervene(model, high, source=source):
        nested = answer(model, base)
    with torch.no_grad(), intervene(model, low, op=Zero()), intervene(model, high, source=outside):
        of_a_run = answer(model, base)
    for found, state in ((nested, inside), (of_a_run, outside)):
        at_once = Stored({high: state.activations[high].detach()})
        assert torch.equal(found, interchange(model, base, {high: at_once}, {low: Zero(), high: Swap()}).logits)
    assert not torch.equal(nested, of_a_run)


# --- what cannot be is one line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_an_activation_given_as_inputs_names_the_way_out(name):
    model, base, place = make(name), batch(name), middle(name)
    state = torch.randn(3, 5, 7, 2, 2)  # fits no model here
    if name not in ("cnn", "vit", "mlp"):
        state = run(model, base).activations[place].detach()
    way = r"source is a tensor.*source=Stored\(\{Location\(3\): tensor\}\)"
    for source in (state, {place: state}):
        with pytest.raises(InterventionError, match=way):
            interchange(model, base, source, place)
        with pytest.raises(InterventionError, match=way), intervene(model, place, source=source):
            raise AssertionError("the block was opened")
    with pytest.raises(InterventionError, match=way):
        sweep(model, base, state, place, metric=lambda output: 0.0, positions=None)


@pytest.mark.parametrize("source", [3, 0.5, np.zeros((3, 5, 16))], ids=["int", "float", "numpy"])
@pytest.mark.parametrize("name", ["bert", "mlp", "cnn"])
def test_what_can_be_no_source_names_what_can(name, source):
    model, base, place = make(name), batch(name), middle(name)
    calls = (
        lambda: interchange(model, base, source, place),
        lambda: interchange(model, base, {place: source}, place),
        lambda: sweep(model, base, source, place, metric=lambda output: 0.0, positions=None),
        lambda: intervene(model, place, source=source).__enter__(),
    )
    for call in calls:
        with pytest.raises(
            InterventionError, match=r"source is a \w+, and no inputs .*; give inputs .* a Run, or Stored\("
        ):
            call()


def test_activations_of_a_run_given_to_a_sweep():
    model, base, place = make("bert"), batch("bert"), Location(1)
    kept = run(model, base, place).activations
    for source in (kept, {place: kept[place]}):
        with pytest.raises(InterventionError, match=r"source is a dict of locations.*source=Stored\("):
            sweep(model, base, source, place, metric=lambda output: 0.0, positions=None)


def test_what_makes_no_sense_is_one_line():
    model, other, base, source = make("bert"), make("bert", seed=7), batch("bert"), batch("bert", seed=2)
    at, ran = Location(1), run(other, source)
    kept = Stored({Location(2): ran.activations[Location(2)]})
    for match, call in {
        r"run of another model.*run\(model, inputs\), or.*source_model=other": lambda: interchange(
            model, base, ran, at
        ),
        r"source is a run of another model": lambda: interchange(
            model, base, ran, at, source_model=make("bert", seed=3)
        ),
        r"source_model=3 is no model": lambda: interchange(model, base, source, at, source_model=3),
        r"source_model= says.*pass source=inputs": lambda: interchange(
            model, base, None, {at: Zero()}, source_model=other
        ),
        r"source_at names block_output\.0, and nothing is written": lambda: interchange(
            model, base, source, at, source_at={Location(0): Location(2)}
        ),
        r"layer=9\) is out of range": lambda: interchange(model, base, source, at, source_at=Location(9)),
        r"nothing is stored for block_output\.1.*source_at=": lambda: interchange(model, base, kept, at),
        r"does not say where.*Stored\(\{Location\(3\): tensor\}\)": lambda: Stored(torch.zeros(2)),
        r"a dict of locations.*Stored": lambda: interchange(model, base, {"block_output.1": torch.zeros(1)}, at),
        r"Stored activations have no run": lambda: sweep(model, base, kept, at, metric=logit_difference(0, 1)),
    }.items():
        with pytest.raises(InterventionError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert torch.equal(
        interchange(model, base, kept, at, source_at=Location(2)).logits,
        interchange(model, base, source, at, source_at=Location(2), source_model=other).logits,
    )


def test_models_of_nnsight_are_refused_with_the_way_out():
    class Envoy:
        path, interleaver, _module = "", None, make("bert")

    Envoy.__module__ = "nnsight.intervention.envoy"
    traced, inputs, at = Envoy(), batch("bert"), [Location(1)]
    for model, other, there in (
        (traced, make("bert"), None),
        (make("bert"), traced, None),
        (traced, None, Location(2)),
    ):
        with pytest.raises(InterventionError, match=r"is for torch models, and one of nnsight.*source=Stored\("):
            origin_of(model, inputs, other, there, at)
