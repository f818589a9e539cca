"""Controls of an interchange accuracy: the same measurement where nothing was learned, to compare the figure with.

`subspace` takes random parts of the same size in the student, `labels` gives the teacher the sources of other entries,
`network` takes a student with new weights. An alignment or a student that computes as the teacher does is above all
three.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import DistillError
from distill.interchange.mapping import Entry
from interventions import Location, Mask, Rotation, Run

ANOTHER = 1_000_003  # added to a seed, so that no one compares a new network with itself
CONTROLS = ("subspace", "labels", "network")


def controls_of(requested: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the requested controls; `"all"` stands for all three.

    Raises:
        DistillError: a control that does not exist.
    """
    names = CONTROLS if requested == "all" else (requested,) if isinstance(requested, str) else tuple(requested or ())
    unknown = next((name for name in names if name not in CONTROLS), None)
    if unknown is not None:
        raise DistillError(f"there is no control {unknown!r}; controls are {', '.join(CONTROLS)}, or controls='all'.")
    return names


def random_parts(entries: tuple[Entry, ...], ran: Run, seed: int) -> tuple[Entry, ...] | None:
    """Return the same entries with random parts of the same size in the student: other dims, heads or directions.

    Args:
        entries: the entries of a mapping.
        ran: a run of the student, recorded at its locations, whose activations have the widths.
        seed: of the draws.

    Returns:
        The entries; None where a location of the student is whole, so that there is no part to draw.
    """
    generator = torch.Generator().manual_seed(seed)
    if any(at == at.whole for entry in entries for at in entry.student):
        return None
    redrawn = [tuple(_redraw(at, ran, generator) for at in entry.student) for entry in entries]
    return tuple(replace(entry, student=places) for entry, places in zip(entries, redrawn, strict=True))


def _redraw(at: Location, ran: Run, generator: torch.Generator) -> Location:
    """Return the same location with a random part of the same size."""
    vectors = ran.vectors(at.whole)
    if at.subspace is not None:
        width = vectors.shape[-1] if at.dims is None else len(at.dims)
        return replace(at, subspace=_random_subspace(at.subspace, vectors[..., :width], generator))
    changed: dict[str, Any] = {}
    for name, axis in (("heads", -2), ("dims", -1)):
        if getattr(at, name) is not None:
            order = torch.randperm(vectors.shape[axis], generator=generator)
            changed[name] = tuple(sorted(order[: len(getattr(at, name))].tolist()))
    return replace(at, **changed)


def _random_subspace(subspace: Any, vectors: Tensor, generator: torch.Generator) -> nn.Module:
    """Return a random subspace of as many directions; for a mask, the mask with its coordinates shuffled."""
    seed = int(torch.randint(2**31, (), generator=generator))
    if isinstance(subspace, Mask) and not isinstance(subspace.within, Rotation):
        mask = deepcopy(subspace).eval()
        with torch.no_grad():
            mask.logits.copy_(mask.logits[torch.randperm(len(mask.logits), generator=generator).to(mask.logits.device)])
        return mask
    width = vectors.shape[-1]
    return Rotation(max(1, min(width, _size(subspace, vectors))), width, seed=seed).to(vectors.device)


def _size(subspace: Any, vectors: Tensor) -> int:
    """Return the number of directions that a subspace replaces."""
    with torch.no_grad():
        coordinates = subspace.coordinates(vectors.reshape(-1, vectors.shape[-1])[:1])
    return int(subspace.chosen.sum()) if hasattr(subspace, "chosen") else coordinates.shape[-1]
