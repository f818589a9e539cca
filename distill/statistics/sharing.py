"""How surely a figure over pairs is known, where pairs share rows, and rows share what they are made of.

Two pairs with one base, one source, or one image in them say less than two that have nothing in common. With y_i the
value of pair i, and s_ij^k how many things of kind k the pairs i and j share (their bases, their sources, the images or
templates of their bases, …), values are thought of as sums of effects of these things:

    cov(y_i, y_j) = Σ_k γ_k s_ij^k,    var(Σ_i y_i) = n σ² + Σ_k γ_k Σ_{i≠j} s_ij^k.

σ² and the γ_k are estimated by the method of moments (Henderson 1953, Biometrics 9, method III; Searle, Casella,
McCulloch 1992, Variance Components): the products e_i e_j of the residuals e = P y, with P = I − 1/n, have the
expectation P (σ² I + Σ_k γ_k S^k) P, and are regressed on its parts. A γ_k below 0 is taken for 0. So the estimate is
right on average also where some things occur much more often than others.

How surely the variance itself is known decides which Student's t is used (Satterthwaite 1946, Biometrics Bulletin 2):
2 · variance² / its own variance. That is put together from two parts. The first is the number of things: with G
clusters of normal effects it is 2/(G − 1) of the square, and more where few clusters have most of the effect, by the
fourth powers of their sums. The second is the noise of the regression. It is no more than what sharing adds to the
variance, as that is what can be wrong.

Simulated, such intervals cover 93 to 97 of 100 from five things of a kind on, and 98 where sharing is too weak to be
distinguished from none, because a γ is never below 0 (`tests/distill/statistics/test_sharing.py`). They cannot know
whether five images or templates stand for all others; and effects so rare and strong that none is in the sample, as
where one image in a hundred misleads.
"""

from dataclasses import dataclass
from functools import cached_property
from math import inf

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.errors import DistillError, checked

# Of pairs i and j: base and base, source and source, base and source in either direction.
KINDS = torch.tensor([[[1, 0], [0, 0]], [[0, 0], [0, 1]], [[0, 1], [1, 0]]], dtype=torch.float64)

Things = Int[Tensor, "2 pairs _"]
"""The numbers of the things that the base and the source of each pair are or hold, from 0; −1 fills up."""


@dataclass(frozen=True)
class Spread:
    """The variance of a figure, and the degrees of freedom with which it is known."""

    variance: float
    degrees: float


