"""Locations: one value, one text."""

import copy
import pickle
import random
from dataclasses import replace

import pytest

from interventions import SITES, InterventionError, Location, as_location
from interventions.locations import HEAD_SITES, IOS, MODEL_SITES

STEPS = {
    "range": range(64),
    "step": range(3, 20, 4),
    "single": [7],
    "list": [5, 1, 9],
    "falling": [9, 5, 1],
    "gap": [0, 1, 3],
}
PATHS = [
    "conv2",
    "layer2.0.conv1",
    "h@input",
    "h@output",
    "a]",
    "a[0]",
    "x[dims=0]",
    "with space",
    "ünï",
    "encoder/x",
    "m:o",
    "1",
    "@input",
    "-",
    "a\\b",
]


def any_location(draw: random.Random) -> Location:
    heads, dims = (draw.choice([None, *STEPS.values(), draw.sample(range(99), draw.randint(1, 6))]) for _ in range(2))
    if draw.random() < 0.4:
        io = draw.choice(IOS)
        return Location(module=draw.choice(PATHS), io=io, dims=dims, heads=heads if io in HEAD_SITES else None)
    stack = draw.choice([None, "encoder", "decoder", "text_model", "0", "vision.tower", "a b"])
    site = draw.choice(SITES)
    layer = None if site in MODEL_SITES else draw.randint(-40, 40)
    heads, stack = heads if site in HEAD_SITES else None, None if site == "logits" else stack
    return Location(layer, site, stack=stack, dims=dims, heads=heads)


@pytest.mark.parametrize("seed", range(20))
def test_a_hash_is_that_of_the_attributes_and_is_kept_beside_them(seed):
    draw = random.Random(seed)
    for _ in range(50):
        location = any_location(draw)
        before, state = dict(vars(location)), pickle.dumps(location)
        assert hash(location) == hash(location) == hash(tuple(before.values()))
        assert vars(location) == before
        assert pickle.dumps(location) == state  # as texts have another hash in another process
        for same in (copy.copy(location), copy.deepcopy(location), pickle.loads(state), replace(location)):
            assert {same: 1} == {location: 1}


@pytest.mark.parametrize("seed", range(20))
def test_the_text_gives_the_location_back(seed):
    draw = random.Random(seed)
    for _ in range(50):
        location = any_location(draw)
        assert Location.parse(str(location)) == location
        assert eval(repr(location)) == location
        assert as_location(str(location)) == as_location(location) == location


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("io", ["input", "output"])
def test_odd_paths_survive(path, io):
    for dims in (None, [1, 2, 9]):
        location = Location(module=path, io=io, dims=dims)
        assert Location.parse(str(location)) == location


def test_different_locations_have_different_texts():
    draw = random.Random(0)
    found = {any_location(draw) for _ in range(3000)}
    assert len({str(location) for location in found}) == len({repr(location) for location in found}) == len(found)


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("block_output.3", Location(3)),
        (" block_output.-1 ", Location(-1)),
        ("block_output.3[dims=0:64]", Location(3, dims=range(64))),
        ("block_output.3[dims=0:64:2]", Location(3, dims=slice(0, 64, 2))),
        ("encoder/block_input.3[dims=0,5]", Location(3, "block_input", dims=[0, 5], stack="encoder")),
        ("attention_heads.3[heads=2,5]", Location(3, "attention_heads", heads=[2, 5])),
        ("decoder/query.-1[heads=0:4;dims=7]", Location(-1, "query", heads=range(4), dims=7, stack="decoder")),
        ("module:a.b@attention_pattern[heads=1]", Location(module="a.b", io="attention_pattern", heads=1)),
        ("module:lstm@cell_state", Location(module="lstm", io="cell_state")),
        ("logits", Location(site="logits")),
        ("embedding", Location(site="embedding")),
        ("module:conv2", Location(module="conv2")),
        ("module:conv2@input[dims=3]", Location(module="conv2", io="input", dims=3)),
    ],
)
def test_texts(text, location):
    assert Location.parse(text) == location
    assert Location.parse(str(location)) == location


@pytest.mark.parametrize(
    "forms",
    [
        (range(3), [0, 1, 2], (0, 1, 2), slice(3), slice(0, 3), iter([0, 1, 2])),
        (range(1, 8, 3), [1, 4, 7], range(1, 9, 3), slice(1, 8, 3)),
        (5, [5], range(5, 6), slice(5, 6)),
        ([3, 1], (3, 1), range(3, 0, -2)),
    ],
    ids=["from 0", "in steps", "one", "falling"],
)
def test_equal_dims_are_one_location(forms):
    locations = {Location(2, dims=form) for form in forms}
    assert len(locations) == len({str(location) for location in locations}) == 1


def test_the_order_of_dims_matters():
    assert Location(2, dims=[1, 0]) != Location(2, dims=[0, 1])


