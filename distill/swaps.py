"""The interchange of a variable in a network: what a causal model's interchange is compared with."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from distill.causal_models import CausalModel
from distill.mapping import Pair
from distill.values import Values
from interventions import Location, Run, interchange, run_to


@dataclass(frozen=True, eq=False)
class Ran:
    """Values of a causal model, and what a network does with what they encode.

    Attributes:
        values: of the inputs, or of all variables.
        run: of the network, or what it is called with.
    """

    values: Values
    run: Run | object


def source_of(model: CausalModel, network: nn.Module, values: Values, pairs: tuple[Pair, ...]) -> Ran:
    """The network on these values, up to the last place of the pairs."""
    return Ran(values, run_to(network, model.encode(values), places_of(pairs)))


def places_of(pairs: tuple[Pair, ...]) -> list[Location]:
    """The places of the network, each once."""
    return list(dict.fromkeys(at for pair in pairs for at in pair.student))


def swapped(model: CausalModel, network: nn.Module, pair: Pair, base: Ran, source: Ran) -> Run:
    """The network on the base, with the places of a pair taken from the source."""
    return interchange(
        network,
        base.run,
        source.run,
        pair.student,
        positions=_tokens(model, pair, base.values),
        source_positions=_tokens(model, pair, source.values),
    )


def _tokens(model: CausalModel, pair: Pair, values: Values) -> dict[Location, Any] | None:
    if all(positions is None for positions in pair.positions):
        return None
    return {at: model.select(tokens, values) for at, tokens in zip(pair.student, pair.positions, strict=True)}
