"""Operators at a place: what they leave alone, and what does not fit."""

import pytest
import torch

from interventions import (
    Add,
    Interpolate,
    InterventionError,
    Location,
    Mean,
    Mixup,
    Noise,
    Swap,
    Zero,
    interchange,
    intervene,
    run,
)
from tests.interventions.tiny_models import OTHERS, TRANSFORMERS, answer, batch, make, middle

POSITIONS = {
    "none": None,
    "int": -1,
    "slice": slice(1, 3),
    "list": [0, -1],
    "tensor": torch.tensor([[0, 2], [1, -1], [-2, 0]]),
    "ragged": [[0], [1, 2], [-1]],
    "mask": "mask",
}


def unchanged(base, source, generator):
    return base


def viewed(base, source, generator):
    return base[...]


unchanged.needs_source = viewed.needs_source = False
NEUTRAL = {  # the operator, and whether its source is the base itself
    "swap": (Swap(), True),
    "interpolate nothing": (Interpolate(0.0), False),
    "interpolate with itself": (Interpolate(0.3), True),
    "interpolate most with itself": (Interpolate(0.9), True),
    "mixup that keeps all": (Mixup(1.0, keep=1.0), False),
    "no noise": (Noise(0.0), False),
    "nothing added": (Add(torch.tensor(3.0), scale=0.0), False),
    "a function": (unchanged, False),
    "a function that gives a view": (viewed, False),
}


def chosen(positions: object, tokens: int) -> object:
    if isinstance(positions, str):
        return torch.arange(3 * tokens).reshape(3, tokens) % 3 == 1
    return positions


@pytest.mark.parametrize("op", NEUTRAL)
@pytest.mark.parametrize("name", [*TRANSFORMERS, *OTHERS])
def test_neutral_writes_change_no_bit(name, op):
    model, (operator, itself) = make(name), NEUTRAL[op]
    base, other = run(model, batch(name), middle(name)), run(model, batch(name, seed=2), middle(name))
    state = base.vectors(middle(name))
    source = (base if itself else other) if operator.needs_source else None
    dims = (None, range(2, 8, 3), [5, 0, 1])
    every = [(None, some) for some in dims]
    every += list(zip(POSITIONS.values(), dims * 3, strict=False)) if state.ndim == 3 else []
    for positions, some in every:
        at, where = {middle(name, dims=some): operator}, chosen(positions, state.shape[1])
        done = interchange(model, base, source, at, positions=where)
        assert torch.equal(done.logits, base.logits), (positions, some)


@pytest.mark.parametrize("op", [Interpolate(0.0), Interpolate(1.0), Interpolate(0.7), Swap()])
def test_interpolation_is_exact_at_its_ends_in_bfloat16(op):
    model = make("llama").bfloat16()
    base, source = run(model, batch("llama")), run(model, batch("llama", seed=2))
    done = interchange(model, base, base if op == Interpolate(0.7) else source, {Location(1): op}, record=Location(1))
    end = source if op in (Interpolate(1.0), Swap()) else base
    assert torch.equal(done.activations[Location(1)], end.activations[Location(1)])


@pytest.mark.parametrize("name", [name for name in (*TRANSFORMERS, *OTHERS) if name != "mlp"])
def test_every_form_of_positions_selects_the_same_tokens(name):
    model, place = make(name), middle(name)
    base, source = run(model, batch(name)), run(model, batch(name, seed=2))
    tokens = base.vectors(place).shape[1]
    mask = torch.zeros(3, tokens, dtype=torch.bool)
    mask[:, [1, 2]] = True
    same = [slice(1, 3), range(1, 3), [1, 2], [2, 1], [1 - tokens, 2 - tokens], torch.tensor([1, 2])]
    own = [[[1, 2]] * 3, torch.tensor([[1, 2]] * 3), torch.tensor([[1 - tokens, 2]] * 3), mask]
    runs = [interchange(model, base, source, place, positions=form, record=place) for form in same + own]
    states = [done.activations[place] for done in runs]
    assert all(torch.equal(states[0], other) for other in states)
    assert not torch.equal(states[0], base.activations[place])


