"""The refusal of alignments with the whole state of a network.

If the places of a variable hold everything that the rest of the network reads, then to swap them is to run the source,
whatever the places represent: such an alignment is no evidence for a causal model.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn

from distill.causal.model import CausalModel
from distill.causal.values import Values
from distill.errors import DistillError
from distill.interchange.mapping import Entry
from distill.interchange.swap import Ran, encoded, places_of, swapped
from distill.models.inputs import evaluating, mask_of
from interventions import InterventionError, Location, Run, architecture, run, select


def refuse_wholes(
    model: CausalModel, network: nn.Module, entries: tuple[Entry, ...], base: Values, source: Values
) -> None:
    """Raise DistillError if an entry takes the whole state of the network from the source.

    An entry does so if its places hold all dims of the vectors of a module, at every token, and the answers after the
    swap are those to the source, although the causal model answers otherwise.

    Args:
        model: the causal model.
        network: the network.
        entries: the entries of the mapping.
        base, source: inputs of the causal model, one source a base.

    Raises:
        DistillError: such an entry, or a subspace or dims that do not fit their place.
    """
    base, source = _pad_alike(model, base, source)
    entries = _distinguished(model, entries, base, source)
    if not entries:
        return
    with evaluating(network), torch.no_grad():
        inputs = [encoded(model, network, values) for values in (base, source)]
        before = run(network, inputs[0], resumable=False).logits
        ran = _source_run(network, inputs[1], entries)
        taken, there = Ran(source, ran), ran.logits
        for entry in entries:
            with _naming(entry):
                whole = _covered_place(model, taken, entry)
                if whole is None:
                    continue
                logits = swapped(model, network, entry, Ran(base, inputs[0]), taken).logits
            is_source = torch.allclose(logits, there, rtol=1e-4, atol=1e-5)
            if is_source and not torch.allclose(before, there, rtol=1e-4, atol=1e-5):
                raise DistillError(
                    f"{'+'.join(entry.teacher)} is aligned with all of {whole}, and to swap that is to run the source; "
                    f"give it a part: {_suggest_part(taken, whole)}."
                )


def _distinguished(model: CausalModel, entries: tuple[Entry, ...], base: Values, source: Values) -> tuple[Entry, ...]:
    """Return the entries after whose interchange the causal model answers otherwise than to the sources."""
    high, there = model.run(base), model.run(source)
    apart = {}
    for variables in dict.fromkeys(entry.teacher for entry in entries):
        after = model.interchange(high, {variables: there})
        apart[variables] = not torch.equal(after[model.output], there[model.output])
    return tuple(entry for entry in entries if apart[entry.teacher])


def _source_run(network: nn.Module, inputs: object, entries: tuple[Entry, ...]) -> Run:
    """Return one run on the sources that has the places of all entries.

    Raises:
        DistillError: a place that does not run; it names the entry.
    """
    try:
        return run(network, inputs, places_of(entries), resumable=False)
    except InterventionError:
        for entry in entries:
            with _naming(entry):
                run(network, inputs, places_of((entry,)), resumable=False)
        raise


@contextmanager
def _naming(entry: Entry) -> Iterator[None]:
    """Let errors of interventions inside the block name the variables of an entry."""
    try:
        yield
    except InterventionError as error:
        raise DistillError(f"{'+'.join(entry.teacher)} cannot be interchanged: {error}") from error


def _suggest_part(taken: Ran, whole: Location) -> str:
    """Return code for what could be swapped instead of everything."""
    assert isinstance(taken.run, Run)
    vectors = taken.run.vectors(whole.whole)
    half = max(1, vectors.shape[-1] // 2)
    tokens = ", or a token: positions=-1" if vectors.ndim > 2 else ""
    return f"dims=range(0, {half}), subspace=Rotation({half}), or heads=… where there are some{tokens}"


def _pad_alike(model: CausalModel, base: Values, source: Values) -> tuple[Values, Values]:
    """Return the bases with sources that have the same padding, as the mask influences the output past every place."""
    mask, others = mask_of(model.encode(base)), mask_of(model.encode(source))
    if mask is None or others is None or others.shape[1:] != mask.shape[1:]:
        return base, source
    alike = (mask[:, None] == others).all(2)
    rows = alike.any(1).nonzero()[:, 0]
    if not len(rows):
        return base, source
    taken = alike[rows].int().argmax(1)
    return {name: value[rows] for name, value in base.items()}, {name: value[taken] for name, value in source.items()}


def _covered_place(model: CausalModel, taken: Ran, entry: Entry) -> Location | None:
    """Return the first place whose module is covered by the places of an entry together, None if there is none."""
    assert isinstance(taken.run, Run)
    found = architecture(taken.run.model)
    for at, tokens in zip(entry.student, entry.positions, strict=True):
        here = found.place(at)
        beside = [
            other
            for other, others in zip(entry.student, entry.positions, strict=True)
            if (found.place(other).path, found.place(other).io) == (here.path, here.io) and str(others) == str(tokens)
        ]
        if _covers_tokens(model, taken, at, tokens) and _covers_entries(taken.run.vectors(at.whole), beside):
            return at
    return None


def _covers_tokens(model: CausalModel, taken: Ran, at: Location, tokens: object) -> bool:
    """Return whether the chosen tokens are all real tokens of all rows, where rows have more than one token."""
    assert isinstance(taken.run, Run)
    vectors, mask = taken.run.vectors(at.whole), mask_of(taken.run.inputs)
    if tokens is None or vectors.ndim < 3:
        return True
    whole = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
    real = mask.bool() if mask is not None and mask.shape == whole.shape else whole
    chosen = select(model.select(tokens, taken.values), real)
    return len(chosen.rows) == int(real.sum()) and vectors.shape[1] > 1


def _covers_entries(vectors: Tensor, places: Iterable[Location]) -> bool:
    """Return whether these places of one module cover all entries of its vectors together."""
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
    """Return whether a replacement in a subspace replaces the whole vector, in eval mode."""
    hard = deepcopy(subspace).eval()
    x = vectors.reshape(-1, vectors.shape[-1])
    there = x.flip(0)
    new = hard.replace(x, hard.coordinates(there))  # type: ignore[operator]
    return bool(torch.allclose(new, there, rtol=1e-3, atol=1e-4)) and not torch.allclose(x, there, rtol=1e-3, atol=1e-4)
