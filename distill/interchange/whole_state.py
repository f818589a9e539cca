"""Places that hold all that a network computes with: to swap these is to run the source, whatever they mean."""

from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor, nn

from distill.causal.model import CausalModel
from distill.causal.values import Values
from distill.errors import DistillError
from distill.interchange.mapping import Pair
from distill.interchange.swap import Ran, encoded, source_of, swapped
from distill.models.inputs import evaluating, mask_of
from interventions import InterventionError, Location, Run, architecture, run, select


def refuse_wholes(
    model: CausalModel, network: nn.Module, pairs: tuple[Pair, ...], base: Values, source: Values
) -> None:
    """Raise where a pair takes all of the network's state from the source.

    It does where its places hold all of the vectors somewhere, at every token, and the answers after the swap are
    those of the source, though those of the causal model are not.

    Raises:
        DistillError: for such a pair, and for a subspace or dims that do not fit their place.
    """
    base, source = _padded_alike(model, base, source)
    high, there_high = model.run(base), model.run(source)
    with evaluating(network), torch.no_grad():
        inputs = [encoded(model, network, values) for values in (base, source)]
        here, there = (run(network, each, resumable=False).logits for each in inputs)
        for pair in pairs:
            after = model.interchange(high, {pair.teacher: there_high})
            if torch.equal(after[model.output], there_high[model.output]):
                continue  # to run the source is right, as far as can be seen
            try:
                taken = source_of(model, network, source, (pair,))
                whole = _whole(model, taken, pair)
                if whole is None:
                    continue
                logits = swapped(model, network, pair, Ran(base, inputs[0]), taken).logits
            except InterventionError as error:
                raise DistillError(f"{'+'.join(pair.teacher)} cannot be interchanged: {error}") from error
            is_source = torch.allclose(logits, there, rtol=1e-4, atol=1e-5)
            if is_source and not torch.allclose(here, there, rtol=1e-4, atol=1e-5):
                raise DistillError(
                    f"{'+'.join(pair.teacher)} is aligned with all of {whole}, and to swap that is to run the source; "
                    f"give it a part: {_parts(taken, whole)}."
                )


def _parts(taken: Ran, whole: Location) -> str:
    """What could be swapped in place of everything, as code."""
    assert isinstance(taken.run, Run)
    vectors = taken.run.vectors(whole.whole)
    half = max(1, vectors.shape[-1] // 2)
    tokens = ", or a token: positions=-1" if vectors.ndim > 2 else ""
    return f"dims=range(0, {half}), subspace=Rotation({half}), or heads=… where there are some{tokens}"


def _padded_alike(model: CausalModel, base: Values, source: Values) -> tuple[Values, Values]:
    """Bases, each with a source of its padding: a mask reaches the output past every place."""
    mask, others = mask_of(model.encode(base)), mask_of(model.encode(source))
    if mask is None or others is None or others.shape[1:] != mask.shape[1:]:
        return base, source
    alike = (mask[:, None] == others).all(2)
    rows = alike.any(1).nonzero()[:, 0]
    if not len(rows):
        return base, source
    taken = alike[rows].int().argmax(1)
    return {name: value[rows] for name, value in base.items()}, {name: value[taken] for name, value in source.items()}


def _whole(model: CausalModel, taken: Ran, pair: Pair) -> Location | None:
    """The first place of a pair of which all is named, by it and the other places of the pair together."""
    assert isinstance(taken.run, Run)
    found = architecture(taken.run.model)
    for at, tokens in zip(pair.student, pair.positions, strict=True):
        here = found.place(at)
        beside = [
            other
            for other, others in zip(pair.student, pair.positions, strict=True)
            if (found.place(other).path, found.place(other).io) == (here.path, here.io) and str(others) == str(tokens)
        ]
        if _all_tokens(model, taken, at, tokens) and _all_entries(taken.run.vectors(at.whole), beside):
            return at
    return None


def _all_tokens(model: CausalModel, taken: Ran, at: Location, tokens: object) -> bool:
    """Whether the tokens named are all that there are."""
    assert isinstance(taken.run, Run)
    vectors, mask = taken.run.vectors(at.whole), mask_of(taken.run.inputs)
    if tokens is None or vectors.ndim < 3:
        return True
    whole = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
    real = mask.bool() if mask is not None and mask.shape == whole.shape else whole
    chosen = select(model.select(tokens, taken.values), real)
    return len(chosen.rows) == int(real.sum()) and vectors.shape[1] > 1


def _all_entries(vectors: Tensor, places: Iterable[Location]) -> bool:
    """Whether these places of one module are, together, all entries of its vectors."""
    left = torch.ones(vectors.shape[-2:] if vectors.ndim > 3 else vectors.shape[-1:], dtype=torch.bool)
    width = vectors.shape[-1]
    for at in places:
        heads = slice(None) if at.heads is None else list(at.heads)
        dims = torch.arange(width) if at.dims is None else torch.tensor(list(at.dims))
        if at.subspace is not None and not _spans(at.subspace, vectors[..., dims.to(vectors.device)]):
            continue
        chosen = torch.zeros_like(left)
        if left.ndim == 2:
            rows = torch.arange(left.shape[0])[heads]
            chosen[rows[:, None], dims[None]] = True
        else:
            chosen[dims] = True
        left &= ~chosen
    return not bool(left.any())


def _spans(subspace: nn.Module, vectors: Tensor) -> bool:
    """Whether what a subspace replaces is everything, in eval mode."""
    hard = deepcopy(subspace).eval()
    x = vectors.reshape(-1, vectors.shape[-1])
    there = x.flip(0)
    new = hard.replace(x, hard.coordinates(there))  # type: ignore[operator]
    return bool(torch.allclose(new, there, rtol=1e-3, atol=1e-4)) and not torch.allclose(x, there, rtol=1e-3, atol=1e-4)
