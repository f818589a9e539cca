"""The vectors of selected tokens in the run of a batch, for what is computed over data sets."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from interventions.errors import InterventionError
from interventions.execution.run import Run
from interventions.locations import Location
from interventions.models.architectures import Architecture, architecture
from interventions.models.calls import arguments_of
from interventions.positions import Positions, select
from interventions.steps import window_of


@dataclass(frozen=True, eq=False)
class Vectors:
    """Vectors of one location, row by row.

    Attributes:
        values: `[n, dims]`, or `[n, head, dims]` at sites with heads.
        rows: the example of each, `[n]`, or its window where the model cuts examples into several.
        positions: its token, counted over the real tokens of the example, `[n]`; None at places without tokens.
        examples: the number of examples, or of their windows.
    """

    values: Shaped[Tensor, "n ..."]
    rows: Int[Tensor, " n"]
    positions: Int[Tensor, " n"] | None
    examples: int


def check_width(found: Architecture, locations: Iterable[Location], what: str) -> None:
    """Raise InterventionError for a location whose vectors are as wide as each batch is long.

    Args:
        found: the architecture of the model.
        locations: the locations.
        what: the end of "so it has no …".
    """
    pattern = next((at for at in locations if found.place(at).io in ("attention_scores", "attention_pattern")), None)
    if pattern is not None:
        raise InterventionError(
            f"{pattern} is as wide as each batch is long, so it has no {what}; use attention_heads."
        )


def vectors_of(done: Run, location: Location, positions: Positions) -> Vectors:
    """Return the vectors of the selected real tokens at a location of a run, in its order of examples and tokens.

    Args:
        done: a run that read the location.
        location: the location.
        positions: which tokens, as `interventions.select` takes them; None is all real ones.

    Raises:
        InterventionError: as `select`; or which tokens are real is not known.
    """
    place, vectors = architecture(done.model).place(location), done.vectors(location)
    if vectors.ndim < 3:
        return Vectors(vectors, torch.arange(len(vectors)), None, len(vectors))
    arguments = arguments_of(done.model, done.inputs)
    real = window_of(vectors, place, None, [arguments], slice(None) if positions is None else positions).real
    if positions is None:
        rows, columns = real.nonzero(as_tuple=True)
        values = vectors[real.to(vectors.device)]
    else:
        chosen = select(positions, real)
        rows, columns = chosen.rows, chosen.columns
        there = chosen.to(vectors.device)
        values = vectors[there.rows, there.columns]
    numbers = real.long().cumsum(1) - 1
    return Vectors(values, rows, numbers[rows, columns], len(vectors))