@checked
@dataclass(frozen=True, eq=False)
class Sharing:
    """The rows and clusters that pairs of a base and a source have in common.

    Attributes:
        base, source: the number of the row of each, or of what else stands for it; a row has one number in both.
        base_clusters, source_clusters: what these rows are made of or come from, by numbers; −1 fills up. None where
            rows share nothing.

    Raises:
        DistillError: no pairs, or columns of other lengths.
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
        clusters = [each for each in (self.base_clusters, self.source_clusters) if each is not None]
        shapes = [list(each.shape) for each in clusters]
        if shapes and (len(shapes) == 1 or shapes[0] != shapes[1] or shapes[0][0] != len(self)):
            raise DistillError(
                f"Sharing has clusters of the shapes {' and '.join(map(str, shapes))} for {len(self)} pairs; give "
                "those of bases and sources, both [pairs, memberships]: clusters[base], clusters[source]."
            )

    def __len__(self) -> int:
        return len(self.base)

    def take(self, pairs: Int[Tensor, " chosen"] | Bool[Tensor, " pairs"]) -> "Sharing":
        """Return what some of the pairs have in common, given by their numbers or by a mask."""
        clusters = (None if each is None else each[pairs] for each in (self.base_clusters, self.source_clusters))
        return Sharing(self.base[pairs], self.source[pairs], *clusters)

    @cached_property
    def independent(self) -> float:
        """The number of things that vary on their own: the fewest of bases, of sources, and of clusters of either.

        Things that occur c_g times count as (Σ c_g)² / Σ c_g², which is their number where all occur alike.
        """
        return min(self._numbers)

    def variance(self, influence: Float[Tensor, " pairs"]) -> float:
        """Return the variance of a figure, see `spread`."""
        return self.spread(influence).variance

    def spread(self, influence: Float[Tensor, " pairs"]) -> Spread:
        """Return the variance of a figure over pairs that are drawn as these were, and how surely it is known.

        Args:
            influence: what each pair adds to the deviation of the figure from its expectation, e.g. (y − mean) / n for
                a mean; for a ratio Σa / Σb, (a − ratio · b) / Σb. Its sum is 0.
        """
        return self.spreads(influence[None])[0]

    def spreads(self, influences: Float[Tensor, "figures pairs"]) -> list[Spread]:
        """Return the variances of several figures over the same pairs, each to the bit what `spread` returns of it."""
        n, values = len(self), influences.double()
        if n < 2:
            return [Spread(inf, 1.0)] * len(values)
        squares, sums = (values * values).sum(1), [_sums(things, values) for things in self._things]
        parts = self._parts(torch.cat([squares[:, None], self._products(values, sums)], 1))
        variances, things = parts.sum(1), torch.zeros_like(squares)
        sorts = zip(sums, self._numbers, self._counts, parts[:, 1:].split(len(KINDS), 1), strict=True)
        for each, number, often, part in sorts:
            things += part.sum(1) ** 2 * _unevenness(each, often).clamp(min=2 / max(number - 1, 1))
        noise, added = 2 * (squares / n) ** 2 * self._noise, variances - squares * n / (n - 1)
        uncertain = torch.minimum((things.sqrt() + noise.sqrt()) ** 2, added**2)
        most = max(self.independent - 1, 1.0)
        degrees = (2 * variances**2 / uncertain).clamp(min=1.0, max=most).where(uncertain > 0, most)
        return [Spread(*each) for each in zip(variances.tolist(), degrees.tolist(), strict=True)]

    def _parts(self, products: Float[Tensor, "figures kinds"]) -> Float[Tensor, "figures kinds"]:
        """Return what σ² and each γ add to the variance of each figure; the γ are not below 0."""
        parts = torch.zeros_like(products)
        every = tuple(k for k in range(1, products.shape[1]) if self._shared[k] > 0)
        waiting = {every: torch.arange(len(products))}  # by the kinds whose γ may be above 0
        while waiting:
            kinds, figures = waiting.popitem()
            chosen = torch.tensor([0, *kinds])
            inverse = torch.linalg.pinv(self._moments[chosen][:, chosen], hermitian=True)
            found = (products[figures][:, None, chosen] * inverse).sum(2)
            least = found[:, 1:].min(1) if kinds else None
            done = torch.ones_like(figures, dtype=torch.bool) if least is None else least.values >= 0
            parts[figures[done, None], chosen] = found[done] * self._shared[chosen]
            for place, kind in enumerate(kinds):
                negative = figures[~done & (least.indices == place)]  # type: ignore[union-attr]
                if len(negative):
                    fewer = tuple(k for k in kinds if k != kind)
                    waiting[fewer] = torch.cat([waiting.get(fewer, negative[:0]), negative])
        return parts

    @cached_property
    def _things(self) -> list[Things]:
        """The things that bases and sources are or hold: the rows, then the clusters if there are any."""
        found = [torch.stack([self.base, self.source])[:, :, None]]
        if self.base_clusters is not None and self.source_clusters is not None:
            found.append(torch.stack([self.base_clusters, self.source_clusters]))
        return [_renumbered(each) for each in found]

    @cached_property
    def _numbers(self) -> list[float]:
        """The effective number of things of each sort, the fewer of those of bases and of sources."""
        found = []
        for things in self._things:
            counts = [column[column >= 0].bincount().double() for column in things]
            found.append(min(float(each.sum() ** 2 / (each @ each)) if len(each) else inf for each in counts))
        return found

    @cached_property
    def _counts(self) -> list[Float[Tensor, "2 things"]]:
        """The numbers of pairs that each thing is in, as base and as source."""
        ones = torch.ones(1, len(self), dtype=torch.float64)
        return [_sums(things, ones)[0] for things in self._things]

    @cached_property
    def _own(self) -> Float[Tensor, "kinds pairs"]:
        """The number of things of each kind that a pair shares with itself."""
        found = []
        for things in self._things:
            one, other = things[:, None, :, :, None], things[None, :, :, None, :]
            found.append(torch.einsum("kxy,xyn->kn", KINDS, ((one == other) & (one >= 0)).double().sum((-2, -1))))
        return torch.cat(found)

    @cached_property
    def _shared(self) -> Float[Tensor, " kinds"]:
        """The times that σ² and each γ are in the variance: n, and Σ over i ≠ j of s_ij."""
        ones = torch.ones(1, len(self), dtype=torch.float64)
        return torch.cat([ones.sum()[None], self._products(ones, [counts[None] for counts in self._counts])[0]])

    def _products(
        self, values: Float[Tensor, "figures pairs"], sums: list[Float[Tensor, "figures 2 _"]]
    ) -> Float[Tensor, "figures kinds"]:
        """Return Σ over i ≠ j of s_ij e_i e_j for each kind of sharing, without making s.

        Args:
            values: e of each figure.
            sums: their sums over the pairs that each thing is in, for things of each sort.
        """
        found = []
        for each in sums:
            products = (each[:, :, None] * each[:, None]).sum(-1)
            found.append((products[:, None] * KINDS).sum((2, 3)))
        return torch.cat(found, 1) - ((values * values)[:, None] * self._own).sum(-1)

    @cached_property
    def _moments(self) -> Float[Tensor, "kinds kinds"]:
        """The inner products of P I P and all P S P.

        S has no diagonal. With Z the matrix of which pair holds which thing, S is Z Z' but for its diagonal, and
        Σ_ij s_ij s'_ij = Σ_gh (Z'Z')_gh²: a sum over couples of things that occur together in a pair.
        """
        n, shared = len(self), self._shared[1:]
        together = torch.cat([torch.cat([_together(one, other) for other in self._things], 1) for one in self._things])
        rows = torch.cat([_row_sums(things) for things in self._things]) - self._own
        centered = together - self._own @ self._own.T - 2 / n * rows @ rows.T + torch.outer(shared, shared) / n**2
        first = torch.cat([shared.new_tensor([n - 1.0]), -shared / n])
        return torch.cat([first[None], torch.cat([first[1:, None], centered], 1)])

    @cached_property
    def _noise(self) -> float:
        """The variance that the estimate has of independent pairs, by 2 · var(y_i)²."""
        kept = [0, *(k for k in range(1, len(self._shared)) if self._shared[k] > 0)]
        inverse = torch.linalg.pinv(self._moments[kept][:, kept], hermitian=True)
        return max(float(self._shared[kept] @ inverse @ self._shared[kept]), 0.0)


def _renumbered(things: Things) -> Things:
    """Return the same things, numbered from 0 without gaps."""
    numbers, found = things.clamp(min=-1).unique(return_inverse=True)
    return found - int(bool(len(numbers)) and bool(numbers[0] < 0))


def _sums(things: Things, values: Float[Tensor, "figures pairs"]) -> Float[Tensor, "figures 2 things"]:
    """Return the sums of the values of the pairs that each thing is in, as base and as source."""
    sums = values.new_zeros(len(values), 2, int(things.max()) + 1 if things.numel() else 0)
    for role, columns in zip(sums.unbind(1), things, strict=True):
        for numbers in columns.T:
            there = numbers >= 0
            role.index_add_(1, numbers[there], values[:, there])
    return sums


def _row_sums(things: Things) -> Float[Tensor, "kinds pairs"]:
    """Return Σ over all j of s_ij for each kind and pair i."""
    counts = _sums(things, torch.ones(1, things.shape[1], dtype=torch.float64))[0]
    padded = torch.cat([counts, torch.zeros(2, 1, dtype=torch.float64)], 1)  # place −1, of no thing
    return torch.einsum("kxy,yxn->kn", KINDS, padded[:, things].sum(-1))


def _together(one: Things, other: Things) -> Float[Tensor, "kinds others"]:
    """Return Σ over all i, j of s_ij^k s_ij^l for the kinds of two sorts of things."""
    mine, its = one[:, None, :, :, None], other[None, :, :, None, :]
    width = int(other.max()) + 1 if other.numel() else 1
    there = rearrange((mine >= 0) & (its >= 0), "x z n k l -> (x z) (n k l)")
    couples = rearrange(mine * width + its, "x z n k l -> (x z) (n k l)")
    found, places = couples.unique(return_inverse=True)
    counts = torch.zeros(4, len(found), dtype=torch.float64).scatter_add_(1, places, there.double())
    return torch.einsum("kxy,lzw,xzyw->kl", KINDS, KINDS, (counts @ counts.T).view(2, 2, 2, 2))


def _unevenness(
    sums: Float[Tensor, "figures 2 things"], counts: Float[Tensor, "2 things"]
) -> Float[Tensor, " figures"]:
    """Return the relative variance of a sum of squares by its own parts, those of the sums that the things are in.

    About 2 / G for G things of normal effects, and 1 where one thing is all.

    Args:
        sums: of the values of the pairs that each thing is in, as base and as source.
        counts: of these pairs.
    """
    worst = sums.new_zeros(len(sums))
    for each, often in ((sums[:, 0], counts[0]), (sums[:, 1], counts[1]), (sums.sum(1), counts.sum(0))):
        squares = each**2
        total, things = squares.sum(1), int((often > 0).sum())
        found = (squares**2).sum(1) / total**2 - 1 / max(things, 1)
        worst = torch.maximum(worst, found.where(total > 0, 0.0))
    return worst
