"""The variance of figures over pairs that share rows and clusters: against matrices, closed forms and simulation."""

import math

import pytest
import torch

from distill import DistillError
from distill.evaluation.measurement import paired
from distill.statistics.intervals import estimate_of, share_of
from distill.statistics.sharing import Sharing

DOUBLE = torch.float64


def sharing_of(rows, pairs, clusters, memberships, generator):
    base, source = paired(rows, pairs, generator)
    if not clusters:
        return Sharing(base, source)
    made = torch.randint(clusters, (rows, memberships), generator=generator)
    return Sharing(base, source, made[base], made[source])


def normal(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


def influence_of(values):
    return (values - values.mean()) / len(values)


def count_matrices(sharing):
    """How many things of each kind all pairs of pairs share, by comparing everything with everything."""

    def alike(one, other):
        same = (one[:, None, :, None] == other[None, :, None, :]) & (one >= 0)[:, None, :, None]
        return same.double().sum((-2, -1))

    found = []
    for b, s in (
        (sharing.base[:, None], sharing.source[:, None]),
        (sharing.base_clusters, sharing.source_clusters),
    ):
        if b is not None:
            found += [alike(b, b), alike(s, s), alike(b, s) + alike(s, b)]
    return [each * (1 - torch.eye(len(sharing), dtype=DOUBLE)) for each in found]


def variance_by_matrices(sharing, influence):
    """The regression of e e' on P I P and all P S P, entry by entry."""
    n = len(sharing)
    parts = [torch.eye(n, dtype=DOUBLE), *count_matrices(sharing)]
    center = torch.eye(n, dtype=DOUBLE) - 1 / n
    kinds = [k for k in range(1, len(parts)) if parts[k].any()]
    while True:
        chosen = [parts[0], *(parts[k] for k in kinds)]
        design = torch.stack([(center @ part @ center).flatten() for part in chosen], 1)
        found = torch.linalg.lstsq(design, torch.outer(influence, influence).view(-1, 1), driver="gelsd").solution[:, 0]
        if bool((found[1:] >= 0).all()):
            return float(sum(each * part.sum() for each, part in zip(found, chosen, strict=True)))
        kinds.pop(int(found[1:].argmin()))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("rows", "pairs", "clusters", "memberships"), [(9, 30, 0, 0), (20, 40, 12, 3), (12, 35, 9, 1)])
def test_it_is_the_regression_of_all_products(rows, pairs, clusters, memberships, seed):
    generator = torch.Generator().manual_seed(seed)
    sharing = sharing_of(rows, pairs, clusters, memberships, generator)
    if seed % 2 and memberships > 1:  # some rows are in fewer clusters
        sharing.base_clusters[::3, -1] = -1
    effects = normal(rows, generator=generator)
    influence = influence_of(effects[sharing.base] + normal(pairs, generator=generator))
    assert sharing.variance(influence) == pytest.approx(variance_by_matrices(sharing, influence), rel=1e-8)


def test_one_shared_base_by_hand():
    """Two bases of two pairs each, with the values 1, 1 and −1, −1: the variance is that of a mean of two values.

    Residuals are 1, 1, −1, −1, so P I P and P S P of the shared bases have the products 4 and 4. Of the first the inner
    products are 3 and −1, of both −1 and 3. So 3σ² − γ = 4 and −σ² + 3γ = 4: σ² = γ = 2, and the variance of the mean
    is (4 · 2 + 4 · 2) / 4² = 1, that of (1 − (−1)) / 2 by its sample variance 2, over 2.
    """
    sharing = Sharing(torch.tensor([0, 0, 1, 1]), torch.tensor([2, 3, 4, 5]))
    values = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=DOUBLE)
    assert sharing.variance(influence_of(values)) == pytest.approx(1)
    assert sharing.independent == 2
    assert sharing.spread(influence_of(values)).degrees == pytest.approx(1)


def test_pairs_that_share_nothing_have_the_variance_of_a_mean():
    values = normal(50, generator=torch.Generator().manual_seed(0))
    found = Sharing(torch.arange(50), torch.arange(50, 100)).spread(influence_of(values))
    assert found.variance == pytest.approx(float(values.var()) / 50)
    assert found.degrees == pytest.approx(49)


@pytest.mark.parametrize("times", [2, 10])
def test_copies_of_a_pair_are_no_new_evidence(times):
    values = normal(60, generator=torch.Generator().manual_seed(0))
    sharing = Sharing(torch.arange(60).repeat(times), torch.arange(60, 120).repeat(times))
    found = sharing.variance(influence_of(values.repeat(times)))
    assert found == pytest.approx(float(values.var()) / 60)
    assert sharing.independent == pytest.approx(60)


