"""How alike two models answer: agreement, divergence, accuracy, calibration and perplexity of both."""

from dataclasses import dataclass, replace
from math import exp

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from distill.auditing.answers import Compared, Kind
from distill.errors import DistillError
from distill.evaluation.calibration import Calibration, calibration_of
from distill.statistics.intervals import Share, bootstrap, wilson
from distill.statistics.mcnemar import Discordance

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
        won, lost: how many answers the compressed model alone has right, and the original alone.
        p_value: of McNemar's exact test of the two accuracies; None where several answers belong to one row, and are
            not independent.
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
    won: int = 0
    lost: int = 0
    p_value: float | None = None
    calibration: tuple[Calibration, Calibration] | None = None
    perplexity: tuple[float, float] | None = None


def behaviour_of(found: Compared, seed: int) -> Behaviour:
    """Return the figures of the answers of both models.

    Args:
        found: the answers.
        seed: of the intervals of answers at tokens.

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
        assert found.vectors is not None
        return replace(figures, agreement=shared_neighbours(found.vectors, seed))
    if kind == "values":
        return figures
    agreement = share_of(~found.differs, found.row, at_tokens=found.reading.at_tokens, seed=seed)
    figures = replace(figures, agreement=agreement)
    return _with_labels(found, figures, seed) if bool(found.labelled.any()) else figures


def _with_labels(found: Compared, figures: Behaviour, seed: int) -> Behaviour:
    """Return the figures with those of answers that have labels."""
    known, at_tokens = found.labelled, found.reading.at_tokens
    right = [(classes == found.label)[known] for classes in (found.one, found.other)]
    rows = found.row[known]
    won, lost = int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum())
    sure = (found.sure[known], found.other_sure[known])
    losses = [each[known] for each in (found.loss, found.other_loss)]
    return replace(
        figures,
        accuracy=(
            share_of(right[0], rows, at_tokens=at_tokens, seed=seed),
            share_of(right[1], rows, at_tokens=at_tokens, seed=seed),
        ),
        won=won,
        lost=lost,
        p_value=None if at_tokens else Discordance(won, lost).p,
        calibration=(calibration_of(sure[0], right[0]), calibration_of(sure[1], right[1])),
        perplexity=(_perplexity(losses[0]), _perplexity(losses[1])) if found.reading.predicts else None,
    )


def share_of(true: Bool[Tensor, " n"], rows: Int[Tensor, " n"], *, at_tokens: bool, seed: int) -> Share:
    """Return the share of answers for which something is true; those of one row are drawn together at tokens."""
    if not at_tokens:
        return wilson(int(true.sum()), len(true))
    clusters = torch.unique(rows, return_inverse=True)[1]
    return bootstrap(true.double(), torch.ones(len(true), dtype=torch.float64), clusters, seed)


def shared_neighbours(vectors: Float[Tensor, "2 rows dims"], seed: int) -> Share | None:
    """Return the share of each row's nearest neighbours by cosine that both models have; None for two rows or less.

    Args:
        vectors: the embeddings of the original and of the compressed model.
        seed: of the interval, a bootstrap over rows.
    """
    rows = vectors.shape[1]
    count = min(NEIGHBOURS, rows - 1)
    if rows < 3:
        return None
    shared = []
    one, other = normalize(vectors, dim=-1)
    for chosen in torch.arange(rows).split(512):
        near = []
        for each in (one, other):
            similar = each[chosen] @ each.T
            similar[torch.arange(len(chosen)), chosen] = -torch.inf
            near.append(similar.topk(count).indices)
        both = rearrange(near[0], "row a -> row a 1") == rearrange(near[1], "row b -> row 1 b")
        shared.append(both.any(2).sum(1))
    found = torch.cat(shared).double()
    return bootstrap(found, torch.full_like(found, count), torch.arange(rows), seed)


def _perplexity(losses: Float[Tensor, " n"]) -> float:
    """Return exp of the mean cross-entropy [nats]; infinite where that is too large."""
    mean = float(losses.nanmean())
    return exp(mean) if mean < 700 else float("inf")
