"""Places that hold all that a network computes with: to swap these is to run the source, whatever they mean."""

import torch
from torch import nn

from distill.causal_models import CausalModel
from distill.errors import DistillError
from distill.mapping import Pair
from distill.metrics import evaluating
from distill.swaps import Ran, source_of, swapped
from distill.values import Values
from interventions import Location, Rotation, Run, run


def refuse_wholes(
    model: CausalModel, network: nn.Module, pairs: tuple[Pair, ...], base: Values, source: Values
) -> None:
    """Raise where a pair takes all of the network's state from the source.

    It does where a location names all of the vectors at a place, at every position, and the answers after the swap are
    those of the source.

    Raises:
        DistillError: for a variable that is not the output.
    """
    base, source = _padded_alike(model, base, source)
    with evaluating(network), torch.no_grad():
        there = run(network, model.encode(source), resumable=False)
        for pair in pairs:
            if pair.teacher == (model.output,) or any(tokens is not None for tokens in pair.positions):
                continue
            taken = source_of(model, network, source, (pair,))
            assert isinstance(taken.run, Run)
            whole = next((at for at in pair.student if _covers(taken.run, at)), None)
            if whole is None:
                continue
            after = swapped(model, network, pair, Ran(base, model.encode(base)), taken)
            if torch.allclose(after.logits, there.logits, rtol=1e-4, atol=1e-5):
                raise DistillError(
                    f"{'+'.join(pair.teacher)} is aligned with all of {whole}, and to swap that is to run the source; "
                    "give it a part: dims=…, heads=… or subspace=…, e.g. Location(1, dims=range(0, 16)), or a token: "
                    "positions=-1."
                )


def _padded_alike(model: CausalModel, base: Values, source: Values) -> tuple[Values, Values]:
    """Bases, each with a source of its padding: a mask reaches the output past every place."""
    inputs, others = model.encode(base), model.encode(source)
    mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
    if mask is None or not isinstance(others, dict) or others["attention_mask"].shape[1:] != mask.shape[1:]:
        return base, source
    alike = (mask[:, None] == others["attention_mask"]).flatten(2).all(2)
    rows = alike.any(1).nonzero()[:, 0]
    if not len(rows):
        return base, source
    taken = alike[rows].int().argmax(1)
    return {name: value[rows] for name, value in base.items()}, {name: value[taken] for name, value in source.items()}


def _covers(taken: Run, at: Location) -> bool:
    """Whether a location names all of the vectors at its place."""
    vectors = taken.vectors(at.whole)
    all_dims = at.dims is None or len(at.dims) == vectors.shape[-1]
    all_heads = at.heads is None or len(at.heads) == vectors.shape[-2]
    part = vectors.shape[-1] if at.dims is None else len(at.dims)
    spans = at.subspace is None or (isinstance(at.subspace, Rotation) and at.subspace.dims == part)
    return all_dims and all_heads and spans
