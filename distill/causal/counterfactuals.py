"""Pairs of base and source for interchanges of a causal model, with a chosen share of effective ones."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from distill.errors import DistillError

DRAWS = 1_000_000  # pairs drawn at least, in search of effective ones, before giving up


@dataclass(frozen=True, eq=False)
class Counterfactuals:
    """Pairs of base and source for an interchange of `variables`, and the answers of the causal model.

    Attributes:
        variables: the variables that are taken from the source together.
        base, source: the inputs of both runs.
        base_answers, answers: the answers before and after the interchange.
        effective: which pairs have two different answers.
    """

    variables: tuple[str, ...]
    base: dict[str, Tensor]
    source: dict[str, Tensor]
    base_answers: Tensor
    answers: Tensor
    effective: Bool[Tensor, " batch"]

    def __len__(self) -> int:
        return len(self.effective)


def collect(
    draw: Callable[[int], Counterfactuals], n: int, effective: float, generator: torch.Generator
) -> Counterfactuals:
    """Draw pairs by `draw(size)` until there are `n`, in a share `effective` of which the answer changes.

    Raises:
        DistillError: a share outside 0 to 1, or too few pairs of a kind among a million.
    """
    if not 0 <= effective <= 1:
        raise DistillError(f"effective={effective} is no share from 0 to 1; use e.g. effective=0.5, or None.")
    missing = {True: round(n * effective), False: n - round(n * effective)}
    found: list[tuple[Counterfactuals, Tensor]] = []
    seen, size = 0, 2 * n
    while any(missing.values()):
        if seen >= max(DRAWS, 100 * n):
            raise DistillError(_too_few(found[0][0].variables, n, missing, effective, seen))
        batch = draw(size)
        for kind, count in missing.items():
            rows = (batch.effective == kind).nonzero()[:count, 0]
            found.append((batch, rows))
            missing[kind] -= len(rows)
        seen, size = seen + size, min(2 * size, max(n, 2**16))
    order = torch.randperm(n, generator=generator, device=generator.device)
    return _join(found, order.to(found[0][0].effective.device))


def _too_few(names: tuple[str, ...], n: int, missing: dict[bool, int], effective: float, drawn: int) -> str:
    kind = bool(missing[True])
    wanted = round(n * effective) if kind else n - round(n * effective)
    return (
        f"interchanging {' + '.join(map(repr, names))} {'changed' if kind else 'kept'} the answer in "
        f"{wanted - missing[kind]} of {drawn:,} pairs drawn, and effective={effective} needs {wanted}; take another "
        f"variable, give a sample=... under which {'it matters' if kind else 'it matters less'} more often, or "
        "take pairs as they are drawn, with effective=None."
    )


def _join(parts: list[tuple[Counterfactuals, Tensor]], order: Tensor) -> Counterfactuals:
    """Return the chosen rows of all parts, concatenated, in this order."""

    def rows_of(columns: Iterable[Tensor]) -> Tensor:
        return torch.cat([column[rows] for column, (_, rows) in zip(columns, parts, strict=True)])[order]

    first = parts[0][0]
    return Counterfactuals(
        variables=first.variables,
        base={name: rows_of(part.base[name] for part, _ in parts) for name in first.base},
        source={name: rows_of(part.source[name] for part, _ in parts) for name in first.source},
        base_answers=rows_of(part.base_answers for part, _ in parts),
        answers=rows_of(part.answers for part, _ in parts),
        effective=rows_of(part.effective for part, _ in parts),
    )
