"""How surely a mean over pairs is known, where pairs share rows, and rows share what they are made of.

Two pairs with one base, one source, or one image in them say less than two pairs that have nothing in common. With
y_i the value of pair i, and s_ij^k how many things of kind k the pairs i and j share (the row of the base, the row of
the source, a cluster of rows such as an image, …), the values are thought of as sums of effects of these things:

    cov(y_i, y_j) = Σ_k γ_k s_ij^k,    var(mean) = (Σ_i var(y_i) + Σ_{i≠j} Σ_k γ_k s_ij^k) / n².

The γ_k are estimated by the method of moments: the products of residuals e_i e_j are regressed on the s_ij^k, with an
intercept that takes up what centering the residuals subtracts from every product. A γ_k below 0 is taken for 0.

Counting every product of pairs that share anything (Aronow, Samii, Assenova 2015, arXiv:1312.3398; Cameron, Gelbach,
Miller 2011, doi:10.1198/jbes.2010.07136) is the same with one γ for each pair of pairs; where nearly all pairs share
something, as with four images of forty in each row, these products sum to nearly 0, and the interval with them.
"""

from dataclasses import dataclass
from functools import cached_property
from math import inf

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.errors import DistillError, checked

BLOCK = 512  # pairs whose sharing with all others is looked at together


@checked
@dataclass(frozen=True, eq=False)
class Sharing:
    """What pairs of a base and a source have in common.

    Attributes:
        base, source: the number of the row of each, or of what else stands for it; a row has one number in both.
        base_clusters, source_clusters: what these rows are made of or come from, numbered from 0; −1 fills up.
            None where rows share nothing.
    """

    base: Int[Tensor, " pairs"]
    source: Int[Tensor, " pairs"]
    base_clusters: Int[Tensor, "pairs memberships"] | None = None
    source_clusters: Int[Tensor, "pairs memberships"] | None = None

    def __post_init__(self) -> None:
        if len(self.base) != len(self.source) or len(self.base) < 1:
            raise DistillError(
                f"Sharing(base, source) has {len(self.base)} bases and {len(self.source)} sources; give one of each to "
                "every pair, and at least one pair."
            )

    def __len__(self) -> int:
        return len(self.base)

    @property
    def independent(self) -> int:
        """The number of things that vary on their own: the fewest of bases, of sources, and of clusters of either."""
        parts = [self.base, self.source]
        parts += [each for each in (self.base_clusters, self.source_clusters) if each is not None]
        return min(int(part[part >= 0].unique().numel()) for part in parts)

    def variance(self, influence: Float[Tensor, " pairs"]) -> float:
        """Return the variance of a sum over pairs, Σ influence, where pairs are drawn as these were.

        Args:
            influence: what each pair adds to the deviation of a figure from its expectation, e.g. (y − mean) / n for a
                mean; for a ratio Σa / Σb, (a − ratio · b) / Σb. Its sum is 0.
        """
        n = len(self)
        if n < 2:
            return inf
        values = influence.double()
        squares = float((values * values).sum())
        products = [float(values.sum()) ** 2 - squares, *self._products(values)]
        shared = self._moments[0, 1:]
        kinds = [k for k in range(len(shared)) if shared[k] > 0]
        covered = 0.0
        while kinds:
            chosen = [0, *(k + 1 for k in kinds)]
            target = torch.tensor([products[k] for k in chosen], dtype=torch.float64)
            moments = self._moments[chosen][:, chosen]
            found = torch.linalg.lstsq(moments, target[:, None], driver="gelsd").solution[1:, 0]
            lowest = int(found.argmin())
            if found[lowest] >= 0:
                covered = float(found @ shared[kinds])
                break
            kinds.pop(lowest)
        # Residuals are smaller than deviations from the expectation: e² falls short by the variance of the mean.
        return (squares + covered) * n / (n - 1)

    @property
    def _roles(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of columns `[pairs, memberships]`: pairs share what is in the first of one and the second of other."""
        rows = (self.base[:, None], self.source[:, None])
        roles = [(rows[0], rows[0]), (rows[1], rows[1]), rows]
        if self.base_clusters is not None and self.source_clusters is not None:
            made = (self.base_clusters, self.source_clusters)
            roles += [(made[0], made[0]), (made[1], made[1]), made]
        return roles

    def _products(self, values: Float[Tensor, " pairs"]) -> list[float]:
        """Return Σ over i ≠ j of s_ij e_i e_j for each kind of sharing, without making s."""
        found = []
        for one, other in self._roles:
            size = int(torch.maximum(one.max(), other.max())) + 1
            sums = [_summed(column, values, size) for column in (one, other)]
            itself = float((_shared(one, other).double() * values * values).sum())
            both = 1.0 if one is other else 2.0
            found.append(both * (float(sums[0] @ sums[1]) - itself))
        return found

    @cached_property
    def _moments(self) -> Float[Tensor, "kinds kinds"]:
        """Σ over i ≠ j of s_ij^k s_ij^l, with 1 for kind 0."""
        roles, n = self._roles, len(self)
        total = torch.zeros(len(roles) + 1, len(roles) + 1, dtype=torch.float64)
        for start in range(0, n, BLOCK):
            rows = slice(start, start + BLOCK)
            counts = torch.stack([torch.ones(len(self.base[rows]), n), *(_crossed(*role, rows) for role in roles)])
            for i in range(counts.shape[1]):
                counts[:, i, start + i] = 0.0
            flat = counts.flatten(1)
            total += (flat @ flat.T).double()
        return total


def _crossed(one: Tensor, other: Tensor, rows: slice) -> Float[Tensor, "block pairs"]:
    """Return how many things each pair of a block shares with every pair, in either direction."""

    def count(first: Tensor, second: Tensor) -> Tensor:
        found = torch.zeros(len(first[rows]), len(second))
        for mine in first[rows].T:
            for its in second.T:
                found += (mine[:, None] == its[None]) & (mine[:, None] >= 0)
        return found

    return count(one, other) if one is other else count(one, other) + count(other, one)


def _shared(one: Tensor, other: Tensor) -> Int[Tensor, " pairs"]:
    """Return how many things each pair has in both of its columns."""
    same = (one[:, :, None] == other[:, None, :]) & (one[:, :, None] >= 0)
    return same.flatten(1).sum(1)


def _summed(column: Int[Tensor, "pairs memberships"], values: Float[Tensor, " pairs"], size: int) -> Tensor:
    """Return the sum of the values of the pairs that each thing is in."""
    sums = torch.zeros(size, dtype=torch.float64)
    for numbers in column.T:
        there = numbers >= 0
        sums.index_add_(0, numbers[there], values[there])
    return sums