@pytest.mark.parametrize("shared", ["base", "source", "base_clusters", "source_clusters"])
def test_each_way_of_sharing_is_seen(shared):
    """Effects of the things of one column alone give their variance, whichever column it is."""
    generator, n, things = torch.Generator().manual_seed(0), 400, 40
    own = {"base": torch.arange(n), "source": torch.arange(n, 2 * n)}
    clusters = {name: torch.full((n, 1), -1) for name in ("base_clusters", "source_clusters")}
    numbers = torch.randint(things, (n,), generator=generator)
    column = (own | clusters)[shared]
    columns = own | clusters | {shared: (numbers + 5000).view(column.shape)}
    effects = normal(things, generator=generator)
    influence = influence_of(effects[numbers] + 0.1 * normal(n, generator=generator))
    expected = float(effects.var()) * float((numbers.bincount().double() / n).square().sum())
    assert Sharing(**columns).variance(influence) == pytest.approx(expected, rel=0.3)
    assert Sharing(**own).variance(influence) < expected / 2 or shared in own


@pytest.mark.parametrize("memberships", [0, 1, 3])
def test_neither_order_nor_numbers_nor_scale_matter(memberships):
    generator = torch.Generator().manual_seed(memberships)
    sharing = sharing_of(30, 80, 12 * bool(memberships), memberships, generator)
    influence = influence_of(normal(30, generator=generator)[sharing.base] + normal(80, generator=generator))
    found = sharing.spread(influence)
    order = torch.randperm(80, generator=generator)
    rows, numbers = (1000 * torch.randperm(30, generator=generator) for _ in range(2))
    again = sharing.take(order)
    clusters = (
        None if each is None else numbers[each.flip(1)] for each in (again.base_clusters, again.source_clusters)
    )
    for other, scale in ((again, 1), (Sharing(rows[again.base], rows[again.source], *clusters), -7.5)):
        changed = other.spread(scale * influence[order])
        assert changed.variance == pytest.approx(found.variance * scale**2, rel=1e-9)
        assert changed.degrees == pytest.approx(found.degrees, rel=1e-9)
        assert other.independent == pytest.approx(sharing.independent)


@pytest.mark.parametrize("memberships", [0, 3])
def test_figures_together_are_each_figure_alone(memberships):
    """Also where some have effects of a sort that others lack, and one has none."""
    generator = torch.Generator().manual_seed(memberships)
    sharing = sharing_of(30, 80, 12 * bool(memberships), memberships, generator)
    bases, sources = (normal(30, generator=generator)[each] for each in (sharing.base, sharing.source))
    noise = normal(80, generator=generator)
    values = [
        noise,
        3 * bases + noise,
        3 * sources + noise,
        bases - sources,
        0 * noise,
        *normal(9, 80, generator=generator),
    ]
    influences = torch.stack(list(map(influence_of, values)))
    found = sharing.spreads(influences)
    assert len({round(each.variance, 9) for each in found}) == len(values)
    for spread, influence in zip(found, influences, strict=True):
        assert spread == sharing.spread(influence)
        assert spread.variance == pytest.approx(variance_by_matrices(sharing, influence), rel=1e-8, abs=1e-15)


def test_it_takes_a_second_for_ten_thousand_pairs_without_a_matrix_of_all():
    generator = torch.Generator().manual_seed(0)
    sharing = sharing_of(4000, 10_000, 360, 4, generator)
    influence = influence_of(normal(10_000, generator=generator))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        sharing.variance(influence)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 8 * 10_000**2 / 10


@pytest.mark.parametrize("memberships", [0, 2])
def test_rows_in_no_cluster_share_rows_alone(memberships):
    generator = torch.Generator().manual_seed(5)
    rows = sharing_of(15, 40, 0, 0, generator)
    none = torch.full((40, memberships), -1)
    influence = influence_of(normal(15, generator=generator)[rows.base] + normal(40, generator=generator))
    found, expected = Sharing(rows.base, rows.source, none, none).spread(influence), rows.spread(influence)
    assert (found.variance, found.degrees) == pytest.approx((expected.variance, expected.degrees))


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_few_pairs_have_a_wide_interval(pairs):
    right = torch.tensor([1.0, 0.0, 1.0])[:pairs]
    found = share_of(right, torch.ones(pairs), Sharing(torch.arange(pairs), torch.arange(pairs, 2 * pairs)))
    assert found.high - found.low > 0.9


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((torch.arange(3), torch.arange(2)), "3 bases and 2 sources"),
        ((torch.arange(0), torch.arange(0)), "0 bases and 0 sources"),
        ((torch.arange(2), torch.arange(2), torch.zeros(2, 1).long()), r"shapes \[2, 1\] for 2 pairs"),
        ((torch.arange(2), torch.arange(2), torch.zeros(2, 1).long(), torch.zeros(2, 3).long()), "for 2 pairs"),
    ],
)
def test_what_is_no_sharing_is_refused(arguments, match):
    with pytest.raises(DistillError, match=match):
        Sharing(*arguments)


