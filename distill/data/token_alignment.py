"""Two tokenizers on the same text: which of their tokens end at the same character, and which mean the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.data.rows import Rows
from distill.data.token_meanings import Shared, shared_meanings
from distill.errors import DistillError, checked
from distill.losses import Divergence, forward_kl
from distill.precision import widen
from interventions import shown

_NOWHERE = 2**31


class Spans(NamedTuple):
    """Positions of both tokenizers that belong together, `[pairs]` each: the row, the student's and the teacher's."""

    rows: Int[Tensor, " pairs"]
    student: Int[Tensor, " pairs"]
    teacher: Int[Tensor, " pairs"]


@checked
@dataclass(frozen=True, eq=False)
class TokenAlignment:
    """The tokenizers of a teacher and of a student that read different tokens, for distillation by text span.

    `rows` tokenises texts for both; `spans` says where both have read the same text; `shared` which tokens mean the
    same. `span_kd` compares the answers there, and `SpanKD(alignment)` is the objective.

    That models of different tokenizers are compared by text: Boizard et al. 2024 (arXiv:2402.12030), who sort the
    probabilities where we match the tokens; Minixhofer et al. 2025 (arXiv:2503.20083).

    Args:
        teacher: a fast Hugging Face tokenizer.
        student: another.

    Raises:
        DistillError: a tokenizer that cannot say where its tokens stand in the text.
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
        """The texts as both models read them, padded on the right.

        Columns: what the student's tokenizer returns, with `special_tokens_mask`; the same for the teacher, each name
        after `teacher_`; and for both `starts` and `ends`: the characters between which a token stands, whitespace
        before it left out, −1 for special tokens.

        Args:
            texts: each is cut at `max_length` tokens, of each tokenizer for itself.
            labels: become the column `labels`.
            max_length: of either tokenizer.
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
        return Rows(table, pad_id=_pad(self.student), pads={"teacher_input_ids": _pad(self.teacher)})

    @checked
    def spans(self, batch: Mapping[str, Tensor], by: str = "prefix") -> Spans:
        """Where both tokenizers have read the same text.

        Args:
            batch: of `rows`.
            by: "prefix" pairs tokens after which the same text has been read, for causal language models, whose answer
                there is what comes next; "token" pairs those that stand for the same characters, for masked ones.

        Raises:
            DistillError: a batch of other rows, or none in common.
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
        """As `spans`, with none where there are none."""
        if by not in ("prefix", "token"):
            raise DistillError(f"by={by!r} does not pair tokens; use by='prefix' or by='token'.")
        missing = [name for name in ("starts", "ends", "teacher_starts", "teacher_ends") if name not in batch]
        if missing:
            raise DistillError(
                f"tokens are aligned by the column {missing[0]!r} and the data has {', '.join(batch)}; make it with "
                "data=alignment.rows(texts)."
            )
        (starts, ends), (others, theirs) = ((batch[f"{side}starts"], batch[f"{side}ends"]) for side in ("", "teacher_"))
        same = ends[:, :, None] == theirs[:, None]
        here, there = _boundaries(starts, ends), _boundaries(others, theirs)
        if by == "token":
            same = same & (starts[:, :, None] == others[:, None])
            here, there = here & _alone(starts, ends), there & _alone(others, theirs)
        return Spans(*(same & here[:, :, None] & there[:, None]).nonzero(as_tuple=True))

    @cached_property
    def shared(self) -> Shared:
        """Which tokens of both vocabularies mean the same, as `shared_meanings` finds them."""
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
    """Divergence [nats / pair] between what both models say where they have read the same, times temperature².

    Each softmax is over the model's own vocabulary at the temperature; then the probabilities of tokens that mean the
    same are added up, and those of all that the other vocabulary lacks. The mean is over the pairs of positions. For
    one tokenizer on both sides it is `kd` over the positions paired.
    """
    if not temperature > 0:
        raise DistillError(
            f"span_kd needs a temperature above 0: temperature={temperature}; temperature=1 softens nothing."
        )
    student = student_logits[spans.rows, spans.student]
    teacher = teacher_logits[spans.rows, spans.teacher]
    pooled = shared_log_probabilities(student, teacher, shared, temperature)
    return divergence(*pooled).mean() * (temperature**2 if scale_t2 else 1)


