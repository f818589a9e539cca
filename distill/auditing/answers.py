"""The answers of an original and of a compressed model to the same rows, one by one."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distill.auditing.layers import Layers
from distill.auditing.reading import COMPRESSED, ORIGINAL, Reading, pieces, ran_on
from distill.data.missing import IGNORED
from distill.data.rows import Rows, batches
from distill.models.finite import check_answers
from distill.models.inputs import (
    device_of,
    students,
    to_device,
)


@dataclass(frozen=True, eq=False)
class Models:
    """The two models of an audit, and how they are compared.

    Attributes:
        original, compressed: the models.
        reading: what their answers are.
        batch_size: rows of a forward.
        layers: which blocks stand for each other; none for models without blocks.
    """

    original: nn.Module
    compressed: nn.Module
    reading: Reading
    batch_size: int
    layers: tuple[Layers, ...] = ()

    def columns(self, rows: Rows, chosen: Tensor) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return the columns of some rows, on the device of each model."""
        batch = rows.batch(chosen)
        here, there = (students(to_device(batch, device_of(model))) for model in (self.original, self.compressed))
        return here, there


@dataclass(frozen=True, eq=False)
class Compared:
    """The answers of both models that count, in the order of the rows.

    Attributes:
        reading: what the answers are.
        rows: the number of rows.
        row: the row of each answer.
        divergence: of each, as `Reading.divergence`.
        gap: the largest absolute difference of the two answers' logits, values or entries.
        one, other: the classes that the original and the compressed model answer; 0 for other kinds.
        sure, other_sure: the probabilities of those classes.
        label: the class that the answer should be, −100 where it is not known.
        loss, other_loss: the cross-entropy of each under that label [nats]; NaN without one.
        vectors: the embeddings of both, `[2, rows, dims]`; None for other kinds.
        clusters: what the rows share, `[rows, memberships]`, as `Rows.clusters`; None where that is nothing.
    """

    reading: Reading
    rows: int
    row: Int[Tensor, " n"]
    divergence: Float[Tensor, " n"]
    gap: Float[Tensor, " n"]
    one: Int[Tensor, " n"]
    other: Int[Tensor, " n"]
    sure: Float[Tensor, " n"]
    other_sure: Float[Tensor, " n"]
    label: Int[Tensor, " n"]
    loss: Float[Tensor, " n"]
    other_loss: Float[Tensor, " n"]
    vectors: Float[Tensor, "2 rows dims"] | None = None
    clusters: Int[Tensor, "rows memberships"] | None = None

    @property
    def differs(self) -> Bool[Tensor, " n"]:
        """True for answers of another class."""
        return self.one != self.other

    @property
    def labelled(self) -> Bool[Tensor, " n"]:
        """True for answers that have a label."""
        return self.label != IGNORED


def compare(models: Models, rows: Rows) -> Compared:
    """Return the answers of both models to all rows."""
    parts = [_answers(models, rows, chosen) for chosen in batches(len(rows), models.batch_size)]
    vectors = None
    if models.reading.kind == "embeddings":
        vectors = torch.cat([each.pop("vectors") for each in parts], 1)
    found = {name: torch.cat([each[name] for each in parts]) for name in parts[0]}
    return Compared(models.reading, len(rows), **found, vectors=vectors, clusters=rows.clusters)


def _answers(models: Models, rows: Rows, chosen: Tensor) -> dict[str, Tensor]:
    """Return the figures of the answers to a batch, by the names of the attributes of `Compared`."""
    reading, (read, again) = models.reading, models.columns(rows, chosen)
    here = reading.of(ran_on(ORIGINAL, models.original, read), read)
    there = reading.of(ran_on(COMPRESSED, models.compressed, again), again).to(here.device)
    counted, labels = _kept(reading, models.original, read, here)
    one, other = here[counted], there[counted]
    for name, answers in ((ORIGINAL, one), (COMPRESSED, other)):
        check_answers(answers, f"the audit of {name}")
    numbers = chosen.to(one.device).view(-1, *[1] * (counted.ndim - 1)).expand_as(counted)
    found = {
        "row": numbers[counted],
        "divergence": reading.divergence(one, other),
        "gap": (one - other).abs().amax(-1).double(),
        **_classes(reading, one, other, labels),
    }
    if reading.kind == "embeddings":
        found["vectors"] = torch.stack([one, other]).double()
    return {name: each.cpu() for name, each in found.items()}


def _kept(
    reading: Reading, model: nn.Module, batch: Mapping[str, Tensor], answers: Tensor
) -> tuple[Bool[Tensor, "batch ..."], Int[Tensor, " n"]]:
    """Return which answers count, and the labels of those that do, −100 where there is none."""
    counted, labels = reading.counted(model, batch, answers), reading.labels(model, batch, answers)
    if labels is None:
        labels = torch.full(counted.shape, IGNORED, device=answers.device)
    return counted, labels[counted]


def _classes(
    reading: Reading, one: Float[Tensor, "n c"], other: Float[Tensor, "n c"], labels: Int[Tensor, " n"]
) -> dict[str, Tensor]:
    """Return classes, confidences, labels and losses of the answers; zeros for answers that are no classes."""
    if reading.kind != "classes":
        zero = torch.zeros(len(one), dtype=torch.float64)
        none = {"one": zero.long(), "other": zero.long(), "sure": zero, "other_sure": zero}
        return {**none, "label": torch.full_like(zero, IGNORED).long(), "loss": zero + torch.nan,
                "other_loss": zero + torch.nan}  # fmt: skip
    names = (("one", "sure", "loss"), ("other", "other_sure", "other_loss"))
    found: dict[str, Tensor] = {"label": labels}
    known = (labels >= 0) & (labels < one.shape[-1])
    for logits, (chosen, sure, loss) in zip((one, other), names, strict=True):
        parts: list[tuple[Tensor, ...]] = []
        start = 0
        for (piece,) in pieces(logits):
            log_p, mine = piece.log_softmax(-1), labels[start : start + len(piece)]
            start += len(piece)
            most, index = piece.max(-1)
            right = rearrange(mine.clamp(min=0, max=piece.shape[-1] - 1), "n -> n 1")
            parts.append((index, log_p.amax(-1).exp(), -log_p.gather(-1, right)[:, 0]))
        index, most, surprise = (torch.cat(each) for each in zip(*parts, strict=True))
        found |= {chosen: index, sure: most, loss: surprise.masked_fill(~known, torch.nan)}
    return found
