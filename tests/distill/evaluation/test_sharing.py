"""The variance of a mean over pairs that share rows and clusters: against slow loops, closed forms and simulation."""

import math

import pytest
import torch

from distill import DistillError
from distill.evaluation.intervals import clustered_share
from distill.evaluation.measurement import paired
from distill.evaluation.sharing import Sharing


def sharing_of(rows, pairs, clusters, memberships, generator):
    base, source = paired(rows, pairs, generator)
    if not clusters:
        return Sharing(base, source)
    made = torch.stack([torch.randperm(clusters, generator=generator)[:memberships] for _ in range(rows)])
    return Sharing(base, source, made[base], made[source])


def counts_of(sharing, i, j):
    """How many things of each kind two pairs share, by loops."""
    b, s = sharing.base.tolist(), sharing.source.tolist()
    found = [float(b[i] == b[j]), float(s[i] == s[j]), float(b[i] == s[j]) + float(s[i] == b[j])]
    if sharing.base_clusters is not None:
        mb, ms = sharing.base_clusters.tolist(), sharing.source_clusters.tolist()

        def alike(one, other):
            return float(sum(x == y and x >= 0 for x in one for y in other))

        found += [alike(mb[i], mb[j]), alike(ms[i], ms[j]), alike(mb[i], ms[j]) + alike(ms[i], mb[j])]
    return found


def slow_variance(sharing, influence):
    """The regression of all products on what is shared, row by row."""
    n = len(sharing)
    products, shared = [], []
    for i in range(n):
        for j in range(n):
            if i != j:
                products.append(float(influence[i] * influence[j]))
                shared.append(counts_of(sharing, i, j))
    y, x = torch.tensor(products, dtype=torch.float64), torch.tensor(shared, dtype=torch.float64)
    kinds = [k for k in range(x.shape[1]) if x[:, k].any()]
    covered = 0.0
    while kinds:
        design = torch.cat([torch.ones(len(y), 1, dtype=torch.float64), x[:, kinds]], 1)
        found = torch.linalg.lstsq(design, y[:, None], driver="gelsd").solution[1:, 0]
        if bool((found >= 0).all()):
            covered = float((x[:, kinds] @ found).sum())
            break
        kinds.pop(int(found.argmin()))
    return (float((influence**2).sum()) + covered) * n / (n - 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("rows", "pairs", "clusters", "memberships"), [(7, 30, 0, 0), (20, 40, 12, 3), (9, 25, 9, 1)])
def test_it_is_the_regression_of_all_products(rows, pairs, clusters, memberships, seed):
    generator = torch.Generator().manual_seed(seed)
    sharing = sharing_of(rows, pairs, clusters, memberships, generator)
    if seed == 3 and clusters:  # some rows have fewer clusters
        sharing.base_clusters[::3, -1] = -1
    effects = torch.randn(rows, generator=generator, dtype=torch.float64)
    values = effects[sharing.base] + torch.randn(pairs, generator=generator, dtype=torch.float64)
    influence = (values - values.mean()) / pairs
    assert sharing.variance(influence) == pytest.approx(slow_variance(sharing, influence), rel=1e-4)


def test_blocks_make_no_difference(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, generator=generator, dtype=torch.float64)
    found = set()
    for block in (1, 7, 60, 1000):
        monkeypatch.setattr("distill.evaluation.sharing.BLOCK", block)
        sharing = sharing_of(20, 60, 10, 2, torch.Generator().manual_seed(1))
        found.add(round(sharing.variance((values - values.mean()) / 60), 12))
    assert len(found) == 1


def test_pairs_that_share_nothing_have_the_variance_of_a_mean():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sharing = Sharing(torch.arange(50), torch.arange(50, 100))
    assert sharing.variance((values - values.mean()) / 50) == pytest.approx(float(values.var()) / 50)


def test_copies_of_a_pair_are_no_new_evidence():
    """Every pair ten times over: the variance is that of the pairs themselves, about."""
    values = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    copies = values.repeat(10)
    sharing = Sharing(torch.arange(60).repeat(10), torch.arange(60, 120).repeat(10))
    found = sharing.variance((copies - copies.mean()) / 600)
    assert found == pytest.approx(float(values.var()) / 60, rel=0.05)
    assert sharing.independent == 60


@pytest.mark.parametrize(
    ("clusters", "rows", "memberships", "of_cluster", "of_row"),
    [(60, 200, 4, 0.5, 0.0), (100, 200, 1, 1.0, 0.0), (150, 200, 3, 0.3, 0.3), (0, 150, 0, 0.0, 0.8)],
    ids=["four images of sixty", "one of a hundred", "images and rows", "rows alone"],
)
def test_intervals_cover_what_they_say(clusters, rows, memberships, of_cluster, of_row):
    """95 % intervals hold the expectation in 93 to 97 of 100 samples; those by base alone in far fewer.

    The answers are yes or no, with a logit that is a sum of effects of the images and rows of base and source. The
    bounds leave room for what 400 samples of a true 95 % would vary.
    """
    generator = torch.Generator().manual_seed(1)
    samples, pairs, held, naive = 400, 400, 0, 0
    scale = math.sqrt(2 * memberships * of_cluster**2 + 2 * of_row**2)
    nodes = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-(nodes**2) / 2)
    truth = float((torch.sigmoid(0.5 + scale * nodes) * density).sum() / density.sum())
    for _ in range(samples):
        sharing = sharing_of(rows, pairs, clusters, memberships, generator)
        effects = torch.randn(max(clusters, 1), generator=generator, dtype=torch.float64) * of_cluster
        own = torch.randn(rows, generator=generator, dtype=torch.float64) * of_row
        logits = 0.5 + own[sharing.base] + own[sharing.source]
        if clusters:
            logits = logits + effects[sharing.base_clusters].sum(1) + effects[sharing.source_clusters].sum(1)
        right = (torch.rand(pairs, generator=generator, dtype=torch.float64) < torch.sigmoid(logits)).double()
        found = clustered_share(right, torch.ones(pairs, dtype=torch.float64), sharing)
        held += found.low <= truth <= found.high
        mean, influence = found.value, (right - found.value) / pairs
        by_base = torch.zeros(rows, dtype=torch.float64).index_add(0, sharing.base, influence)
        naive += abs(mean - truth) <= 1.96 * math.sqrt(float((by_base**2).sum()))
    assert 0.93 - 0.022 <= held / samples <= 0.97 + 0.018
    assert naive / samples < held / samples - 0.05


def test_what_is_no_sharing_is_refused():
    with pytest.raises(DistillError, match="3 bases and 2 sources"):
        Sharing(torch.arange(3), torch.arange(2))
