"""The shapes of the vectors of a served teacher, found by a request for one sample and kept."""

from collections.abc import Callable
from typing import Any

import torch

from distill.teachers.cache import Cache, digest
from distill.teachers.model_inputs import inputs_from
from distill.teachers.padding import Padded
from interventions import Location, Run

SHAPES = "shapes"


def shape_of_one(
    location: Location, sample: Padded, cache: Cache, request: Callable[[Any], Run]
) -> tuple[tuple[int, ...], str | None]:
    """Return the shape of the vectors of one sample, and the column whose tokens are their positions, if any.

    Args:
        location: of the vectors.
        sample: a batch of one.
        cache: keeps what was found.
        request: runs the teacher on inputs, with the activations at the location.
    """
    inputs, names = inputs_from(sample.columns), list(sample.columns)
    key = f"{SHAPES}/{digest(location, inputs)}"
    kept = cache.get(key)
    if kept is None:
        shape = tuple(request(inputs).vectors(location).shape)
        tokens = sample.tokens_of(shape[1]) if len(shape) > 2 else None
        number = -1 if tokens is None else names.index(tokens)
        kept = cache.put(key, {"shape": torch.tensor(shape), "tokens": torch.tensor(number)})
    number = int(kept["tokens"])
    return tuple(kept["shape"].tolist()), None if number < 0 else names[number]
