"""Sums over interchanges, from which every figure of a measurement comes."""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.evaluation.metrics import bootstrap
from distill.evaluation.outcome import Outcome

SUMS = ("total", "agree", "effect", "agree_on_effect", "do_nothing", "replace_all", "divergence", "error", "as_source")


@dataclass(frozen=True, eq=False)
class Tally:
    """Sums over what is predicted for each pair of examples and entry of the mapping, by the names in `SUMS`.

    A total of 0 stands for a counterfactual that is left out. The last sum is counted under causal models alone.
    """

    sums: Float[Tensor, "pairs entries sums"]

    def __getitem__(self, name: str) -> Float[Tensor, "pairs entries"]:
        return self.sums[:, :, SUMS.index(name)]

    @property
    def kept(self) -> Bool[Tensor, "pairs entries"]:
        return self["total"] > 0

    def of(self, entry: int) -> "Tally":
        return Tally(self.sums[:, entry : entry + 1])


def outcome_of(tally: Tally, *, clusters: Int[Tensor, " pairs"], seed: int, regression: bool = False) -> Outcome:
    """The figures of a tally; `clusters` says which pairs share their base."""
    total, left_out = float(tally["total"].sum()), int((~tally.kept).sum())
    count = int(tally.kept.sum())
    if not total or regression:
        error = float(tally["error"].sum()) / total if total else None
        return Outcome(None, None, None, None, None, None, error, count, left_out)
    agree, effect = tally["agree"].sum(1), float(tally["effect"].sum())
    return Outcome(
        iia=bootstrap(agree, tally["total"].sum(1), clusters, seed),
        effect_rate=effect / total,
        effective_iia=float(tally["agree_on_effect"].sum()) / effect if effect else None,
        do_nothing=float(tally["do_nothing"].sum()) / total,
        replace_all=float(tally["replace_all"].sum()) / total,
        kl=float(tally["divergence"].sum()) / total,
        error=None,
        count=count,
        left_out=left_out,
        as_source=float(tally["as_source"].sum()) / total if tally.sums.shape[-1] == len(SUMS) else None,
    )
