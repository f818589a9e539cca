"""The tokens that a metric reads, so that the logits of these alone are computed."""

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor

from interventions.arguments import is_whole
from interventions.metrics import Metric, Normalized
from interventions.models.answers import logits_of
from interventions.positions import select


@dataclass(frozen=True, eq=False)
class Reading:
    """A metric together with the tokens that it reads: it measures logits that hold these tokens alone.

    Attributes:
        metric: the metric.
        columns: the columns of the tokens that it reads in any example, in order, padding counted, `[kept]`.
        places: which of these it reads in each example, `[batch]`.
    """

    metric: Metric | Normalized
    columns: Int[Tensor, " kept"]
    places: Int[Tensor, " batch"]

    def each(self, output: object, times: int) -> list[Tensor]:
        """Return the metric of several counterfactuals that lie one after the other, `[batch]` each.

        Args:
            output: their output, with logits `[times · batch, kept, vocabulary]`.
            times: the number of counterfactuals.
        """
        logits = logits_of(output)
        if len(self.columns) == 1:
            read = logits[:, 0]
        else:
            places = self.places.repeat(times).to(logits.device)
            read = logits[torch.arange(len(places), device=logits.device), places]
        return [self.metric(part) for part in read.split(len(self.places))]


def reading_of(metric: object, batch: int, tokens: int) -> Reading | None:
    """Return which tokens of logits `[batch, tokens, vocabulary]` a metric reads; None where it does not say so.

    Only a `Metric` says so, alone or normalized; any other function may read the whole output.

    >>> from interventions import logit_difference
    >>> reading_of(logit_difference(0, 1), batch=3, tokens=7).columns
    tensor([6])
    """
    inner = metric
    while type(inner) is Normalized:
        inner = inner.metric
    if type(inner) is not Metric or not is_whole(inner.position):
        return None
    if inner.mask is not None and inner.mask.shape != (batch, tokens):
        return None
    real = torch.ones(batch, tokens, dtype=torch.bool) if inner.mask is None else inner.mask.bool().cpu()
    columns, places = torch.unique(select(inner.position, real).columns, return_inverse=True)
    return Reading(cast(Metric | Normalized, metric), columns, places)
