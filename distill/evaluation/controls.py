"""What an interchange accuracy must be compared with: the same measurement where nothing was learned."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import DistillError
from distill.interchange.mapping import Pair
from interventions import Location, Mask, Rotation, Run

ANOTHER = 1_000_003  # added to a seed, so that no one compares a new network with itself
CONTROLS = ("subspace", "labels", "network")


def controls_of(asked: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names of the controls that are asked for; `"all"` stands for all three."""
    names = CONTROLS if asked == "all" else (asked,) if isinstance(asked, str) else tuple(asked or ())
    unknown = next((name for name in names if name not in CONTROLS), None)
    if unknown is not None:
        raise DistillError(f"there is no control {unknown!r}; controls are {', '.join(CONTROLS)}, or controls='all'.")
    return names


def random_parts(pairs: tuple[Pair, ...], ran: Run, seed: int) -> tuple[Pair, ...] | None:
    """The same pairs with parts of the same size, drawn at random: other dims, heads or directions.

    Args:
        pairs: the entries of a mapping.
        ran: a run of the network, which tells the widths.
        seed: of what is drawn.

    Returns:
        None where a place is no part of anything.
    """
    generator = torch.Generator().manual_seed(seed)
    if any(at == at.whole for pair in pairs for at in pair.student):
        return None
    return tuple(replace(pair, student=tuple(_redrawn(at, ran, generator) for at in pair.student)) for pair in pairs)


def _redrawn(at: Location, ran: Run, generator: torch.Generator) -> Location:
    """A random part of the same size at the same place."""
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
    """A subspace of as many directions (of as many coordinates, for a mask), drawn at random."""
    seed = int(torch.randint(2**31, (), generator=generator))
    if isinstance(subspace, Mask) and not isinstance(subspace.within, Rotation):
        mask = deepcopy(subspace).eval()
        with torch.no_grad():
            mask.logits.copy_(mask.logits[torch.randperm(len(mask.logits), generator=generator).to(mask.logits.device)])
        return mask
    width = vectors.shape[-1]
    return Rotation(max(1, min(width, _size(subspace, vectors))), width, seed=seed).to(vectors.device)


def _size(subspace: Any, vectors: Tensor) -> int:
    """How many directions a subspace replaces."""
    with torch.no_grad():
        coordinates = subspace.coordinates(vectors.reshape(-1, vectors.shape[-1])[:1])
    return int(subspace.chosen.sum()) if hasattr(subspace, "chosen") else coordinates.shape[-1]
