"""The positions at which each pair of a measurement is interchanged, drawn from a seed and the pair's number alone.

The draw of a pair depends neither on the batch that it is measured in nor on the other pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distill.data.seeds import seed_from
from distill.data.uniform import uniform_of
from distill.errors import DistillError
from distill.interchange.positions import PositionRule

Masks = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class DrawnPositions:
    """The positions that are interchanged, of each base and source of a batch.

    Attributes:
        written: the positions of the base that are replaced, `[batch, position]`; None for all of them.
        read: the positions of the source that the values are taken from, `[batch, position]`; None for all of them.
        alike: for each pair, whether base and source have equally many real tokens, and those that are interchanged
            have the same numbers.
    """

    written: Bool[Tensor, "batch _"] | None
    read: Bool[Tensor, "batch _"] | None
    alike: Bool[Tensor, " batch"]

    @classmethod
    def every(cls, rows: int, device: torch.device) -> "DrawnPositions":
        """Return the choice of all positions."""
        return cls(None, None, torch.ones(rows, dtype=torch.bool, device=device))


MOST_DRAWN = 2**23
"""How many random numbers of a side are drawn beforehand at most; those of more pairs are drawn batch by batch."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """The random numbers of pairs, by how many each has.

    Attributes:
        pairs: the numbers of the pairs, in order.
        numbers: {how many of each base: `[pairs, 2, …]`}.
    """

    pairs: Int[Tensor, " pairs"]
    numbers: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PositionDraws:
    """The rule by which a measurement draws positions.

    Attributes:
        rule: which positions are eligible, and how many are drawn; None takes all of them.
        aligned: whether position i means the same in base and source.
        seed: decides the draws, with the numbers of the entry and of the pair.
        entry: the number of the entry in its mapping.
    """

    rule: PositionRule | None
    aligned: bool
    seed: int
    entry: int = 0
    _drawn: "Drawn | None" = field(default=None, compare=False, repr=False)

    def beforehand(self, pairs: Int[Tensor, " pairs"]) -> "PositionDraws":
        """Return the same rule, which draws the numbers of all these pairs together when the first is requested."""
        return replace(self, _drawn=Drawn(pairs.unique()))

    def _uniform(self, pairs: Int[Tensor, " batch"], width: int) -> Float[Tensor, "batch 2 width"]:
        """Return the random numbers of these pairs."""
        if self._drawn is None or len(self._drawn.pairs) * width > MOST_DRAWN:
            return self._drawn_now(pairs, width)
        if width not in self._drawn.numbers:
            self._drawn.numbers[width] = self._drawn_now(self._drawn.pairs, width)
        return self._drawn.numbers[width][torch.searchsorted(self._drawn.pairs, pairs)]

    def _drawn_now(self, pairs: Int[Tensor, " batch"], width: int) -> Float[Tensor, "batch 2 width"]:
        return uniform(width, [seed_from(self.seed, pair, self.entry) for pair in pairs.tolist()])

    def of(
        self, pairs: Int[Tensor, " batch"], sides: Sequence[Mapping[str, Tensor]], real: Sequence[Tensor]
    ) -> DrawnPositions:
        """Return the positions of these pairs.

        Args:
            pairs: their numbers.
            sides: the columns of the bases and of the sources.
            real: for bases and sources, which positions are no padding, `[batch, position]`.

        Raises:
            DistillError: all positions, of bases and sources of different lengths.
        """
        device = real[0].device
        if self.rule is None:
            if not torch.equal(*real):
                raise DistillError(
                    "positions=None interchanges every position, and the rows of the data differ in length; use "
                    "positions=Span(1.0) for all that base and source both have."
                )
            return DrawnPositions.every(len(pairs), device)
        base, source = (self.rule.eligible(columns, mask) for columns, mask in zip(sides, real, strict=True))
        width = self.rule.numbers(max(mask.shape[1] for mask in real))
        draws = self._uniform(pairs, width).to(device)
        written, read = self.rule.draw(base, source, draws, aligned=self.aligned)
        return DrawnPositions(written, read, _alike((real[0], written), (real[1], read)))


def uniform(width: int, seeds: Sequence[int]) -> Float[Tensor, "pairs 2 width"]:
    """Return uniform numbers from [0, 1) for base and source, of a seed for each pair.

    A greater width leaves the first ones as they are.
    """
    return uniform_of(seeds, 2 * width).unflatten(1, (width, 2)).transpose(1, 2).contiguous()


def _alike(base: Masks, source: Masks) -> Bool[Tensor, " batch"]:
    """Return for each example whether base and source have the same real tokens, by number, and the same chosen.

    Args:
        base, source: two masks each: of real positions, and of the chosen ones.
    """
    width = max(base[0].shape[1], source[0].shape[1])

    def by_number(real: Tensor, chosen: Tensor) -> Tensor:
        order = torch.argsort((~real).int(), dim=1, stable=True)
        found = torch.stack([real.gather(1, order), chosen.gather(1, order)])
        return nn.functional.pad(found, (0, width - real.shape[1]))

    return (by_number(*base) == by_number(*source)).all(2).all(0)
