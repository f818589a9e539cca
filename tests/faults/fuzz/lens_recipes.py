"""Right calls of the logit lens and of its training."""

from typing import Any

import interventions as iv
from tests.faults.fuzz.attack import Recipe
from tests.faults.fuzz.interventions_recipes import decoder, ids


def lens() -> iv.TunedLens:
    """Return the lens of the decoder that changes nothing."""
    return iv.TunedLens(["block_input.0", "block_output.0", "block_output.1", "block_output.2"], 16)


def loaded(file: Any) -> iv.TunedLens:
    """Load a lens that was saved."""
    lens().save("lens.safetensors")
    return iv.TunedLens.load(file)


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
