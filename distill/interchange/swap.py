"""The interchange in a network that corresponds to the interchange of a variable in a causal model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distill.causal.model import CausalModel
from distill.causal.values import Values
from distill.errors import DistillError
from distill.interchange.mapping import Entry
from distill.models.inputs import in_dtype_of, mask_of
from interventions import Location, Run, interchange, run_to


@dataclass(frozen=True, eq=False)
class Ran:
    """Values of a causal model, and the run of a network on the inputs that they encode.

    Attributes:
        values: those of the inputs, or of all variables.
        run: the run of the network, or the inputs to call it with.
    """

    values: Values
    run: Run | object


def encoded(model: CausalModel, network: nn.Module, values: Values) -> Any:
    """Return the inputs of a network that these values encode, floating-point ones in the dtype of its weights."""
    return in_dtype_of(network, model.encode(values))


def source_of(
    model: CausalModel, network: nn.Module, values: Values, entries: tuple[Entry, ...], *, resumable: bool = False
) -> Ran:
    """Return the run of the network on these values up to the last place of the entries: a source for all of them.

    Args:
        model: the causal model, which encodes the values.
        network: the network.
        values: those of the inputs, or of all variables.
        entries: of the mapping.
        resumable: True makes it a base for all of them too.
    """
    return Ran(values, run_to(network, encoded(model, network, values), places_of(entries), resumable=resumable))


def places_of(entries: tuple[Entry, ...]) -> list[Location]:
    """Return the places of the network that entries name, each once."""
    return list(dict.fromkeys(at for entry in entries for at in entry.student))


def swapped(model: CausalModel, network: nn.Module, entry: Entry, base: Ran, source: Ran) -> Run:
    """Return the counterfactual run: the network on the base, with the places of an entry taken from the source.

    Raises:
        DistillError: a place at every token, with base and source of different lengths.
    """
    if any(tokens is None for tokens in entry.positions):
        _refuse_ragged(model, entry, base, source)
    return interchange(
        network,
        base.run,
        source.run,
        entry.student,
        positions=_tokens(model, entry, base.values),
        source_positions=_tokens(model, entry, source.values),
    )


def _refuse_ragged(model: CausalModel, entry: Entry, base: Ran, source: Ran) -> None:
    """Raise DistillError if tokens of one row would be swapped with padding of the other."""
    assert isinstance(source.run, Run)
    masks = [mask_of(each.run.inputs if isinstance(each.run, Run) else each.run) for each in (base, source)]
    if masks[0] is None or masks[1] is None or torch.equal(masks[0], masks[1]):
        return
    for at, tokens in zip(entry.student, entry.positions, strict=True):
        if tokens is None and source.run.vectors(at.whole).shape[:2] == masks[1].shape:
            raise DistillError(
                f"{'+'.join(entry.teacher)} at {at} is taken from every token, and bases and sources differ in length; "
                f"say which: positions=-1, a name ({', '.join(model.positions) or 'CausalModel(…, positions={…})'}), "
                "or a function of the inputs."
            )


def _tokens(model: CausalModel, entry: Entry, values: Values) -> dict[Location, Any] | None:
    if all(positions is None for positions in entry.positions):
        return None
    return {at: model.select(tokens, values) for at, tokens in zip(entry.student, entry.positions, strict=True)}
