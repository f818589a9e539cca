"""Figures over several runs: closed forms where seeds or pairs are all that varies, and simulation where both do."""

import math

import pytest
import torch
from scipy import stats

from distill.evaluation.measurement import paired
from distill.statistics.figures import Figure
from distill.statistics.intervals import estimate_of
from distill.statistics.over_runs import OverRuns, difference_of_runs, of_runs
from distill.statistics.sharing import Sharing

DOUBLE = torch.float64
APART = Sharing(torch.arange(40), torch.arange(40, 80))


def figure_of(values):
    """The mean of a value for each pair."""
    return Figure(float(values.mean()), (values - values.mean()) / len(values))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def without_pairs(values):
    """Figures of runs that are the same for every pair, as over infinitely many."""
    return [Figure(value, torch.zeros(40, dtype=DOUBLE)) for value in values]


def ends(estimate):
    return estimate.low, estimate.high


def test_of_one_run_it_is_the_interval_over_pairs():
    one = figure_of(drawn(40))
    found = of_runs([one], APART)
    assert found == OverRuns(estimate_of(one.value, one.influence, APART), (one.value,))
    assert found.sd is None


def test_without_noise_of_pairs_it_is_students_interval_over_seeds():
    values = [0.3, 0.5, 0.35, 0.6]
    found = of_runs(without_pairs(values), APART)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert ends(found.estimate) == pytest.approx(tuple(expected))
    assert found.over_seeds == found.estimate
    assert found.sd == pytest.approx(stats.tstd(values))


@pytest.mark.parametrize("seed", range(5))
def test_runs_that_happen_to_agree_are_no_surer_than_their_pairs(seed):
    """Each run differs from pair to pair, and all have one mean: other pairs would not be as kind."""
    noise = drawn(3, 40, seed=seed)
    runs = [figure_of(0.2 + each - each.mean()) for each in noise]
    found, over_pairs = of_runs(runs, APART).estimate, figure_of(0.2 + (noise - noise.mean(1, keepdim=True)).mean(0))
    expected = estimate_of(over_pairs.value, over_pairs.influence, APART)
    assert ends(found) == pytest.approx(ends(expected))
    assert found.high - found.low > 0.1


def test_paired_runs_are_the_paired_test():
    one, other = [0.3, 0.5, 0.35, 0.6], [0.2, 0.45, 0.3, 0.4]
    found = difference_of_runs(without_pairs(one), without_pairs(other), APART)
    assert ends(found.estimate) == pytest.approx(tuple(stats.ttest_rel(one, other).confidence_interval(0.95)))
    assert found.runs == pytest.approx([a - b for a, b in zip(one, other, strict=True)])


def test_unequal_numbers_are_welchs_test():
    one, other = [0.3, 0.5, 0.35, 0.6], [0.2, 0.45, 0.9]
    found = difference_of_runs(without_pairs(one), without_pairs(other), APART)
    expected = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    assert ends(found.estimate) == pytest.approx(tuple(expected))
    assert found.runs == ()


def test_a_single_run_beside_several_stands_for_itself():
    """The interval is that of the several, about the one."""
    several, one = [0.3, 0.5, 0.35, 0.6], [0.4]
    found = difference_of_runs(without_pairs(several), without_pairs(one), APART)
    low, high = stats.ttest_1samp(several, 0).confidence_interval(0.95)
    assert ends(found.estimate) == pytest.approx((low - 0.4, high - 0.4))


def test_where_all_seeds_are_alike_it_is_the_interval_over_pairs():
    one = figure_of(drawn(40))
    assert of_runs([one] * 3, APART).estimate == of_runs([one], APART).estimate


def test_runs_with_noise_of_their_own_count_it_once():
    """Values that vary with run and pair together alone: the variance of the mean is that of all of them."""
    values = drawn(20, 40)
    found = of_runs([figure_of(each) for each in values], APART)
    width = (found.estimate.high - found.estimate.low) / 2 / 1.96
    assert width == pytest.approx(float(values.std()) / math.sqrt(values.numel()), rel=0.25)


