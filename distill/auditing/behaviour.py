"""How alike two models answer: agreement, divergence, accuracy, calibration and perplexity of both."""

from dataclasses import dataclass, replace
from math import exp

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import normalize

from distill.auditing.answers import Compared
from distill.auditing.reading import Kind
from distill.errors import DistillError
from distill.evaluation.calibration import Calibration, calibration_of
from distill.statistics.figures import Figure, ratio
from distill.statistics.intervals import Estimate, Share, share_of, wilson
from distill.statistics.mcnemar import Discordance
from distill.statistics.sharing import Sharing

NEIGHBOURS = 10
"""How many nearest neighbours of each embedding are compared."""


@dataclass(frozen=True)
class Behaviour:
    """The figures of how alike an original and a compressed model answer.

    Attributes:
        kind: "classes", "values" or "embeddings".
        unit: what one answer belongs to, "rows" or "tokens".
        rows: the number of rows.
        answers: the number of answers.
        divergence: the mean divergence of the answers: KL(original ‖ compressed) [nats], of values their mean absolute
            difference, of embeddings 1 − cosine similarity.
        largest: the largest absolute difference of a logit, a value or an entry of an embedding.
        agreement: the share of answers that are of one class; of embeddings the share of nearest neighbours that both
            have; None for values. With its 95 % interval.
        accuracy: of the original and of the compressed model, where answers have labels.
        gain: the accuracy of the compressed model minus that of the original, of the same answers, with its 95 %
            interval.
        won, lost: how many answers the compressed model alone has right, and the original alone.
        p_value: of McNemar's exact test of the two accuracies; None where answers are not independent: those
            of tokens, or of rows that share clusters.
        calibration: of the original and of the compressed model.
        perplexity: of the original and of the compressed model, where they predict tokens.
    """

    kind: Kind
    unit: str
    rows: int
    answers: int
    divergence: float
    largest: float
    agreement: Share | None = None
    accuracy: tuple[Share, Share] | None = None
    gain: Estimate | None = None
    won: int = 0
    lost: int = 0
    p_value: float | None = None
    calibration: tuple[Calibration, Calibration] | None = None
    perplexity: tuple[float, float] | None = None


def behaviour_of(found: Compared) -> Behaviour:
    """Return the figures of the answers of both models.

    Raises:
        DistillError: no answer counts.
    """
    if not len(found.row):
        raise DistillError(
            f"none of the {found.rows} rows has an answer that counts: all tokens are padding or have the label -100; "
            "give rows with real tokens."
        )
    kind, unit = found.reading.kind, "tokens" if found.reading.at_tokens else "rows"
    divergence, largest = float(found.divergence.mean()), float(found.gap.max())
    figures = Behaviour(kind, unit, found.rows, len(found.row), divergence, largest)
    if kind == "embeddings":
        return replace(figures, agreement=shared_neighbours(found))
    if kind == "values":
        return figures
    figures = replace(figures, agreement=share_among(found, ~found.differs, found.row))
    return _with_labels(found, figures) if bool(found.labelled.any()) else figures


def _with_labels(found: Compared, figures: Behaviour) -> Behaviour:
    """Return the figures with those of answers that have labels."""
    known = found.labelled
    right = [(classes == found.label)[known] for classes in (found.one, found.other)]
    rows = found.row[known]
    won, lost = int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum())
    sure = (found.sure[known], found.other_sure[known])
    losses = [each[known] for each in (found.loss, found.other_loss)]
    return replace(
        figures,
        accuracy=(share_among(found, right[0], rows), share_among(found, right[1], rows)),
        gain=(figure_of(right[1], rows) - figure_of(right[0], rows)).estimate(sharing_of(found, rows)),
        won=won,
        lost=lost,
        p_value=None if found.reading.at_tokens or found.clusters is not None else Discordance(won, lost).p,
        calibration=(calibration_of(sure[0], right[0]), calibration_of(sure[1], right[1])),
        perplexity=(_perplexity(losses[0]), _perplexity(losses[1])) if found.reading.predicts else None,
    )


def figure_of(values: Shaped[Tensor, " n"], rows: Int[Tensor, " n"]) -> Figure:
    """Return the mean of the values of answers, with what each row adds to it."""
    places = rows.unique(return_inverse=True)[1]
    total = places.bincount().double()
    found = ratio(torch.zeros_like(total).index_add_(0, places, values.double()), total)
    assert found is not None
    return found


def sharing_of(found: Compared, rows: Int[Tensor, " n"]) -> Sharing:
    """Return what rows that have answers share: clusters, if the data names them."""
    numbers = rows.unique()
    made_of = (None, None) if found.clusters is None else (found.clusters[numbers],) * 2
    return Sharing(numbers, numbers, *made_of)


def share_among(found: Compared, true: Bool[Tensor, " n"], rows: Int[Tensor, " n"]) -> Share:
    """Return the share of answers for which something is true; those of one row or cluster count as related."""
    if not found.reading.at_tokens and found.clusters is None:
        return wilson(int(true.sum()), len(true))
    places = rows.unique(return_inverse=True)[1]
    total = places.bincount().double()
    right = torch.zeros_like(total).index_add_(0, places, true.double())
    return share_of(right, total, sharing_of(found, rows))


def shared_neighbours(found: Compared) -> Share | None:
    """Return the share of each row's nearest neighbours by cosine that both models have; None for two rows or less."""
    assert found.vectors is not None
    rows = found.rows
    count = min(NEIGHBOURS, rows - 1)
    if rows < 3:
        return None
    shared = []
    one, other = normalize(found.vectors, dim=-1)
    for chosen in torch.arange(rows).split(512):
        near = []
        for each in (one, other):
            similar = each[chosen] @ each.T
            similar[torch.arange(len(chosen)), chosen] = -torch.inf
            near.append(similar.topk(count).indices)
        both = rearrange(near[0], "row a -> row a 1") == rearrange(near[1], "row b -> row 1 b")
        shared.append(both.any(2).sum(1))
    right = torch.cat(shared).double()
    return share_of(right, torch.full_like(right, count), sharing_of(found, torch.arange(rows)))


def _perplexity(losses: Float[Tensor, " n"]) -> float:
    """Return exp of the mean cross-entropy [nats]; infinite where that is too large."""
    mean = float(losses.nanmean())
    return exp(mean) if mean < 700 else float("inf")