def shared_log_probabilities(
    student_logits: Float[Tensor, "pairs student_vocabulary"],
    teacher_logits: Float[Tensor, "pairs teacher_vocabulary"],
    shared: Shared,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, "pairs meanings"], Float[Tensor, "pairs meanings"]]:
    """Log-probabilities of student and teacher over what both can say, and of all the rest in the last column.

    Where one of them has no rest, because the other knows all its tokens, none has a column for it: the probabilities
    of both are then those among the shared meanings, since no finite divergence could hold it against the one that it
    cannot say the rest.
    """
    bins = [
        _widened_bins(each, logits.shape[-1], shared.count, side).to(logits.device)
        for each, logits, side in (
            (shared.student, student_logits, "student"),
            (shared.teacher, teacher_logits, "teacher"),
        )
    ]
    has_rest = all(bool((each == shared.count).any()) for each in bins)
    pooled = [
        _pooled(widen(logits) / temperature, each, shared.count + 1)
        for logits, each in zip((student_logits, teacher_logits), bins, strict=True)
    ]
    if not has_rest:
        pooled = [each[:, :-1] for each in pooled]
    return pooled[0].log_softmax(-1), pooled[1].log_softmax(-1)


def _widened_bins(bins: Tensor, width: int, rest: int, side: str) -> Tensor:
    """The bin of each logit: models often have more than their tokenizer has tokens."""
    if width < len(bins):
        raise DistillError(
            f"the {side} has {width} logits and its tokenizer {len(bins)} tokens; give the tokenizers that "
            "the models were trained with: TokenAlignment(teacher_tokenizer, student_tokenizer)."
        )
    return torch.cat([bins, bins.new_full((width - len(bins),), rest)])


def _pooled(logits: Tensor, bins: Tensor, count: int) -> Tensor:
    """The logarithm of the sum of exponentials in each bin, `[pairs, count]`; −∞ in an empty one."""
    empty = logits.new_full((len(logits), count), -torch.inf)
    if len(bins) == len(bins.unique()):  # one token a bin: nothing is added up, so that no rounding comes in
        return empty.index_copy(1, bins, logits)
    # The largest is taken out for precision alone: its gradient cancels.
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
        found = [(-1, -1) if odd else _trimmed(text, *place) for place, odd in zip(row, special.tolist(), strict=True)]
        places.append(torch.tensor(found, dtype=torch.long).reshape(-1, 2))
    empty = next((i for i, row in enumerate(places) if not len(row)), None)
    if empty is not None:
        raise DistillError(f"text {empty}, {texts[empty]!r}, has no token for the tokenizer; leave it out.")
    return {**table, "starts": [row[:, 0] for row in places], "ends": [row[:, 1] for row in places]}


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Without the whitespace in front, which some tokenizers count to a token and others drop."""
    while start < end and text[start].isspace():
        start += 1
    return start, end


def _labels(given: Any, count: int) -> Tensor:
    """One number a text, or several."""
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


def _pad(tokenizer: Any) -> int:
    return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)


def _boundaries(starts: Int[Tensor, "batch token"], ends: Int[Tensor, "batch token"]) -> Bool[Tensor, "batch token"]:
    """After which tokens the text up to their end has been read: none of a letter in several tokens but the last."""
    real = ends >= 0
    return real & (ends > 0) & (_least_after(starts, real) >= ends) & (_least_after(ends, real) > ends)


def _least_after(values: Tensor, real: Tensor) -> Tensor:
    """The least of the values of all later tokens."""
    least = values.masked_fill(~real, _NOWHERE).flip(1).cummin(1).values.flip(1)
    return torch.cat([least[:, 1:], torch.full_like(least[:, :1], _NOWHERE)], 1)


def _alone(starts: Tensor, ends: Tensor) -> Tensor:
    """Which tokens begin after all before them have ended."""
    most = ends.cummax(1).values
    return starts >= torch.cat([torch.full_like(most[:, :1], -1), most[:, :-1]], 1)
