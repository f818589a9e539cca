"""Shares and estimates with their intervals, over pairs that share rows and clusters."""

import math

import pytest
import torch

from distill import DistillError
from distill.statistics.intervals import (
    Estimate,
    estimate_of,
    estimates_of,
    share_of,
    shares_of,
    signed,
    student_quantile,
    wilson,
)
from distill.statistics.sharing import Sharing


def apart(pairs):
    """Pairs that have nothing in common."""
    return Sharing(torch.arange(pairs), torch.arange(pairs, 2 * pairs))


def few(pairs, things):
    """Pairs whose bases are a few rows."""
    return Sharing(torch.arange(pairs) % things, torch.arange(pairs, 2 * pairs))


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (2, 4.303), (10, 2.228), (30, 2.042), (1e9, 1.960)])
def test_quantiles_of_student_as_tables_have_them(degrees, quantile):
    assert student_quantile(degrees) == pytest.approx(quantile, abs=6e-4)


@pytest.mark.parametrize(("right", "pairs"), [(30, 60), (57, 60), (900, 1000)])
def test_without_sharing_it_is_wilson_with_the_quantile_of_student(right, pairs):
    """n / (n − 1) of the variance is what a sample of n has, and t what n − 1 degrees of freedom have."""
    answers = (torch.arange(pairs) < right).double()
    found = share_of(answers, torch.ones(pairs), apart(pairs))
    z = student_quantile(pairs - 1)
    for p in (found.low, found.high):
        assert (found.value - p) ** 2 == pytest.approx(z * z * p * (1 - p) / (pairs - 1), abs=1e-9)
    assert found.count == pairs
    near = wilson(right, pairs)
    assert (found.low, found.high) == pytest.approx((near.low, near.high), abs=0.005)


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_where_all_or_none_are_right_each_thing_counts_as_one(right):
    found = share_of(torch.full((1000,), right), torch.ones(1000), few(1000, 50))
    near = wilson(int(50 * right), 50, student_quantile(49))
    assert (found.value, found.low, found.high) == pytest.approx((right, near.low, near.high))
    assert found.count == 1000


def test_shared_rows_make_it_wider():
    answers = (torch.arange(1000) % 50 < 40).double()  # the same for all pairs of a base
    found, near = share_of(answers, torch.ones(1000), few(1000, 50)), share_of(answers, torch.ones(1000), apart(1000))
    assert found.value == near.value == 0.8
    wider = (found.high - found.low) / (near.high - near.low)
    assert wider == pytest.approx(math.sqrt(1000 / 50), rel=0.1)


def test_a_total_of_nothing_leaves_a_pair_out():
    generator = torch.Generator().manual_seed(0)
    total = (torch.rand(200, generator=generator) < 0.4).double()
    right = total * (torch.rand(200, generator=generator) < 0.7)
    kept = total > 0
    assert share_of(right, total, few(200, 40)) == share_of(right[kept], total[kept], few(200, 40).take(kept))


def test_shares_and_estimates_together_are_each_alone():
    """Each with the pairs that it has predictions of, all right and all wrong ones too."""
    generator = torch.Generator().manual_seed(0)
    total = torch.randint(0, 3, (12, 60), generator=generator).double()
    total[6:] = total[0]
    right = (total * torch.rand(12, 60, generator=generator)).round()
    right[10], right[11] = total[10], 0
    sharing = few(60, 10)
    assert shares_of(right, total, sharing) == [share_of(*sums, sharing) for sums in zip(right, total, strict=True)]
    influences, values = right - right.mean(1, keepdim=True), right.mean(1).tolist()
    influences[3] = 0
    alone = [estimate_of(*each, sharing) for each in zip(values, influences, strict=True)]
    assert estimates_of(values, influences, sharing) == alone


def test_a_share_of_several_predictions_a_pair():
    right, total = torch.tensor([3.0, 1.0, 0.0, 2.0]), torch.tensor([4.0, 4.0, 0.0, 2.0])
    found = share_of(right, total, apart(4))
    assert (found.value, found.count) == (0.6, 10)
    influence = torch.tensor([3 - 2.4, 1 - 2.4, 0, 2 - 1.2], dtype=torch.float64) / 10
    estimate = estimate_of(0.6, influence[total > 0], apart(4).take(total > 0))
    variance = float(influence @ influence) * 3 / 2  # three pairs that share nothing
    assert estimate.high - estimate.low == pytest.approx(2 * student_quantile(2) * math.sqrt(variance))
    assert found.low < estimate.value < found.high


@pytest.mark.parametrize("value", [0.0, 0.25, -3.5])
def test_what_never_varies_has_no_width(value):
    found = estimate_of(value, torch.zeros(30), few(30, 5))
    assert (found.value, found.low, found.high) == (value, value, value)


def test_an_estimate_moves_and_scales_with_its_figure():
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(20, generator=generator, dtype=torch.float64)[torch.arange(100) % 20]
    influence = (values - values.mean()) / 100
    found = estimate_of(float(values.mean()), influence, few(100, 20))
    moved = estimate_of(5 - 2 * float(values.mean()), -2 * influence, few(100, 20))
    assert (moved.low, moved.high) == pytest.approx((5 - 2 * found.high, 5 - 2 * found.low))
    assert found.low < found.value < found.high


def test_estimates_as_text():
    assert str(Estimate(0.123, 0.1, 0.15)) == "0.123 [0.100, 0.150]"
    assert signed(Estimate(0.012, -0.003, 0.027)) == "+0.012 [-0.003, +0.027]"
    assert signed(Estimate(-0.0001, -0.0002, 0.0)) == "+0.000 [+0.000, +0.000]"


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: share_of(torch.ones(2), torch.ones(3), apart(3)), "2 right and 3 totals in 3 pairs"),
        (lambda: share_of(torch.zeros(3), torch.zeros(3), apart(3)), "at least one total above 0"),
        (lambda: share_of(torch.full((3,), 2.0), torch.ones(3), apart(3)), "from 0 to its total"),
        (lambda: estimate_of(0.0, torch.ones(2), apart(3)), "2 influences over 3 pairs"),
        (lambda: estimate_of(0.0, torch.tensor([1.0, math.nan, 0.0]), apart(3)), "a finite one"),
        (lambda: Estimate(0.5, 0.6, 0.7), "low <= value <= high"),
    ],
)
def test_what_has_no_interval_is_refused(call, match):
    with pytest.raises(DistillError, match=match):
        call()