@pytest.mark.parametrize("dims", [None, range(4), [4, 2]])
def test_locations_are_frozen_and_can_be_copied_and_sent(dims):
    location = Location(3, dims=dims, stack="encoder")
    assert pickle.loads(pickle.dumps(location)) == copy.deepcopy(location) == location
    with pytest.raises(AttributeError):
        location.layer = 4


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            dict(layer=3, site="mlp_out"),
            r"site 'mlp_out' does not exist: the sites are .* Any other place goes by path",
        ),
        (dict(layer=3, site="block_outptu"), r"did you mean 'block_output'\?"),
        (dict(layer=3, io="input"), r"io='input' goes with module=; for a block use site='block_input'"),
        (dict(layer=3, site="embedding"), r"has no layer, and layer=3 was given; write Location\(site='embedding'\)"),
        (dict(), r"names no layer; write Location\(3\)"),
        (dict(site="block_input"), r"names no layer"),
        (dict(module=""), r"module='' is not a module path"),
        (
            dict(module="conv", layer=3),
            r"goes without layer, site and stack; write Location\(module='conv'\) or Location\(3\)",
        ),
        (dict(module="conv", stack="encoder"), r"goes without layer, site and stack"),
        (dict(module="conv", site="embedding"), r"goes without layer, site and stack"),
        (
            dict(module="conv", io="both"),
            r"io='both' does not exist: a module has output, input, .*; did you mean io='",
        ),
        (
            dict(layer=3, heads=1),
            r"heads=1 was given and site 'block_output' has no heads; the sites with heads are query",
        ),
        (dict(module="a", heads=1), r"heads=1 was given and io='output' has no heads"),
        (dict(layer=3, site="query", heads=[0, 0]), r"heads=\[0, 0\] names an entry twice"),
        (dict(layer=3, site="query", io="query"), r"for a block use site='query'"),
        (dict(site="logits", stack="encoder"), r"logits are the answer of the whole model"),
        (dict(site="query"), r"names no layer; write Location\(3, 'query'\)"),
        (dict(layer=3, subspace=3), r"subspace=3 has no coordinates\(x\).* e\.g\. Rotation\(16\)"),
        (dict(layer=3, dims=[]), r"dims=\[\] selects nothing; leave dims out"),
        (dict(layer=3, dims=[-1]), r"dims=\[-1\] holds -1: dims count from 0"),
        (dict(layer=3, dims=[1, 1]), r"names an entry twice; name each once"),
        (dict(layer=3, dims=slice(4, None)), r"has no end; a location knows no model: write dims=range\(0, 64\)"),
    ],
    ids=str,
)
def test_fields_that_do_not_go_together_raise(fields, match):
    with pytest.raises(InterventionError, match=match):
        Location(**fields)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", r"is not a location: write block_output\.3"),
        ("block_output.x", r"is not a location"),
        ("block_output.3[dims=0:64", r"is not a location"),
        ("Location(3)", r"is not a location"),
        ("module:", r"is not a location"),
        ("block_output.3[heads=2]", r"heads=2 was given and site 'block_output' has no heads"),
        ("query.3[head=2]", r"\[head=2\] .* is not a selection; write \[dims=0:64\]"),
        ("query.3[heads=2;heads=3]", r"\[heads=3\] .* is not a selection"),
        ("block_output.3[dims=]", r"\[dims=\] .* is not a selection"),
        ("block_output.3[dims=a]", r"is not a selection"),
        ("block_output.3[dims=0:4:0]", r"is not a selection"),
        ("block_output.3[dims=4:4]", r"selects nothing"),
        ("block_outputs.3", r"did you mean 'block_output'"),
        ("block_output", r"names no layer"),
    ],
)
def test_bad_texts_raise(text, match):
    with pytest.raises(InterventionError, match=match):
        Location.parse(text)


ODD = [
    "a", "0", "a b", "x@output", "x@input", "y#z", "m[dims=1]", "q]", "(s)", "m(Rotation)", "é", "a/b", "module:", "=",
    "@", "#", "%", "%23", "100%", "[", "]", "x#relu_0@input", "head[heads=1]", " lead", "trail ", "\u2003", "new\nline",
    "a\tb", "\x00", "\u2028", "model", "1e5", "-1", "'q'", '"d"', "{", "\\",
]  # fmt: skip


@pytest.mark.parametrize("io", ["output", "input"])
@pytest.mark.parametrize("units", [{}, {"dims": (1, 2)}])
def test_every_name_that_a_module_can_have_comes_back(io, units):
    """torch allows any name without a dot."""
    for path in [*ODD, *(f"{one}.{other}" for one in ODD for other in ODD)]:
        for more in ({}, {"operation": "relu_0"}):
            location = Location(module=path, io=io, **units, **more)
            assert Location.parse(str(location)) == location
    for stack in ODD:
        if io == "output":
            location = Location(2, stack=stack, **units)
            assert Location.parse(str(location)) == location
