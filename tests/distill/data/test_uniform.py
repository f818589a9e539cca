import pytest
import torch

from distill.data.seeds import seed_from
from distill.data.uniform import uniform_of

SEEDS = [0, 1, 7, 2**32 - 1, 2**32, 2**62 + 12345, *(seed_from(3, i, 1) for i in range(20))]


@pytest.mark.parametrize("count", [1, 2, 226, 227, 228, 454, 623, 624, 625, 1300])
def test_the_numbers_are_those_of_a_generator_for_each_seed(count):
    alone = [torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    assert torch.equal(uniform_of(SEEDS, count), torch.stack(alone))


def test_more_numbers_leave_the_first_ones_as_they_are():
    assert torch.equal(uniform_of(SEEDS, 700)[:, :5], uniform_of(SEEDS, 5))


def test_no_numbers_of_no_seeds():
    assert uniform_of([], 3).shape == (0, 3)
    assert uniform_of(SEEDS, 0).shape == (len(SEEDS), 0)
