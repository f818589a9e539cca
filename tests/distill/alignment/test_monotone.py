"""The choice of a column for each row: the best of all choices whose columns do not fall."""

from itertools import product

import pytest
import torch

from distill.alignment.monotone import choose_monotone


def total(scores, columns):
    """How many rows have a column, and the sums of their scores; None for a choice that may not be made."""
    chosen = [column for column in columns if column is not None]
    if chosen != sorted(chosen):
        return None
    found = [scores[row][column] for row, column in enumerate(columns) if column is not None]
    return None if None in found else (len(found), *(sum(each[i] for each in found) for i in (0, 1)))


@pytest.mark.parametrize("seed", range(12))
def test_the_best_of_all_choices(seed):
    draw = torch.Generator().manual_seed(seed)
    rows, columns = (int(torch.randint(1, 5, (), generator=draw)) for _ in range(2))
    numbers = torch.randint(0, 9, (rows, columns, 2), generator=draw).tolist()
    missing = (torch.rand(rows, columns, generator=draw) < 0.25).tolist()
    scores = [[None if missing[r][c] else tuple(numbers[r][c]) for c in range(columns)] for r in range(rows)]
    every = product([*range(columns), None], repeat=rows)
    best = max(found for each in every if (found := total(scores, each)) is not None)
    assert total(scores, choose_monotone(scores)) == best


def test_of_equal_sums_the_second_number_decides_and_then_the_first_column():
    assert choose_monotone([[(0.5, 0.1), (0.5, 0.2), (0.5, 0.2)]]) == [1]
    assert choose_monotone([[(0.5, 0.2)] * 3] * 2) == [0, 0]


def test_as_many_rows_as_possible_have_a_column():
    assert choose_monotone([[None, (0.9,)], [(0.1,), None], [(0.1,), None]]) == [None, 0, 0]
    assert choose_monotone([[None, None]] * 2) == [None, None]
    assert choose_monotone([]) == []