class Effects:
    """Effects of clusters and rows on the logit of an answer, many draws at once."""

    def __init__(self, sharing, of_cluster, of_row, draws, generator):
        self.variance = torch.full((len(sharing),), 2 * of_row**2, dtype=DOUBLE)
        self.logits = torch.zeros(len(sharing), draws, dtype=DOUBLE)
        if of_row:
            rows = of_row * normal(
                int(torch.maximum(sharing.base, sharing.source).max()) + 1, draws, generator=generator
            )
            self.logits += rows[sharing.base] + rows[sharing.source]
        if of_cluster:
            made = torch.cat([sharing.base_clusters, sharing.source_clusters], 1)
            effects = of_cluster * normal(int(made.max()) + 1, draws, generator=generator)
            self.logits += effects[made].sum(1)
            self.variance += of_cluster**2 * (made[:, :, None] == made[:, None, :]).double().sum((1, 2))

    def right(self, intercept, generator):
        drawn = torch.rand(self.logits.shape, generator=generator, dtype=DOUBLE)
        return (drawn < torch.sigmoid(intercept + self.logits)).double()

    def expected(self, intercept):
        """The mean of sigmoid(logit) over normal effects, by a sum over nodes."""
        nodes = torch.linspace(-8, 8, 801, dtype=DOUBLE)
        weights = torch.exp(-(nodes**2) / 2) / torch.exp(-(nodes**2) / 2).sum()
        scales, which = self.variance.sqrt().unique(return_inverse=True)
        return float((torch.sigmoid(intercept + scales[:, None] * nodes) @ weights)[which].mean())


FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("rows", "pairs", "clusters", "memberships", "of_cluster", "of_row", "figure", "sharings"),
    [
        (200, 400, 60, 4, 0.5, 0.0, "share", 8),
        pytest.param(200, 400, 60, 4, 0.5, 0.0, "share", 20, marks=FULL),
        pytest.param(2000, 2000, 364, 4, 0.6, 0.0, "share", 20, marks=FULL),
        pytest.param(2000, 2000, 364, 4, 0.15, 0.0, "share", 20, marks=FULL),
        pytest.param(200, 400, 100, 1, 1.0, 0.0, "share", 20, marks=FULL),
        pytest.param(200, 600, 20, 1, 0.7, 0.0, "share", 20, marks=FULL),
        pytest.param(200, 400, 150, 3, 0.3, 0.3, "share", 20, marks=FULL),
        pytest.param(150, 400, 0, 0, 0.0, 0.8, "share", 20, marks=FULL),
        pytest.param(200, 2000, 0, 0, 0.0, 0.8, "share", 20, marks=FULL),
        pytest.param(1000, 2000, 364, 4, 0.4, 0.0, "effective", 20, marks=FULL),
        pytest.param(400, 1000, 40, 1, 0.7, 0.0, "difference", 20, marks=FULL),
        (300, 600, 0, 0, 0.0, 0.8, "difference", 8),
    ],
)
def test_intervals_cover_what_they_say(rows, pairs, clusters, memberships, of_cluster, of_row, figure, sharings):
    """95 % intervals hold the expectation in 93 to 97 of 100 samples; those by base alone in fewer.

    Answers are right or wrong, by a logit that is a sum of effects of what base and source are made of. The effective
    figure is over the few pairs that count; the difference is of two students that have the effects in common, and is 0
    on most pairs. Bounds leave room for two standard errors of the simulation.
    """
    generator, draws = torch.Generator().manual_seed(1), 50
    held, naive, count = 0, 0, 0
    for _ in range(sharings):
        sharing = sharing_of(rows, pairs, clusters, memberships, generator)
        effects = Effects(sharing, of_cluster, of_row, draws, generator)
        total = torch.ones(pairs, draws, dtype=DOUBLE)
        if figure == "difference":
            right = effects.right(-3.0, generator) - effects.right(-2.5, generator)
            truth = effects.expected(-3.0) - effects.expected(-2.5)
        else:
            if figure == "effective":
                total = Effects(sharing, of_cluster, of_row, draws, generator).right(-1.5, generator)
            right, truth = total * effects.right(1.0, generator), effects.expected(1.0)
        for y, t in zip(right.T, total.T, strict=True):
            value = float(y.sum() / t.sum())
            influence = (y - value * t) / t.sum()
            found = estimate_of(value, influence, sharing) if figure == "difference" else share_of(y, t, sharing)
            held += found.low <= truth <= found.high
            by_base = torch.zeros(rows, dtype=DOUBLE).index_add(0, sharing.base, influence)
            naive += abs(value - truth) <= 1.96 * math.sqrt(float(by_base @ by_base))
            count += 1
    error = 2 * math.sqrt(0.95 * 0.05 / count)
    assert 0.93 - error <= held / count <= 0.97 + error
    assert naive < held
    if figure == "share" and of_cluster >= 0.5:
        assert naive / count < 0.75
