"""Right calls of directions, of what is written into weights, and of attention knockout."""

from typing import Any

import torch

import interventions as iv
from interventions import Location
from tests.faults.fuzz.attack import Recipe
from tests.faults.fuzz.interventions_recipes import BLOCK, PLACE, POSITIONS, decoder, ids, network, x


def found() -> iv.Direction:
    """Return a direction of the decoder."""
    return iv.direction(decoder(), [ids()], [ids(1)], BLOCK)


def without(model: Any, along: Any) -> Any:
    """Run a decoder without a direction."""
    with iv.ablate_direction(model, along):
        return model(**ids()).logits


def cut(model: Any, **given: Any) -> Any:
    """Run a decoder without some attention edges."""
    with iv.knockout(model, **given):
        return model(**ids()).logits


def cut_by(**given: Any) -> Any:
    """Run a decoder with the operator that cuts edges."""
    with iv.intervene(decoder(), Location(1, "attention_scores"), op=iv.Knockout(**given)):
        return decoder()(**ids()).logits


def drawn(**given: Any) -> Any:
    """Draw an attention pattern."""
    return iv.attention_map(iv.run(decoder(), ids()), **given)


RECIPES = [
    Recipe(
        "interventions.direction",
        iv.direction,
        lambda: {
            "model": decoder(),
            "positive": [ids()],
            "negative": [ids(1)],
            "at": BLOCK,
            "positions": -1,
            "method": "mean",
            "batch_size": None,
        },
        {
            "model": "",
            "positive": "",
            "negative": "",
            "at": "",
            "positions": POSITIONS,
            "method": "",
            "batch_size": "None|count|huge",
        },
        own=("model", "positive", "negative"),
    ),
    Recipe(
        "interventions.Direction.add",
        lambda scale: found().add(scale),
        lambda: {"scale": 1.0},
        {"scale": "number|scalar tensor"},
    ),
    Recipe(
        "interventions.Direction.clamp", lambda value: found().clamp(value), lambda: {"value": 1.0}, {"value": "number"}
    ),
    Recipe(
        "interventions.everywhere",
        iv.everywhere,
        lambda: {"model": decoder(), "along": found()},
        {"model": "", "along": ""},
    ),
    Recipe(
        "interventions.ablate_direction",
        without,
        lambda: {"model": decoder(), "along": found()},
        {"model": "", "along": ""},
    ),
    Recipe(
        "interventions.bake",
        iv.bake,
        lambda: {"model": network(), "interventions": {PLACE: iv.Add(torch.ones(4))}, "inputs": x()},
        {"model": "", "interventions": "", "inputs": "floats|sparse tensor"},
        own=("model", "inputs"),
    ),
    Recipe(
        "interventions.knockout",
        cut,
        lambda: {"model": decoder(), "queries": -1, "keys": [1], "layers": None, "heads": None, "stack": None},
        {
            "model": "",
            "queries": POSITIONS,
            "keys": POSITIONS,
            "layers": "None|0|1|-1|numpy int|[1]|{1: None}|set|generator",
            "heads": "None|0|1|numpy int|[1]",
            "stack": "None",
        },
        own=("model",),
    ),
    Recipe(
        "interventions.Knockout",
        cut_by,
        lambda: {"queries": -1, "keys": [1]},
        {"queries": POSITIONS, "keys": POSITIONS},
    ),
    Recipe(
        "interventions.attention_map",
        drawn,
        lambda: {"layer": 1, "head": 0, "example": 0, "tokens": None, "stack": None},
        {
            "layer": "0|1|-1|numpy int",
            "head": "0|1|numpy int",
            "example": "0|1|-1|numpy int",
            "tokens": "None",
            "stack": "None",
        },
    ),
]
