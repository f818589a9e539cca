"""What a subspace takes from the vectors at its place before it is trained: its width, and the directions of a PCA."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.causal.feed import Feed
from distill.causal.model import CausalModel
from distill.data.rows import Rows
from distill.errors import DistillError
from distill.interchange.mapping import Entry
from distill.interchange.swap import encoded, places_of
from distill.models.inputs import device_of, evaluating, inputs_of, mask_of, to_device
from interventions import PCA, InterventionError, Location, intervene, run

FITTED_ON = 2048  # examples whose activations a PCA is fitted on


def fit_to_examples(feed: Feed, network: nn.Module, entries: tuple[Entry, ...]) -> bool:
    """Set the widths of subspaces, and fit PCAs, on examples of a causal model; return whether a PCA was fitted."""
    few = to_device(feed.batch(range(min(16, len(feed)))), device_of(network))
    fitted = [_fit_subspace(feed, network, entry, at, few) for entry in entries for at in entry.student]
    return any(fitted)


def fit_to_rows(rows: Rows, network: nn.Module, entries: tuple[Entry, ...]) -> bool:
    """Set the widths of subspaces, and fit PCAs, on rows of data; return whether a PCA was fitted."""
    batch = to_device(rows.batch(range(min(64, len(rows)))), device_of(network))
    fitted = False
    for at in (at for at in places_of(entries) if at.subspace is not None):
        subspace: Any = at.subspace
        with torch.no_grad():
            vectors = run(network, inputs_of(network, batch)).vectors(replace(at, subspace=None))
        mask = mask_of(batch)
        flat = vectors[mask.bool()] if mask is not None and mask.shape == vectors.shape[:2] else vectors
        try:
            for each in subspace.modules():
                if isinstance(each, PCA) and not each.fitted:
                    each.fit_to(flat.reshape(-1, flat.shape[-1]))
                    fitted = True
            with torch.no_grad():
                subspace.to(flat.device).coordinates(flat.reshape(-1, flat.shape[-1])[:1])
        except InterventionError as error:
            raise DistillError(f"the subspace of {at} does not fit: {error}") from error
    return fitted


def _fit_subspace(feed: Feed, network: nn.Module, entry: Entry, at: Location, few: Mapping[str, Tensor]) -> bool:
    """Set the width of one subspace, and fit its PCAs; return whether a PCA was fitted.

    Args:
        feed: makes the examples that a PCA is fitted on.
        network: holds the place.
        entry: the entry of the mapping.
        at: the place, one of the entry's.
        few: a few examples, on which the width is read.
    """
    subspace: Any = at.subspace
    if subspace is None:
        return False
    fits = [each for each in subspace.modules() if isinstance(each, PCA) and not each.fitted]
    device = next(iter(few.values())).device
    values = feed.sources(FITTED_ON, torch.Generator().manual_seed(0), device) if fits else few
    vectors = vectors_at(feed.model, network, entry, at, values)
    try:
        for each in fits:
            each.fit_to(vectors)
        subspace.to(vectors.device)
        with torch.no_grad():
            subspace.coordinates(vectors[:1])
    except InterventionError as error:
        raise DistillError(f"{'+'.join(entry.teacher)} does not fit at {at}: {error}") from error
    return bool(fits)


def vectors_at(
    model: CausalModel, network: nn.Module, entry: Entry, at: Location, values: Mapping[str, Tensor]
) -> Tensor:
    """Return the vectors that the subspace of a place would read, `[n, width]`: those of all examples and tokens.

    Args:
        model: encodes the examples and names the tokens.
        network: runs on them.
        entry: the entry of the mapping, which has the tokens of each of its places.
        at: the place.
        values: of the input variables, a row for each example. Padding is left out where the entry names no tokens.
    """
    kept: list[Tensor] = []
    tokens = model.select(entry.positions[entry.student.index(at)], values)
    call: Callable[..., Any] = network
    inputs = encoded(model, network, values)
    mask = mask_of(inputs) if tokens is None else None

    def keep(base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        real = base if mask is None or mask.shape != base.shape[:2] else base[mask.bool()]
        kept.append(real.reshape(-1, base.shape[-1]))
        return base

    with (
        evaluating(network),
        torch.no_grad(),
        intervene(network, replace(at, subspace=None), op=keep, positions=tokens),
    ):
        call(**inputs) if isinstance(inputs, dict) else call(inputs)
    return torch.cat(kept)
