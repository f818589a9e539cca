"""The best choice of one column for each row of a table of scores, where columns may not fall from row to row.

Layers of a student are the rows and layers of its teacher the columns: what a later layer of the student computes, the
teacher computes no earlier. By dynamic programming over the rows, with b(r, c) the best sum of rows 0 … r whose last
choice is column c,

    b(r, c) = score(r, c) + max over c' ≤ c of b(r − 1, c').
"""

from collections.abc import Sequence

Score = tuple[float, ...]


def choose_monotone(scores: Sequence[Sequence[Score | None]]) -> list[int | None]:
    """Return the column of each row: the numbers do not fall, and the sum of the scores is the greatest.

    As many rows as possible get a column; among these choices the one with the greatest sum of first numbers, then of
    second ones, … is taken, and among equal ones the first column.

    Args:
        scores: for each row and column the numbers that are compared in turn, equally many everywhere; None where the
            column may not be chosen.

    Returns:
        A column for each row; None where the row has none.

    >>> choose_monotone([[(0.9,), (0.8,), (0.1,)], [(0.2,), (0.7,), (0.6,)]])
    [0, 1]
    >>> choose_monotone([[(0.1,), (0.9,)], [(0.8,), (0.7,)], [None, None]])  # not 1 and then 0
    [1, 1, None]
    """
    width = max((len(each) for row in scores for each in row if each is not None), default=0)
    best: dict[int, tuple[Score, list[int | None]]] = {-1: ((0,) + (0.0,) * width, [])}
    for row in scores:
        longer = {last: (total, [*path, None]) for last, (total, path) in best.items()}
        for column, score in enumerate(row):
            if score is None:
                continue
            total, path = max((best[last] for last in sorted(best) if last <= column), key=lambda each: each[0])
            total = tuple(a + b for a, b in zip(total, (1, *score), strict=True))
            if column not in longer or total > longer[column][0]:
                longer[column] = (total, [*path, column])
        best = longer
    return max((best[last] for last in sorted(best)), key=lambda each: each[0])[1]
