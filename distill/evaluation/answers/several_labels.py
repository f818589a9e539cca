"""The figures of several labels a row, each a yes or no: F1 of all decisions and of each label, and exact matches.

A label counts as given where its logit is above 0, so that its probability is above ½. With true and false positives
TP, FP and false negatives FN,

    F1 = 2 TP / (2 TP + FP + FN),    0 where the three are 0.

Micro: of the sums over all labels. Macro: the mean of the F1 of each label.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import reduce
from jaxtyping import Float, Shaped
from torch import Tensor

from distill.data.missing import IGNORED
from distill.errors import DistillError
from distill.statistics.intervals import Share, wilson


@dataclass(frozen=True)
class SeveralLabels:
    """The figures of several labels a row.

    Attributes:
        exact_match: the share of rows of which every label that is known is answered right.
        micro_f1: F1 of all decisions together.
        macro_f1: the mean of the F1 of each label.
    """

    exact_match: Share
    micro_f1: float
    macro_f1: float


def several_labels(
    parts: Sequence[tuple[Float[Tensor, "rows labels"], Shaped[Tensor, "..."]]],
) -> SeveralLabels | None:
    """Return the figures of logits under labels; None where no label is known.

    Args:
        parts: logits and labels of some rows each, 1 where a label holds and 0 where not, −100 where that is unknown.

    Raises:
        DistillError: a label that is neither.

    >>> logits = torch.tensor([[2.0, -1.0], [1.0, 3.0]])
    >>> several_labels([(logits, torch.tensor([[1, 0], [0, 1]]))]).micro_f1  # 2 · 2 / (2 · 2 + 1)
    0.8
    """
    sums, right, total = None, 0, 0
    for logits, labels in parts:
        wanted, given = labels.reshape(logits.shape), logits > 0
        known, holds = wanted != IGNORED, wanted == 1
        odd = wanted[known & ~holds & (wanted != 0)]
        if len(odd):
            raise DistillError(
                f"F1 of several labels counts labels of 0 and 1, and one is {odd[0].item():g}; round them: "
                "data['labels'] = (data['labels'] > 0.5).float()."
            )
        hits = [each & known for each in (given & holds, given & ~holds, ~given & holds)]
        counts = torch.stack([reduce(each.long(), "rows labels -> labels", "sum") for each in hits])
        sums = counts if sums is None else sums + counts
        rows = known.any(1)
        right += int((((given == holds) | ~known).all(1) & rows).sum())
        total += int(rows.sum())
    if sums is None or not total:
        return None
    return SeveralLabels(wilson(right, total), float(_f1(sums.sum(1))), float(_f1(sums).mean()))


def _f1(sums: Shaped[Tensor, "3 ..."]) -> Float[Tensor, "..."]:
    """Return F1 of true positives, false positives and false negatives."""
    hits, wrong, lost = sums.double()
    return 2 * hits / (2 * hits + wrong + lost).clamp(min=1)