@pytest.mark.parametrize("runs", [1, 3])
def test_a_model_and_itself_differ_by_exactly_nothing(runs):
    same = [figure_of(each) for each in drawn(runs, 40)]
    found = difference_of_runs(same, same, APART)
    assert (found.estimate.value, *ends(found.estimate)) == (0, 0, 0)


@pytest.mark.parametrize("counts", [(1, 1), (3, 3), (2, 4)])
def test_exchanged_students_have_mirrored_differences(counts):
    one, other = ([figure_of(each) for each in drawn(count, 40, seed=count)] for count in counts)
    there, back = (difference_of_runs(*both, APART).estimate for both in ((one, other), (other, one)))
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low), abs=1e-15)


def test_a_difference_of_every_pair_is_not_known_to_be_that_of_all():
    """Ten pairs that all differ by 1: Wilson's interval for ten of ten."""
    sharing = Sharing(torch.arange(10), torch.arange(10, 20))
    found = of_runs([Figure(1.0, torch.zeros(10, dtype=DOUBLE))], sharing).estimate
    z = stats.t.ppf(0.975, 9)
    assert (found.low, found.high) == (pytest.approx(10 / (10 + z * z)), 1)


def test_a_variance_that_is_not_known_is_said():
    sharing = Sharing(torch.tensor([0]), torch.tensor([1]))
    found = of_runs([Figure(0.5, torch.ones(1, dtype=DOUBLE))], sharing).estimate
    assert (found.value, *ends(found)) == (0.5, -math.inf, math.inf)


def covered(repeats, runs, rows, spread_of_seeds, spread_of_both, seed):
    """How often the interval of a paired difference holds the true one, 0; and that over pairs alone."""
    generator, hits, alone = torch.Generator().manual_seed(seed), 0, 0
    for _ in range(repeats):
        base, source = paired(rows, 4 * rows, generator)
        of_rows = torch.randn(rows, generator=generator, dtype=DOUBLE)
        seeds = spread_of_seeds * torch.randn(runs, generator=generator, dtype=DOUBLE)
        both = spread_of_both * torch.randn(runs, rows, generator=generator, dtype=DOUBLE)
        noise = torch.randn(runs, 4 * rows, generator=generator, dtype=DOUBLE)
        figures = [figure_of(seeds[s] + (of_rows + both[s])[base] + noise[s]) for s in range(runs)]
        sharing = Sharing(base, source)
        found = of_runs(figures, sharing)
        hits += found.estimate.low <= 0 <= found.estimate.high
        first = of_runs(figures[:1], sharing).estimate
        alone += first.low <= 0 <= first.high
    return hits / repeats, alone / repeats


@pytest.mark.parametrize(
    ("repeats", "runs", "rows", "spread_of_seeds", "spread_of_both"),
    [
        (200, 3, 30, 0.5, 0.5),
        pytest.param(600, 2, 40, 0.5, 0.5, marks=pytest.mark.full),
        pytest.param(600, 5, 40, 0.0, 0.0, marks=pytest.mark.full),
        pytest.param(600, 5, 40, 0.2, 1.0, marks=pytest.mark.full),
        pytest.param(600, 5, 40, 1.0, 0.0, marks=pytest.mark.full),
        pytest.param(600, 10, 40, 0.3, 0.3, marks=pytest.mark.full),
    ],
)
def test_intervals_cover_what_they_say(repeats, runs, rows, spread_of_seeds, spread_of_both):
    """Over new seeds and new rows, 95 of 100 times; of one run, where seeds matter, far less."""
    found, alone = covered(repeats, runs, rows, spread_of_seeds, spread_of_both, seed=runs)
    assert found >= (0.91 if repeats < 600 else 0.932)
    assert found <= 0.995
    if spread_of_seeds >= 0.5:
        assert alone < 0.75
