"""Which blocks stand for each other: block for block, as stated, or those whose weights are alike."""

import copy

import pytest
import torch
from torch import nn

from distill import DistillError, from_layers
from distill.auditing.layers import layers_of
from interventions import Location
from tests.distill.tiny_models import bert, gpt2_lm, llama, mlp, spread, t5, vit


@pytest.mark.parametrize("make", [bert, vit, gpt2_lm, llama])
@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [1, 3], [0, 2, 3], [2]])
def test_the_kept_blocks_are_found(make, kept):
    model = spread(make())
    (found,) = layers_of(model, from_layers(model, kept))
    assert found.pairs == tuple((layer, i) for i, layer in enumerate(kept))
    assert found.depths == (4, len(kept))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_the_kept_blocks_of_a_quantized_model_are_found():
    model = spread(llama())
    student = from_layers(model, [0, 3])
    quantized = torch.ao.quantization.quantize_dynamic(student, {nn.Linear}, dtype=torch.qint8)
    (found,) = layers_of(model, quantized)
    assert found.pairs == ((0, 0), (3, 1))


def test_every_stack_has_its_own_blocks():
    model = spread(t5())
    found = layers_of(model, copy.deepcopy(model), {0: 0, 3: 2})
    assert [(each.stack, each.pairs) for each in found] == [
        ("encoder", ((0, 0), (1, 1), (2, 2))),
        ("decoder", ((0, 0), (3, 2))),
    ]
    stated = layers_of(model, model, {Location(1, stack="encoder"): Location(2, stack="encoder")})
    assert stated[0].pairs == ((1, 2),)
    assert layers_of(mlp(), mlp()) == ()


@pytest.mark.parametrize("mapping", [{0: 0, 2: 1}, {Location(0): "block_output.0", (Location(1), Location(2)): 1}])
def test_blocks_are_stated_in_several_ways(mapping):
    (found,) = layers_of(spread(bert()), spread(bert(2)), mapping)
    assert found.pairs == ((0, 0), (2, 1))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (None, r"4 blocks and the compressed model 2, whose weights are not those"),
        ("search", r"mapping='search' names no blocks"),
        ({}, r"mapping=\{\} names no blocks"),
        ([0, 1], r"mapping=.* names no blocks"),
        ({0: 0, 4: 1}, r"block 4 and the original has 4 \(0 to 3\)"),
        ({0: 0, 1: 2}, r"block 2 and the compressed model has 2"),
        ({0: 1, 1: 0}, r"names the blocks 1, 0 of the compressed model"),
        ({Location(0, "mlp_output"): 0}, r"is no block"),
        ({Location(0, stack="encoder"): 0}, r"names the stack 'encoder'"),
    ],
)
def test_mappings_that_are_none(mapping, message):
    with pytest.raises(DistillError, match=message) as error:
        layers_of(spread(bert()), spread(bert(2), seed=5), mapping)
    assert "\n" not in str(error.value)


def test_a_search_is_made_where_weights_are_not_alike_or_it_is_requested():
    model, other, made = spread(bert()), spread(bert(3), seed=5), []

    def search():
        made.append(1)
        return {(Location(0),): (Location(0),), (Location(2),): (Location(1),)}

    (found,) = layers_of(model, other, None, search)
    assert found.pairs == ((0, 0), (2, 1), (3, 2))  # the last blocks are left on both sides
    assert len(made) == 1
    layers_of(model, from_layers(model, [0, 2]), None, search)
    layers_of(model, spread(bert(), seed=5), None, search)
    assert len(made) == 1
    (found,) = layers_of(model, spread(bert(), seed=5), "search", search)
    assert found.pairs == ((0, 0), (2, 1), (3, 3))


def test_other_stacks():
    with pytest.raises(DistillError, match=r"the stacks 'encoder', 'decoder' and the compressed model ''"):
        layers_of(t5(), bert())
