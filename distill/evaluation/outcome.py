"""The figures of one entry of a mapping, or of several together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distill.statistics.figures import figure_of
from distill.statistics.intervals import Estimate, Share, estimates_of, shares_of
from distill.statistics.sharing import Sharing
from distill.statistics.tally import Tally


@dataclass(frozen=True)
class Outcome:
    """The figures of one entry of the mapping, or of all entries together.

    Intervals are at 95 %, and know which pairs share a base, a source, or a cluster of rows.

    Attributes:
        iia: the share of counterfactuals on which the student answers as the teacher does. None for regression.
        effect_rate: the share on which the teacher's answer is another than on the base.
        effective_iia: `iia` on those alone; None if there are none.
        do_nothing: the `iia` of the student's answers to the base: of a student that ignores interchanges.
        replace_all: the `iia` of the student's answers to the source: of a student that runs the source instead.
        kl: KL(teacher ‖ student) of the counterfactual answers [nats]; None for regression.
        error: for regression, the mean absolute difference of the counterfactual predictions.
        count: how many counterfactuals were counted.
        left_out: how many were not: they replace everything that the output depends on, or nothing of it.
        as_source: under a causal model, the share on which the network's logits are those that it has for the source.
        effective: `effective_iia` with its interval.
        normalized: (iia − do nothing) / (1 − do nothing): 0 for a student that ignores interchanges, 1 for one that
            follows every one; None where doing nothing is always right.
        correlation: of the shifts that the interchange causes in the log-odds of the teacher's answer to the base, or
            in real-valued answers, between student and teacher; None where one of them never moves.
        agreement: on the bases, without any interchange, the share on which student and teacher answer alike.
        base_kl: KL(teacher ‖ student) of the answers to the bases [nats].
        tried: how many pairs were tried to find these, where only effective ones were taken; else None.
    """

    iia: Share | None
    effect_rate: float | None
    effective_iia: float | None
    do_nothing: float | None
    replace_all: float | None
    kl: float | None
    error: float | None
    count: int
    left_out: int
    as_source: float | None = None
    effective: Share | None = None
    normalized: Estimate | None = None
    correlation: float | None = None
    agreement: Share | None = None
    base_kl: float | None = None
    tried: int | None = None

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "Outcome":
        """Build an outcome from what `dataclasses.asdict` made of one, also in an earlier version."""
        kinds = {"iia": Share, "effective": Share, "agreement": Share, "normalized": Estimate}
        return cls(
            **{
                name: kinds[name](**value) if name in kinds and value is not None else value
                for name, value in saved.items()
            }
        )


def outcome_of(tally: Tally, sharing: Sharing, tried: int | None = None) -> Outcome:
    """Return the figures of a tally.

    Args:
        tally: the sums.
        sharing: what the pairs have in common.
        tried: how many pairs were tried to find these, where only effective ones were taken.
    """
    return outcomes_of([tally], sharing, [tried])[0]


def outcomes_of(
    tallies: Sequence[Tally], sharing: Sharing, tried: Sequence[int | None] | None = None
) -> tuple[Outcome, ...]:
    """Return the figures of several tallies over the same pairs, whose intervals are computed together."""
    shares, normalized = _shares(tallies, sharing), _normalized(tallies, sharing)
    return tuple(
        Outcome(
            iia=shares[i].get("iia"),
            effect_rate=_value("effect_rate", tally),
            effective_iia=_value("effective", tally),
            do_nothing=_value("do_nothing", tally),
            replace_all=_value("replace_all", tally),
            kl=_value("kl", tally),
            error=_value("error", tally),
            count=int(tally.kept.sum()),
            left_out=tally.left_out,
            as_source=_value("as_source", tally),
            effective=shares[i].get("effective"),
            normalized=normalized.get(i),
            correlation=_value("correlation", tally),
            agreement=shares[i].get("agreement"),
            base_kl=_value("base_kl", tally),
            tried=None if tried is None else tried[i],
        )
        for i, tally in enumerate(tallies)
    )


SHARES = {
    "iia": ("agree", "total"),
    "effective": ("agree_on_effect", "effect"),
    "agreement": ("agree_on_base", "total"),
}
"""The figures that are shares, each with the names of the sums that are right and of those of which they are."""


def _shares(tallies: Sequence[Tally], sharing: Sharing) -> list[dict[str, Share]]:
    """Return the shares of each tally that it knows."""
    known, rights, totals = [], [], []
    for i, tally in enumerate(tallies):
        for name, (right, total) in SHARES.items():
            if right in tally and bool(tally[total].any()):
                known.append((i, name))
                rights.append(tally[right].sum(1))
                totals.append(tally[total].sum(1))
    found: list[dict[str, Share]] = [{} for _ in tallies]
    if known:
        shares = shares_of(torch.stack(rights), torch.stack(totals), sharing)
        for (i, name), share in zip(known, shares, strict=True):
            found[i][name] = share
    return found


def _normalized(tallies: Sequence[Tally], sharing: Sharing) -> dict[int, Estimate]:
    """Return the normalized accuracy of each tally, by its number, where it is defined."""
    figures = {i: figure for i, tally in enumerate(tallies) if (figure := figure_of("normalized", tally)) is not None}
    if not figures:
        return {}
    influences = torch.stack([figure.influence for figure in figures.values()])
    values = [figure.value for figure in figures.values()]
    return dict(zip(figures, estimates_of(values, influences, sharing), strict=True))


def _value(name: str, tally: Tally) -> float | None:
    """Return the value of a figure of a tally; None where it is not defined."""
    found = figure_of(name, tally)
    return None if found is None else found.value


def figures_of(outcome: Outcome) -> dict[str, float | None]:
    """Return the figures of an outcome by name: each with an interval as its value, `low` and `high`.

    The bounds of `iia` are called `low` and `high`, those of others `effective low`, ….
    """
    found: dict[str, Any] = {}
    for name, value in vars(outcome).items():
        prefix = "" if name == "iia" else f"{name} "
        if name in ("iia", "effective", "normalized", "agreement"):
            bounds = (None, None, None) if value is None else (value.value, value.low, value.high)
            found |= dict(zip((name, f"{prefix}low", f"{prefix}high"), bounds, strict=True))
        else:
            found[name] = value
    return found