@pytest.mark.parametrize("name", ["gpt2", "cnn"])
def test_memory_layout_is_kept(name):
    model = make(name)
    inputs = batch(name)
    if name == "cnn":
        model, inputs = model.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last)
    strides = []
    place = middle(name)
    module = model.get_submodule("layer2.1") if name == "cnn" else model.transformer.h[2]
    module.register_forward_pre_hook(lambda module, args: strides.append(args[0].stride()))
    answer(model, inputs)
    for op in (Zero(), Mean(), lambda base, source, generator: base.new_ones(()).expand(base.shape)):
        interchange(model, inputs, None if isinstance(op, Zero) else inputs, {place: op})
    assert len(set(strides)) == 1


@pytest.mark.parametrize("name", [*TRANSFORMERS, *OTHERS])
def test_the_handle_measures_the_change(name):
    model, place = make(name), middle(name)
    with intervene(model, place, op=Zero()) as handle:
        answer(model, batch(name))
    assert handle.change[place] == pytest.approx(1.0)
    with intervene(model, place, op=Mixup(1.0, keep=1.0)) as handle:
        answer(model, batch(name))
    assert handle.change == {place: 0.0}


# --- padding ----------------------------------------------------------------------------------------------------------


def padded(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    """Rows of different lengths as one batch; position ids count real tokens."""
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


ROWS = [torch.tensor([3, 4, 5, 6, 7]), torch.tensor([8, 9, 10]), torch.tensor([11, 12, 13, 14])]
SOURCES = [torch.tensor([13, 3, 2]), torch.tensor([4, 4, 5, 6, 7, 8]), torch.tensor([21, 22, 23, 24])]


@pytest.mark.parametrize("positions", [-1, 0, 2, [0, -1], slice(-2, None), slice(1, 3)], ids=str)
@pytest.mark.parametrize("sides", [("left", "left"), ("right", "right"), ("left", "right")], ids="-".join)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_padding_changes_no_answer(name, sides, positions):
    model, place = make(name), Location(1)
    base, source = padded(ROWS, sides[0]), padded(SOURCES, sides[1])
    together = interchange(model, base, source, place, positions=positions, record=Location(-1)).activations[
        Location(-1)
    ]
    for i, (row, other) in enumerate(zip(ROWS, SOURCES, strict=True)):
        alone = interchange(
            model, {"input_ids": row[None]}, {"input_ids": other[None]}, place, positions=positions, record=Location(-1)
        ).activations[Location(-1)]
        real = base["attention_mask"][i].bool()
        assert torch.allclose(together[i, real], alone[0], atol=1e-4), (i, (together[i, real] - alone[0]).abs().max())


def test_each_side_of_an_encoder_decoder_has_its_own_padding():
    model, inputs = make("t5"), batch("t5")
    inputs["attention_mask"][0, 3:] = 0
    inputs["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    for stack, lengths in (("encoder", (3, 5, 5)), ("decoder", (4, 2, 3))):
        place = Location(1, stack=stack)
        base = run(model, inputs).activations[place]
        done = interchange(model, inputs, None, {place: Zero()}, positions=-1, record=place).activations[place]
        changed = (done != base).any(-1)
        assert changed.nonzero().tolist() == [[i, length - 1] for i, length in enumerate(lengths)]


def test_a_mean_is_over_the_real_tokens_of_the_source():
    model, place, source = make("gpt2"), Location(1), padded(SOURCES, "right")
    states = run(model, source).activations[place]
    done = interchange(model, batch("gpt2"), source, {place: Mean()}, record=place).activations[place]
    real = states[source["attention_mask"].bool()]
    assert torch.allclose(done, real.mean(0).expand_as(done), atol=1e-5)
    last = interchange(model, batch("gpt2"), source, {place: Mean()}, positions=0, source_positions=-1, record=place)
    ends = torch.stack([states[0, 2], states[1, 5], states[2, 3]]).mean(0)
    assert torch.allclose(last.activations[place][:, 0], ends.expand(3, -1), atol=1e-5)
    part = interchange(model, batch("gpt2"), source, {Location(1, dims=[4]): Mean()}, record=place).activations[place]
    assert torch.allclose(part[..., 4], real.mean(0)[4].expand(3, 5), atol=1e-5)


def test_a_source_may_have_another_size_where_it_is_pooled():
    model, place = make("cnn"), Location(module="layer1")
    source = torch.randn(7, 3, 12, 12)
    done = interchange(model, batch("cnn"), source, {place: Mean()}, record=place).activations[place]
    expected = run(model, source).activations[place].mean((0, 2, 3))
    assert torch.allclose(done, expected[:, None, None].expand_as(done), atol=1e-5)


# --- what does not fit ------------------------------------------------------------------------------------------------


def refused(match: str, *, name: str = "gpt2", at: object = None, **options: object) -> None:
    inputs, source = options.pop("base", batch(name)), options.pop("source", batch(name, seed=2))
    source = None if isinstance(at, dict) else source
    with pytest.raises(InterventionError, match=match):
        interchange(make(name), inputs, source, Location(1) if at is None else at, **options)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (lambda base: base[:, :1], r"torch\.float32 \[3, 1, 16\] for torch\.float32 \[3, 5, 16\]"),
        (lambda base: base.double(), r"torch\.float64"),
        (lambda base: 0.0, r"returned float"),
        (lambda base: None, r"returned NoneType .* return a tensor like its first argument"),
    ],
)
def test_what_an_operator_returns_must_fit(value, got):
    refused(got, at={Location(1): lambda base, source, generator: value(base)})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(source=batch("gpt2", size=2)), r"shape \[3, 5, 16\] in the base run and \[2, 5, 16\] in the source run"),
        (dict(source=batch("gpt2", length=6)), r"\[3, 6, 16\] in the source run; pad both batches"),
        (dict(source=batch("gpt2", size=2), positions=0), r"base has 3 examples and the source of block_output\.1 2"),
        (
            dict(positions=[0, 1], source_positions=0),
            r"2 tokens of base row 0 and 1 of its source; give source_positions",
        ),
        (dict(source_positions=0), r"source_positions was given without positions"),
        (dict(positions=5), r"names no token in 3 of 3 examples .* count from the end with positions=-1"),
        (dict(positions=0, at=Location(module="2"), name="mlp"), r"module:2 has no positions: its shape is \[3, 8\]"),
        (dict(at=Location(1, dims=[3, 16])), r"names dim 16 and the width there is 16; write dims=range\(0, 16\)"),
        (
            dict(at={Location(1): Add(torch.zeros(5))}),
            r"Add holds a tensor of shape \[5\].* give one vector of shape \[16\]",
        ),
        (
            dict(at={Location(1): Noise(1.0, normal=torch.zeros(2, 5, 16))}),
            r"Noise holds a tensor of shape \[2, 5, 16\]",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(value),
)
def test_what_does_not_fit_raises(options, match):
    options = dict(options)
    if options.get("name") == "mlp":
        options |= dict(base=batch("mlp"), source=batch("mlp", seed=2))
    refused(match, **options)


def test_a_source_of_another_precision_raises():
    model, place = make("gpt2"), Location(module="transformer.h.1.attn.c_attn")
    with torch.autocast("cpu", torch.bfloat16):
        source = run(model, batch("gpt2"), place)
    with pytest.raises(
        InterventionError, match=r"float32 in the base run and torch\.bfloat16 in the source run; run both"
    ):
        interchange(model, batch("gpt2"), source, place)


def test_positions_need_a_mask_that_fits():
    model, inputs = make("gpt2"), batch("gpt2")
    inputs["attention_mask"] = torch.ones(3, 1, 5, 5)
    with pytest.raises(
        InterventionError, match=r"attention mask has shape \[3, 1, 5, 5\] .* positions cannot be counted"
    ):
        interchange(model, inputs, None, {Location(1): Zero()}, positions=0)


def test_padding_is_unknown_outside_of_a_call_of_the_model():
    model = make("gpt2")
    with (
        pytest.raises(InterventionError, match=r"ran outside a call of the model itself, so padding is unknown"),
        intervene(model, layer=1, op=Zero(), positions=0),
    ):
        model.transformer(**batch("gpt2"))
