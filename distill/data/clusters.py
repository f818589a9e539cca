"""Clusters: what rows of data share, e.g. an image, a template, so that they are no independent evidence."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from distill.errors import DistillError
from interventions import shown

NOTHING = -1
"""The number that fills up where a row is in fewer clusters than another."""


def split_clusters(
    columns: Mapping[str, Any], clusters: Tensor | str | Sequence[str] | None
) -> tuple[dict[str, Any], Int[Tensor, "rows memberships"] | None]:
    """Return the columns that models are given, and the clusters that each row is in.

    Args:
        columns: those of the data.
        clusters: `[rows]` or `[rows, memberships]`, or the names of columns, whose equal values are one cluster. A row
            may have several values in a column. None, NaN and negative numbers are no cluster.

    Raises:
        DistillError: a column that does not exist, no column for models, or numbers that are not whole.
    """
    if clusters is None or isinstance(clusters, Tensor):
        return dict(columns), None if clusters is None else _as_memberships(clusters)
    names = [clusters] if isinstance(clusters, str) else list(clusters)
    kept = {name: column for name, column in columns.items() if name not in names}
    if not names or not kept or not set(names) <= columns.keys():
        raise DistillError(
            f"clusters={clusters!r} must name columns of what rows share, beside those that models are given; the data "
            f"has {', '.join(map(repr, columns))}: name one, as clusters='template'."
        )
    numbers: defaultdict[tuple[str, Any], int] = defaultdict(count().__next__)
    rows: list[list[int]] = [[] for _ in columns[names[0]]]
    for name in names:
        for i, value in enumerate(columns[name]):
            if i < len(rows):
                rows[i] += [numbers[name, each] for each in _members(name, value)]
    width = max(map(len, rows), default=0)
    return kept, torch.tensor([row + [NOTHING] * (width - len(row)) for row in rows]).view(len(rows), width)


def check_length(clusters: Tensor, rows: int) -> None:
    """Raise DistillError unless there are clusters for each row."""
    if len(clusters) != rows:
        raise DistillError(
            f"the clusters have the shape {list(clusters.shape)} and the data {rows} rows; give those of each row: "
            "Rows.of(data, clusters=torch.tensor([0, 0, 1, …]))."
        )


def _as_memberships(clusters: Tensor) -> Int[Tensor, "rows memberships"]:
    """Return clusters as `[rows, memberships]`.

    Raises:
        DistillError: a tensor of another shape, or not of whole numbers.
    """
    whole = not (clusters.is_floating_point() or clusters.is_complex() or clusters.dtype == torch.bool)
    if not whole or clusters.ndim not in (1, 2):
        raise DistillError(
            f"clusters={shown(clusters)} must be whole numbers, [rows] or [rows, memberships]; give those of each row: "
            "Rows.of(data, clusters=torch.tensor([0, 0, 1, …]))."
        )
    return clusters[:, None] if clusters.ndim == 1 else clusters


def _members(name: str, value: Any) -> list[Any]:
    """Return the clusters that one row names in a column."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    found = list(value) if isinstance(value, list | tuple) else [value]
    if unusable := [each for each in found if not (each is None or isinstance(each, str | int | float))]:
        raise DistillError(
            f"column {name!r} names no cluster by {shown(unusable[0])}; give a text or a number a row, or a list of "
            "them."
        )
    return [each for each in found if not (each is None or each != each or (not isinstance(each, str) and each < 0))]
