"""Sums over the predictions of every pair of a base and a source, for each entry of a mapping.

All figures of a measurement are made from these sums, so that they have one sample, and one interval each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Sums = Mapping[str, Float[Tensor, "pairs entries"]]


@dataclass(frozen=True, eq=False)
class Tally:
    """Sums over the predictions of each pair of examples and entry of the mapping.

    By their names they are

    - `total`: how many are counted; 0 stands for a counterfactual that is left out;
    - `wanted`: 1 where a pair was to be measured at an entry, 0 where it was not; without it all were;
    - `agree`, `effect`, `agree_on_effect`: on how many student and teacher answer alike, the teacher's answer is
      another than on the base, and both;
    - `do_nothing`, `replace_all`: on how many the student's answer to the base, and to the source, is the teacher's
      to the counterfactual;
    - `divergence`: KL(teacher ‖ student) of the counterfactual answers [nats];
    - `agree_on_base`, `divergence_on_base`: the same of the answers to the base;
    - `shift`, `teacher_shift`, …: moments of the shifts that the interchange causes (see `shifts`);
    - `as_source`: under a causal model, on how many the student's logits are those that it has for the source;
    - `error`: of real-valued answers, the absolute difference, in place of those that count classes.

    Attributes:
        sums: {name: `[pairs, entries]`}; `total` is always there.
    """

    sums: Sums

    def __getitem__(self, name: str) -> Float[Tensor, "pairs entries"]:
        return self.sums[name]

    def __contains__(self, name: str) -> bool:
        return name in self.sums

    @property
    def kept(self) -> Bool[Tensor, "pairs entries"]:
        """The counterfactuals that are not left out."""
        return self["total"] > 0

    @property
    def left_out(self) -> int:
        """The number of counterfactuals that were to be measured and are left out."""
        missing = ~self.kept
        return int((missing & (self["wanted"] > 0) if "wanted" in self else missing).sum())

    @property
    def regression(self) -> bool:
        """True where answers are real-valued, so that errors are summed and no classes counted."""
        return "error" in self.sums

    def of(self, *entries: int) -> "Tally":
        """Return the sums of some of the entries."""
        return Tally({name: each[:, list(entries)] for name, each in self.sums.items()})

    def at(self, pairs: Tensor) -> "Tally":
        """Return the sums of some of the pairs, by their places."""
        return Tally({name: each[pairs] for name, each in self.sums.items()})

    def where(self, counted: Bool[Tensor, "pairs entries"]) -> "Tally":
        """Return the sums with 0 for all that was not to be measured."""
        return Tally({name: each * counted for name, each in self.sums.items()} | {"wanted": counted.double()})


def stacked(entries: Sequence[Mapping[str, Float[Tensor, " pairs"]]]) -> Tally:
    """Return the tally of several entries from the sums of each."""
    return Tally({name: torch.stack([each[name] for each in entries], 1) for name in entries[0]})


def joined(parts: Sequence[Tally]) -> Tally:
    """Return the tally of the pairs of several tallies, in order, on the CPU."""
    return Tally({name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0].sums})


def compare_classes(
    wanted: Tensor, unchanged: Tensor, after: Tensor, base: Tensor, source: Tensor
) -> dict[str, Tensor]:
    """Compare the classes that teacher and student answer; return what each prediction adds, by the names of a tally.

    Args:
        wanted, unchanged: the teacher's answers after the interchange, and to the base.
        after, base, source: the student's answers after the interchange, to the base and to the source.
    """
    right, effect = after == wanted, wanted != unchanged
    return {
        "agree": right,
        "effect": effect,
        "agree_on_effect": right & effect,
        "do_nothing": base == wanted,
        "replace_all": source == wanted,
        "agree_on_base": base == unchanged,
    }


def sum_predictions(
    values: Mapping[str, Tensor], weights: Float[Tensor, "batch ..."]
) -> dict[str, Float[Tensor, " batch"]]:
    """Sum the values of the predictions of each pair.

    Args:
        values: {name: a value for each prediction}.
        weights: 1 for predictions that count, else 0; their sums are the `total`.
    """
    every = {"total": torch.ones_like(weights), **values}
    # A prediction that does not count may have any value, also one that is not finite.
    counted = {name: torch.where(weights > 0, each.to(weights), 0) * weights for name, each in every.items()}
    return {name: each if each.ndim == 1 else each.sum(-1) for name, each in counted.items()}
