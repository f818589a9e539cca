"""The figures of one entry of a mapping, or of several together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill.statistics.figures import Figure, figure_of
from distill.statistics.intervals import Estimate, Share, share_of
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
    count, left_out = int(tally.kept.sum()), tally.left_out

    def value(name: str) -> float | None:
        found = figure_of(name, tally)
        return None if found is None else found.value

    def share(above: str, below: str) -> Share | None:
        known = above in tally and bool(tally[below].any())
        return share_of(tally[above].sum(1), tally[below].sum(1), sharing) if known else None

    normalized: Figure | None = figure_of("normalized", tally)
    return Outcome(
        iia=share("agree", "total"),
        effect_rate=value("effect_rate"),
        effective_iia=value("effective"),
        do_nothing=value("do_nothing"),
        replace_all=value("replace_all"),
        kl=value("kl"),
        error=value("error"),
        count=count,
        left_out=left_out,
        as_source=value("as_source"),
        effective=share("agree_on_effect", "effect"),
        normalized=None if normalized is None else normalized.estimate(sharing),
        correlation=value("correlation"),
        agreement=share("agree_on_base", "total"),
        base_kl=value("base_kl"),
        tried=tried,
    )


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
