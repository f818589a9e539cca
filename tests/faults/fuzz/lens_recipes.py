"""Right calls of the logit lens and of its training."""

from typing import Any

import torch

import interventions as iv
from tests.faults.fuzz.attack import Recipe
from tests.faults.fuzz.interventions_recipes import decoder, ids

LABELS = torch.tensor([0, 1, 0, 1])


def lens() -> iv.TunedLens:
    """Return the lens of the decoder that changes nothing."""
    return iv.TunedLens(["block_input.0", "block_output.0", "block_output.1", "block_output.2"], 16)


def loaded(file: Any) -> iv.TunedLens:
    """Load a lens that was saved."""
    lens().save("lens.safetensors")
    return iv.TunedLens.load(file)


def probes() -> iv.Probes:
    """Return a probe of the decoder."""
    return iv.probe(decoder(), [ids(), ids(1)], "block_output.0", LABELS, held_out=0.25)


RECIPES = [
    Recipe(
        "interventions.logit_lens",
        iv.logit_lens,
        lambda: {"model": decoder(), "inputs": ids(), "lens": lens(), "stack": None, "tokenizer": None},
        {"model": "", "inputs": "whole tensor", "lens": "None", "stack": "None", "tokenizer": "None"},
        own=("model", "inputs"),
    ),
    Recipe(
        "interventions.fit_lens",
        iv.fit_lens,
        lambda: {
            "model": decoder(),
            "batches": [ids(), ids(1)],
            "steps": 1,
            "lr": 1e-3,
            "seed": 0,
            "batch_size": None,
            "stack": None,
        },
        {
            "model": "",
            "batches": "",
            "steps": "1|7|numpy int",
            "lr": "positive",
            "seed": "seed",
            "batch_size": "None|count|huge",
            "stack": "None",
        },
        own=("model", "batches"),
    ),
    Recipe(
        "interventions.probe",
        iv.probe,
        lambda: {
            "model": decoder(),
            "data": [ids(), ids(1)],
            "at": "block_output.0",
            "labels": LABELS,
            "positions": -1,
            "held_out": 0.25,
            "penalty": 1.0,
            "batch_size": None,
            "seed": 0,
        },
        {
            "model": "",
            "data": "",
            "at": "",
            "labels": "",
            "positions": "None|0|1|-1|numpy int",
            "held_out": "0.5",
            "penalty": "positive",
            "batch_size": "None|count|huge",
            "seed": "seed",
        },
        own=("model", "data"),
    ),
    Recipe(
        "interventions.Probes.logits",
        lambda at, vectors: probes().logits(at, vectors),
        lambda: {"at": "block_output.0", "vectors": torch.zeros(3, 16)},
        {"at": "", "vectors": ""},
    ),
    Recipe(
        "interventions.Probes.direction",
        lambda at, label: probes().direction(at, label),
        lambda: {"at": "block_output.0", "label": 1},
        {"at": "", "label": "0|1|numpy int"},
    ),
    Recipe(
        "interventions.Lens.plot",
        lambda example: iv.logit_lens(decoder(), ids()).plot(example),
        lambda: {"example": 0},
        {"example": "0|1|-1|numpy int"},
    ),
    Recipe(
        "interventions.TunedLens.save",
        lambda file: lens().save(file),
        lambda: {"file": "new"},
        {"file": "text|digits|path"},
    ),
    Recipe("interventions.TunedLens.load", loaded, lambda: {"file": "lens.safetensors"}, {"file": ""}),
]
