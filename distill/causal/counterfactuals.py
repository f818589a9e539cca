"""Pairs of base and source for interchanges of a causal model, with as many effective ones as are asked for."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from distill.errors import DistillError

DRAWS = 1_000_000  # pairs drawn at least, in search of effective ones, before giving up


@dataclass(frozen=True, eq=False)
class Counterfactuals:
    """Pairs of base and source for an interchange of `variables`, and what the causal model answers.

    Attributes:
        variables: what is taken from the source, together.
        base, source: the inputs of both runs.
        base_answers, answers: before and after the interchange.
        effective: where these differ.
    """

    variables: tuple[str, ...]
    base: dict[str, Tensor]
    source: dict[str, Tensor]
    base_answers: Tensor
    answers: Tensor
    effective: Bool[Tensor, " batch"]

    def __len__(self) -> int:
        return len(self.effective)


def collected(
    drawn: Callable[[int], Counterfactuals], n: int, effective: float, generator: torch.Generator
) -> Counterfactuals:
    """`n` pairs out of as many as `drawn(size)` must be asked for, a share `effective` of which change the answer."""
    if not 0 <= effective <= 1:
        raise DistillError(f"effective={effective} is no share from 0 to 1; use e.g. effective=0.5, or None.")
    missing = {True: round(n * effective), False: n - round(n * effective)}
    found: list[tuple[Counterfactuals, Tensor]] = []
    seen, size = 0, 2 * n
    while any(missing.values()):
        if seen >= max(DRAWS, 100 * n):
            raise DistillError(_too_few(found[0][0].variables, n, missing, effective, seen))
        batch = drawn(size)
        for kind, count in missing.items():
            rows = (batch.effective == kind).nonzero()[:count, 0]
            found.append((batch, rows))
            missing[kind] -= len(rows)
        seen, size = seen + size, min(2 * size, max(n, 2**16))
    order = torch.randperm(n, generator=generator, device=generator.device)
    return _joined(found, order.to(found[0][0].effective.device))


def _too_few(names: tuple[str, ...], n: int, missing: dict[bool, int], effective: float, drawn: int) -> str:
    kind = bool(missing[True])
    wanted = round(n * effective) if kind else n - round(n * effective)
    return (
        f"interchanging {' + '.join(map(repr, names))} {'changed' if kind else 'kept'} the answer in "
        f"{wanted - missing[kind]} of {drawn:,} pairs drawn, and {wanted} are asked for by effective={effective}; take "
        f"another variable, give a sample=... under which {'it matters' if kind else 'it matters less'} more often, or "
        "take pairs as they come, with effective=None."
    )


def _joined(parts: list[tuple[Counterfactuals, Tensor]], order: Tensor) -> Counterfactuals:
    """These rows of each part, one after the other, in this order."""

    def joined(columns: Iterable[Tensor]) -> Tensor:
        return torch.cat([column[rows] for column, (_, rows) in zip(columns, parts, strict=True)])[order]

    first = parts[0][0]
    return Counterfactuals(
        variables=first.variables,
        base={name: joined(part.base[name] for part, _ in parts) for name in first.base},
        source={name: joined(part.source[name] for part, _ in parts) for name in first.source},
        base_answers=joined(part.base_answers for part, _ in parts),
        answers=joined(part.answers for part, _ in parts),
        effective=joined(part.effective for part, _ in parts),
    )
