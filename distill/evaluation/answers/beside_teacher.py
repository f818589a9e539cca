"""The answers of a student beside those of its teacher: agreement, divergence, and the perplexity of language models.

Over the N answers of the held-out rows that count,

    agreement  = |{n : argmax z_s(n) = argmax z_t(n)}| / N
    KL         = (1 / N) Σ_n KL(softmax z_t(n) ‖ softmax z_s(n))            [nats / answer]
    perplexity = exp( −(1 / N) Σ_n log softmax(z(n))[label of n] )

An answer counts if its label is not −100; where rows have no labels, if it is no padding. A language model predicts the
next token, so tokens without labels are their own: every token counts that follows another in its text.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, inf
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.data.missing import IGNORED
from distill.data.rows import Rows
from distill.data.texts.lengths import similar_batches
from distill.evaluation.answers.labelled_answers import check_classes, parts_of
from distill.evaluation.progress import counting
from distill.losses import kd
from distill.losses.chunked import LazyLogits, logits_at
from distill.models.finite import check_answers
from distill.models.head import Heads
from distill.models.inputs import (
    answer_mask,
    device_of,
    evaluating,
    inputs_of,
    reads_apart,
    students,
    teachers,
    to_device,
)
from distill.models.loss_masks import answer_labels, answers_by_decoder, expects_next, label_place
from distill.models.trials import lazy_answer_of
from distill.precision import widen
from distill.processes import gather_parts, own_part
from distill.statistics.intervals import Share, wilson
from distill.teachers.served import Served
from distill.teachers.verbs import lazy_answers, run_of
from interventions import Model

ROWS = 8
"""Rows of a forward: the logits of language models are large."""
AT_ONCE = 1024
"""Answers whose probabilities are computed together."""


@dataclass(frozen=True)
class BesideTeacher:
    """The figures of a student's answers beside those of its teacher; None where they do not exist.

    Attributes:
        accuracy: the share of labels that are the student's most likely answer.
        agreement: the share of answers whose most likely class is the teacher's.
        kl: KL(teacher ‖ student) of the answers [nats].
        perplexity: of the student, a language model.
        teacher_perplexity: of the teacher on the same tokens.
        note: why the answers of the two cannot be compared; else empty.
    """

    accuracy: Share | None = None
    agreement: Share | None = None
    kl: float | None = None
    perplexity: float | None = None
    teacher_perplexity: float | None = None
    note: str = ""


def is_language_model(model: Any, logits: Tensor | None, rows: Rows) -> bool:
    """Return whether a model predicts tokens of a text one after the other, as decoders and encoder–decoders do.

    Args:
        model: the model.
        logits: its answers to the first two rows.
        rows: the data.
    """
    batch = students(rows.batch(range(min(2, len(rows)))))
    if logits is None or logits.ndim != 3 or logits.shape[-1] < 2:
        return False
    if answers_by_decoder(model, batch):
        return True
    if "input_ids" not in batch or logits.shape[:2] != batch["input_ids"].shape:
        return False
    return expects_next(model) or label_place(model, logits, batch, rows.table) == "next"


def beside_teacher(teacher: Model | Served | None, student: nn.Module, rows: Rows, *, text: bool) -> BesideTeacher:
    """Measure a student's answers on held-out rows, and those of its teacher beside them.

    Where several processes divide measurements, each takes its part of the rows, and the sums are those of all.

    Args:
        teacher: answers to the same rows; None measures the student alone.
        student: answers.
        rows: the data.
        text: whether both are language models, which have a perplexity.

    Raises:
        DistillError: labels that are no classes of the student, or answers that are not finite.
    """
    own = own_part(torch.arange(len(rows)))
    measure = _Sums(teacher, student, rows, text)
    parts = gather_parts(lambda: measure.over(own))
    total = {name: sum(each[name] for each in parts) for name in parts[0]}
    note = next((each for each in (part.note for part in parts) if each), "")
    counted, labelled = int(total["answers"]), int(total["labelled"])
    compared = teacher is not None and not note and counted > 0
    whole = compared and getattr(teacher, "top_k", None) is None  # else of most tokens the level alone is known
    return BesideTeacher(
        wilson(int(total["right"]), labelled) if labelled and "labels" in rows.columns else None,
        wilson(int(total["agreed"]), counted) if compared else None,
        total["kl"] / counted if compared else None,
        perplexity_of(total["nll"], labelled) if text and labelled else None,
        perplexity_of(total["teacher nll"], labelled) if text and labelled and whole else None,
        note,
    )


def perplexity_of(nats: float, tokens: int) -> float:
    """Return exp(nats / tokens), infinite where that is more than a number can be.

    >>> perplexity_of(0.0, 3), perplexity_of(1e6, 2)
    (1.0, inf)
    """
    mean = nats / tokens
    try:
        return exp(mean)
    except OverflowError:
        return inf


class _Part(dict[str, float]):
    """The sums over the rows of a process, by name."""

    note = ""


@dataclass(frozen=True, eq=False)
class _Sums:
    """The sums over rows that the figures are made of; the attributes are the arguments of `beside_teacher`."""

    teacher: Model | Served | None
    student: nn.Module
    rows: Rows
    text: bool
    heads: Heads = field(default_factory=Heads)

    @torch.no_grad()
    def over(self, chosen: Int[Tensor, " rows"]) -> _Part:
        """Return the sums over some rows, none of which may be there."""
        found = _Part(dict.fromkeys(("answers", "labelled", "right", "agreed", "kl", "nll", "teacher nll"), 0.0))
        place = None
        with evaluating(self.student), counting("rows", len(chosen)) as count:
            for part in similar_batches(self.rows, ROWS, chosen):
                batch = to_device(self.rows.batch(part), device_of(self.student))
                logits = lazy_answer_of("the model", self.student, students(batch), self.heads)
                place = label_place(self.student, logits, batch, self.rows.table) if place is None else place
                labels = self._labels(logits, batch, place)
                counted = self._counted(logits, batch, labels)
                others = self._teachers(batch)
                if others is not None and (others.shape != logits.shape or (self.text and reads_apart(batch))):
                    found.note = (
                        f"the teacher answers {list(others.shape)} and the student {list(logits.shape)}, each to "
                        "inputs of its own, so their answers are not compared"
                    )
                    others = None
                self._add(found, logits, others, labels, counted)
                count(len(part))
        return found

    def _labels(self, logits: Tensor | LazyLogits, batch: Mapping[str, Tensor], place: Any) -> Tensor | None:
        """Return the class of each answer, −100 where none counts; None where there are none."""
        if "labels" not in batch:
            return _own_tokens(self.student, batch) if self.text else None
        found = answer_labels(batch, place, answer_mask(self.student, batch))
        labels = batch["labels"] if found is None else found
        check_classes(logits, labels, "perplexity" if self.text else "accuracy")
        return labels

    def _counted(self, logits: Tensor | LazyLogits, batch: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        """Return which answers count, `[batch]` or `[batch, token]`."""
        if labels is not None:
            return labels != IGNORED
        real = answer_mask(self.student, batch)
        every = torch.ones(logits.shape[:-1], dtype=torch.bool, device=device_of(self.student))
        return every if real is None or real.shape != every.shape else real.bool()

    def _teachers(self, batch: Mapping[str, Tensor]) -> Tensor | LazyLogits | None:
        """Return the teacher's logits on a batch; None without one."""
        if self.teacher is None:
            return None
        with evaluating(self.teacher):
            given = inputs_of(self.teacher, to_device(teachers(batch), device_of(self.teacher)))
            with self.heads.deferred([(self.teacher, given)] if isinstance(self.teacher, nn.Module) else []):
                ran = run_of(self.teacher, given, resumable=False)
                return lazy_answers(ran) or ran.logits.to(device_of(self.student))

    def _add(
        self,
        found: _Part,
        logits: Tensor | LazyLogits,
        others: Tensor | LazyLogits | None,
        labels: Tensor | None,
        counted: Tensor,
    ) -> None:
        """Add a batch to the sums, some answers at a time."""
        what = "perplexity" if self.text else "agreement with the teacher"
        for some in parts_of(logits, counted, AT_ONCE):
            if not len(some[0]):  # of rows of one token nothing counts
                continue
            own, wanted = logits_at(logits, some), None if labels is None else labels[some].long()
            check_answers(own, what)
            best = own.argmax(-1)
            found["answers"] += len(own)
            if wanted is not None:
                found["labelled"] += len(own)
                found["right"] += int((best == wanted).sum())
                found["nll"] += _nats(own, wanted) if self.text else 0.0
            if others is None:
                continue
            same = logits_at(others, some).to(own.device)
            check_answers(same, what)
            found["agreed"] += int((best == same.argmax(-1)).sum())
            found["kl"] += float(kd(own, same, reduction="none").double().sum())
            found["teacher nll"] += _nats(same, wanted) if self.text and wanted is not None else 0.0


def _nats(logits: Float[Tensor, "answers classes"], labels: Int[Tensor, " answers"]) -> float:
    """Return the sum of the cross-entropies [nats] of some answers."""
    each = widen(logits).log_softmax(-1).gather(-1, labels[:, None])
    return -float(each.double().sum())


def _own_tokens(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the next token of each token that a model reads, in its decoder if it has one, −100 where none counts."""
    decodes = "decoder_input_ids" in batch
    ids, mask = batch["decoder_input_ids" if decodes else "input_ids"], answer_mask(model, batch)
    text = {name: each for name, each in batch.items() if name == "position_ids"}
    labels = answer_labels({**text, "labels": ids}, "next", mask)
    assert labels is not None
    return labels
