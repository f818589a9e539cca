"""Distillation between models with different tokenizers, by text span.

Positions are paired at which both models have read the same characters. There each softmax is pooled over tokens that
mean the same, p(m) = Σ_{tokens t of meaning m} softmax(z / τ)_t, with one more bin for tokens that the other vocabulary
lacks, and the loss is the divergence between the pooled distributions, times τ².

Boizard et al. 2024 (arXiv:2402.12030) compare sorted probabilities instead; Minixhofer et al. 2025 (arXiv:2503.20083)
align chunks of text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.data.pad_ids import pad_id_of
from distill.data.rows import Rows
from distill.data.token_meanings import Shared, shared_meanings
from distill.errors import DistillError, checked
from distill.losses import Divergence, forward_kl
from distill.precision import widen
from interventions import shown

_NOWHERE = 2**31


class Spans(NamedTuple):
    """Paired positions of two tokenizers, `[pairs]` each: the row, the student's and the teacher's position."""

    rows: Int[Tensor, " pairs"]
    student: Int[Tensor, " pairs"]
    teacher: Int[Tensor, " pairs"]


@checked
@dataclass(frozen=True, eq=False)
class TokenAlignment:
    """The tokenizers of a teacher and a student with different vocabularies, for distillation by text span.

    `rows` tokenizes texts for both; `spans` finds where both have read the same text; `shared` has the tokens that mean
    the same. `span_kd` compares the answers there, and `SpanKD(alignment)` is the objective.

    Boizard et al. 2024 (arXiv:2402.12030), who sort probabilities instead of matching tokens; Minixhofer et al. 2025
    (arXiv:2503.20083).

    Args:
        teacher: a fast Hugging Face tokenizer.
        student: another.

    Raises:
        DistillError: a tokenizer that gives no places of its tokens in the text.
    """

    teacher: Any
    student: Any

    def __post_init__(self) -> None:
        for side, tokenizer in (("teacher", self.teacher), ("student", self.student)):
            if not getattr(tokenizer, "is_fast", False):
                raise DistillError(
                    f"the tokenizer of the {side} is a {type(tokenizer).__name__}, which does not say where its tokens "
                    "stand in the text; use a fast one: AutoTokenizer.from_pretrained(…, use_fast=True)."
                )

    @checked
    def rows(self, texts: Sequence[str], labels: Any = None, *, max_length: int = 128) -> Rows:
        """Return the texts as rows with the tokens of both models, padded on the right.

        The columns are what the student's tokenizer returns, with `special_tokens_mask`; the same for the teacher, with
        names that begin with `teacher_`; and for both `starts` and `ends`: the characters between which a token stands,
        without whitespace before it, −1 for special tokens.

        Args:
            texts: the texts.
            labels: the column `labels`, one number or several for each text.
            max_length: each text is cut at this number of tokens, separately for each tokenizer.

        Raises:
            DistillError: no texts, one without a token, or labels that do not fit.
        """
        if not texts:
            raise DistillError("rows(texts) takes a list of texts, at least one; e.g. rows(['A text.', 'Another.']).")
        if max_length < 1:
            raise DistillError(f"max_length={max_length} leaves nothing of a text; use e.g. max_length=128.")
        table: dict[str, Any] = {
            **_columns(self.student, texts, max_length),
            **{f"teacher_{name}": column for name, column in _columns(self.teacher, texts, max_length).items()},
        }
        if labels is not None:
            table["labels"] = _labels(labels, len(texts))
        return Rows(table, pad_id=pad_id_of(self.student), pads={"teacher_input_ids": pad_id_of(self.teacher)})

    @checked
    def spans(self, batch: Mapping[str, Tensor], by: str = "prefix") -> Spans:
        """Return the positions at which both tokenizers have read the same text.

        Args:
            batch: a batch of `rows`.
            by: "prefix" pairs tokens that end at the same character, for causal language models, which predict what
                comes next; "token" pairs tokens that stand for the same characters, for masked language models.

        Raises:
            DistillError: a batch of other rows, or no pair at all.
        """
        found = self.found(batch, by)
        if not len(found.rows):
            tokens = [int((batch[name] >= 0).sum()) for name in ("ends", "teacher_ends")]
            raise DistillError(
                f"of the {tokens[0]} tokens of the student and the {tokens[1]} of the teacher in this batch of "
                f"{len(batch['ends'])} texts none are paired (by={by!r}), so there is nothing to compare; give longer "
                "texts or larger batches, or look at alignment.rows(texts).batch([0])."
            )
        return found

    def found(self, batch: Any, by: str = "prefix") -> Spans:
        """Return the same as `spans`, also if there is no pair at all."""
        if by not in ("prefix", "token"):
            raise DistillError(f"by={by!r} does not pair tokens; use by='prefix' or by='token'.")
        missing = [name for name in ("starts", "ends", "teacher_starts", "teacher_ends") if name not in batch]
        if missing:
            raise DistillError(
                f"tokens are aligned by the column {missing[0]!r} and the data has {', '.join(batch)}; make it with "
                "data=alignment.rows(texts)."
            )
        starts, ends, teacher_starts, teacher_ends = (
            batch[f"{side}{edge}"] for side in ("", "teacher_") for edge in ("starts", "ends")
        )
        same = ends[:, :, None] == teacher_ends[:, None]
        student, teacher = _boundaries(starts, ends), _boundaries(teacher_starts, teacher_ends)
        if by == "token":
            same = same & (starts[:, :, None] == teacher_starts[:, None])
            student, teacher = student & _begins_new(starts, ends), teacher & _begins_new(teacher_starts, teacher_ends)
        return Spans(*(same & student[:, :, None] & teacher[:, None]).nonzero(as_tuple=True))

    @cached_property
    def shared(self) -> Shared:
        """The tokens of both vocabularies that mean the same, as `shared_meanings` finds them."""
        return shared_meanings(self.student, self.teacher)


def span_kd(
    student_logits: Float[Tensor, "batch token student_vocabulary"],
    teacher_logits: Float[Tensor, "batch teacher_token teacher_vocabulary"],
    spans: Spans,
    shared: Shared,
    temperature: float = 1.0,
    *,
    scale_t2: bool = True,
    divergence: Divergence = forward_kl,
) -> Float[Tensor, ""]:
    """Return the divergence [nats / pair] between both models at paired positions, times temperature².

    Each softmax is over the model's own vocabulary at the temperature. Then the probabilities of tokens that mean the
    same are added, and those of all tokens that the other vocabulary lacks. The mean is over the pairs of positions.
    With the same tokenizer on both sides this is `kd` over the paired positions.

    Raises:
        DistillError: a temperature that is not above 0, or fewer logits than tokens.
    """
    if not temperature > 0:
        raise DistillError(
            f"span_kd needs a temperature above 0: temperature={temperature}; temperature=1 softens nothing."
        )
    student = student_logits[spans.rows, spans.student]
    teacher = teacher_logits[spans.rows, spans.teacher]
    return pooled_kd(student, teacher, shared, temperature, scale_t2=scale_t2, divergence=divergence)


def pooled_kd(
    student_logits: Float[Tensor, "pairs student_vocabulary"],
    teacher_logits: Float[Tensor, "pairs teacher_vocabulary"],
    shared: Shared,
    temperature: float = 1.0,
    *,
    scale_t2: bool = True,
    divergence: Divergence = forward_kl,
) -> Float[Tensor, ""]:
    """Return `span_kd` from the logits at the paired positions."""
    pooled = shared_log_probabilities(student_logits, teacher_logits, shared, temperature)
    return divergence(*pooled).mean() * (temperature**2 if scale_t2 else 1)


def shared_log_probabilities(
    student_logits: Float[Tensor, "pairs student_vocabulary"],
    teacher_logits: Float[Tensor, "pairs teacher_vocabulary"],
    shared: Shared,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, "pairs meanings"], Float[Tensor, "pairs meanings"]]:
    """Return log-probabilities of student and teacher over the shared meanings, other tokens in the last column.

    If one of them has no other tokens, the last column is left out and the probabilities of both are those among the
    shared meanings: a divergence from a distribution that cannot give the rest any probability would be infinite.
    """
    bins = [
        _widen_bins(each, logits.shape[-1], shared.count, side).to(logits.device)
        for each, logits, side in (
            (shared.student, student_logits, "student"),
            (shared.teacher, teacher_logits, "teacher"),
        )
    ]
    has_rest = all(bool((each == shared.count).any()) for each in bins)
    pooled = [
        _pool(widen(logits) / temperature, each, shared.count + 1)
        for logits, each in zip((student_logits, teacher_logits), bins, strict=True)
    ]
    if not has_rest:
        pooled = [each[:, :-1] for each in pooled]
    return pooled[0].log_softmax(-1), pooled[1].log_softmax(-1)


def _widen_bins(bins: Tensor, width: int, rest: int, side: str) -> Tensor:
    """Return the bin of each logit: models often have more logits than their tokenizer has tokens."""
    if width < len(bins):
        raise DistillError(
            f"the {side} has {width} logits and its tokenizer {len(bins)} tokens; give the tokenizers that "
            "the models were trained with: TokenAlignment(teacher_tokenizer, student_tokenizer)."
        )
    return torch.cat([bins, bins.new_full((width - len(bins),), rest)])


def _pool(logits: Tensor, bins: Tensor, count: int) -> Tensor:
    """Return the logarithm of the sum of exponentials in each bin, `[pairs, count]`; −∞ in an empty bin."""
    empty = logits.new_full((len(logits), count), -torch.inf)
    if len(bins) == len(bins.unique()):  # one token a bin: nothing is added, so nothing is rounded
        return empty.index_copy(1, bins, logits)
    # The largest is subtracted for precision only: its gradient cancels.
    least = torch.finfo(logits.dtype).min
    largest = empty.scatter_reduce(1, bins.expand_as(logits), logits.detach(), "amax").clamp(min=least)
    summed = torch.zeros_like(empty).index_add(1, bins, (logits - largest[:, bins]).exp())
    return (largest + summed.clamp(min=torch.finfo(logits.dtype).tiny).log()).where(summed > 0, empty)


def _columns(tokenizer: Any, texts: Sequence[str], max_length: int) -> dict[str, list[Tensor]]:
    limit = min(max_length, tokenizer.model_max_length)
    encoded = tokenizer(
        list(texts), truncation=True, max_length=limit, return_special_tokens_mask=True, return_offsets_mapping=True
    )
    offsets = encoded.pop("offset_mapping")
    table = {name: [torch.tensor(row, dtype=torch.long) for row in rows] for name, rows in encoded.items()}
    places: list[Tensor] = []
    for text, row, special in zip(texts, offsets, table["special_tokens_mask"], strict=True):
        found = [(-1, -1) if odd else _trim(text, *place) for place, odd in zip(row, special.tolist(), strict=True)]
        places.append(torch.tensor(found, dtype=torch.long).reshape(-1, 2))
    empty = next((i for i, row in enumerate(places) if not len(row)), None)
    if empty is not None:
        raise DistillError(f"text {empty}, {texts[empty]!r}, has no token for the tokenizer; leave it out.")
    return {**table, "starts": [row[:, 0] for row in places], "ends": [row[:, 1] for row in places]}


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """Return a place without the whitespace in front, which some tokenizers include in a token and others drop."""
    while start < end and text[start].isspace():
        start += 1
    return start, end


def _labels(given: Any, count: int) -> Tensor:
    """Return labels as a tensor, one number or several for each text."""
    try:
        labels = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise DistillError(f"labels={shown(given)} are no numbers ({reason}); give e.g. labels=[0, 1].") from None
    real = not labels.is_meta and not labels.is_complex() and labels.layout == torch.strided
    if not labels.ndim or len(labels) != count or not real or not bool(labels.isfinite().all()):
        raise DistillError(
            f"labels of shape {tuple(labels.shape)} ({labels.dtype}) are not a finite number for each of {count} "
            "texts; give e.g. labels=[0, 1]."
        )
    return labels


def _boundaries(starts: Int[Tensor, "batch token"], ends: Int[Tensor, "batch token"]) -> Bool[Tensor, "batch token"]:
    """Return the tokens at whose end all text up to there was read; of a letter in several tokens only the last."""
    real = ends >= 0
    return real & (ends > 0) & (_least_after(starts, real) >= ends) & (_least_after(ends, real) > ends)


def _least_after(values: Tensor, real: Tensor) -> Tensor:
    """Return the least of the values of all later tokens."""
    least = values.masked_fill(~real, _NOWHERE).flip(1).cummin(1).values.flip(1)
    return torch.cat([least[:, 1:], torch.full_like(least[:, :1], _NOWHERE)], 1)


def _begins_new(starts: Tensor, ends: Tensor) -> Tensor:
    """Return which tokens begin after all earlier tokens have ended."""
    most = ends.cummax(1).values
    return starts >= torch.cat([torch.full_like(most[:, :1], -1), most[:, :-1]], 1)
