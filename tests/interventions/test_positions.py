"""Positions count real tokens; what names none, or one twice, raises."""

import pytest
import torch

from interventions import InterventionError, select

REAL = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 1, 0]]).bool()  # the last row: gaps on both sides


def chosen(positions: object, real: torch.Tensor = REAL) -> list[list[int]]:
    selection = select(positions, real)
    assert torch.equal(selection.counts(len(real)), torch.bincount(selection.rows, minlength=len(real)))
    return [selection.columns[selection.rows == row].tolist() for row in range(len(real))]


@pytest.mark.parametrize(
    ("positions", "columns"),
    [
        (0, [[0], [0], [2], [1]]),
        (-1, [[3], [2], [3], [2]]),
        (1, [[1], [1], [3], [2]]),
        ([0, -1], [[0, 3], [0, 2], [2, 3], [1, 2]]),
        ([-1, 0], [[3, 0], [2, 0], [3, 2], [2, 1]]),
        (range(2), [[0, 1], [0, 1], [2, 3], [1, 2]]),
        (slice(None), [[0, 1, 2, 3], [0, 1, 2], [2, 3], [1, 2]]),
        (slice(1, None), [[1, 2, 3], [1, 2], [3], [2]]),
        (slice(None, None, -1), [[3, 2, 1, 0], [2, 1, 0], [3, 2], [2, 1]]),
        (slice(-1, None), [[3], [2], [3], [2]]),
        (torch.tensor([1, 0]), [[1, 0], [1, 0], [3, 2], [2, 1]]),
        (torch.tensor(1), [[1], [1], [3], [2]]),
        (torch.tensor([[3], [2], [1], [0]]), [[3], [2], [3], [1]]),
        (torch.tensor([[0, -1], [2, 1], [1, 0], [-2, -1]], dtype=torch.int32), [[0, 3], [2, 1], [3, 2], [1, 2]]),
        ([[3, 1], [], [1], [0]], [[3, 1], [], [3], [1]]),
        ([range(2), (1,), [-1], []], [[0, 1], [1], [3], []]),
        (torch.eye(4).bool() & REAL, [[0], [1], [2], []]),
    ],
    ids=str,
)
def test_positions_count_real_tokens(positions, columns):
    assert chosen(positions) == columns


@pytest.mark.parametrize("positions", [0, [0, -1], slice(1, 3), [[0], [1]]], ids=str)
def test_without_padding_they_are_columns(positions):
    real = torch.ones(2, 4, dtype=torch.bool)
    grid = torch.arange(4).tolist()
    expected = [grid[positions] if not isinstance(positions, list) else None] * 2
    if isinstance(positions, int):
        expected = [[grid[positions]]] * 2
    if isinstance(positions, list):
        rows = positions if isinstance(positions[0], list) else [positions] * 2
        expected = [[grid[p] for p in row] for row in rows]
    assert chosen(positions, real) == expected


@pytest.mark.parametrize(
    ("positions", "match"),
    [
        (
            3,
            r"names padding in 3 of 4 examples \(first: position 3 of row 1, length 3\); count from the end with "
            r"positions=-1",
        ),
        (-3, r"names padding in 2 of 4 examples \(first: position -3 of row 2, length 2\)"),
        (4, r"positions=4 names no token in 4 of 4 examples"),
        ([0, 7], r"names no token"),
        (torch.tensor([[0], [1], [2], [0]]), r"names padding in 1 of 4 examples \(first: position 2 of row 2"),
        ([[], [], [], [2]], r"names padding in 1 of 4 examples \(first: position 2 of row 3"),
        ([0, 0], r"names a token twice in one example; name each once"),
        ([1, -1], r"names a token twice"),
        (torch.tensor([[0, 0]] * 4), r"positions=tensor\[4, 2\] names a token twice"),
        (torch.zeros(3, 1, dtype=torch.long), r"shape \[3, 1\] for a batch of 4; give one row an example: \[4, k\]"),
        ([[0], [1]], r"lists 2 examples and the batch has 4; give one list an example"),
        (torch.zeros(4, 1), r"torch\.float32 tensor of shape \[4, 1\]; give integers"),
        (torch.zeros(4, 1, 1, dtype=torch.long), r"int64 tensor of shape \[4, 1, 1\]; give integers"),
        (torch.ones(4, 3, dtype=torch.bool), r"a mask of shape \[4, 3\] .* padding included"),
        (torch.ones(4, 4, dtype=torch.bool), r"names padding in 3 of 4 .* positions=mask & attention_mask\.bool\(\)"),
        (torch.zeros(4, 4, dtype=torch.bool), r"a mask that selects nothing; set at least one"),
        ([], r"positions=\[\] selects nothing; leave positions out"),
        ([[], [], [], []], r"selects nothing; leave positions out"),
        (slice(3, None), r"selects nothing in row 1, which has 3 tokens; widen the slice"),
        (torch.zeros(4, 0, dtype=torch.long), r"selects nothing"),
        (True, r"positions=True is not understood; give an int, a slice, a list"),
        ([[True], [0], [0], [0]], r"is not understood"),
        ([True, False, True, True], r"is not understood"),
    ],
    ids=str,
)
def test_bad_positions_raise(positions, match):
    with pytest.raises(InterventionError, match=match):
        select(positions, REAL)


def test_an_empty_example_has_no_token():
    with pytest.raises(
        InterventionError, match=r"names padding in 1 of 2 examples \(first: position -1 of row 1, length 0"
    ):
        select(-1, torch.tensor([[True, True], [False, False]]))
