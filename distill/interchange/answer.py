"""Answer: the position at which a model answers is interchanged, e.g. [CLS] of a BERT or the last token of a decoder.

Where it is can be said, as a token counted from the first or the last real one, or found on a few rows: it is the only
token at the output of the last block on which the logits depend.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distill.errors import DistillError, checked
from distill.interchange.positions import Masks, PositionRule, by_rank
from distill.interchange.vacuous import visible
from distill.models.inputs import decoder_masked, evaluating, inputs_of, real_tokens, students
from distill.models.loss_masks import TOKENS, label_place, loss_masks
from distill.teachers.verbs import grid_of, run_of
from interventions import InterventionError, Location, Run, architecture


@checked
@dataclass(frozen=True)
class Answer:
    """The position at which a model answers, in base and source: [CLS] of a BERT, the last token of a decoder.

    Args:
        token: its number among the real tokens, from 0, or from the end: −1 is the last one, on whichever side the
            padding is. None finds it on a few rows, as `resolved` says.
    """

    token: int | None = None

    def numbers(self, width: int) -> int:
        """Return 0: nothing is drawn."""
        return 0

    def eligible(self, batch: Mapping[str, Tensor], real: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        """Return the real positions."""
        return real

    def draw(
        self,
        base: Bool[Tensor, "b t"],
        source: Bool[Tensor, "b s"],
        uniform: Float[Tensor, "b 2 w"],
        *,
        aligned: bool = False,
    ) -> Masks:
        """Return the position to write in the base and that to read in the source, as masks.

        Args:
            base, source: the real positions.
            uniform, aligned: not used.

        Raises:
            DistillError: an example that is too short to have the token, or a rule that was not resolved for a model.
        """
        return self._at(base), self._at(source)

    def _at(self, real: Tensor) -> Tensor:
        """Return the token of each example, as a mask."""
        if self.token is None:
            raise DistillError(
                "Answer() is not known for a model yet, as its token is found on a few rows by fit and "
                "interchange_accuracy; name it: Answer(token=0) or Answer(token=-1)."
            )
        lengths = real.sum(1)
        rank = lengths + self.token if self.token < 0 else torch.full_like(lengths, self.token)
        outside = (rank < 0) | (rank >= lengths)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise DistillError(
                f"Answer(token={self.token}) does not exist in row {row} of the batch, which has {int(lengths[row])} "
                f"real tokens; use Answer(token={-1 if self.token < 0 else 0})."
            )
        return by_rank(torch.arange(real.shape[1], device=real.device) == rank[:, None], real)


def resolved(
    rule: PositionRule | None, model: Any, batch: Mapping[str, Tensor], places: Sequence[Location] = ()
) -> PositionRule | None:
    """Return a rule of positions for a model; any but `Answer()` is returned as it is.

    The answering position is the token at the output of the last block on which the logits depend, by gradients. A
    model that answers at every token (a language model, a token classifier) answers last at the last token whose answer
    counts, by the labels; without labels at the last real token.

    Args:
        rule: the rule; None takes all positions.
        model: the model that answers, a torch model or one of nnsight.
        batch: a few rows, on the device of the model.
        places: locations of the model. The first one takes the place of the last block in a model without blocks.

    Raises:
        DistillError: a model whose answer depends on several tokens there, e.g. on their mean, or on another token in
            each row.
    """
    if not isinstance(rule, Answer) or rule.token is not None:
        return rule
    at = _end_of(model, places)
    if at is None:
        return rule
    columns = students(batch)
    with evaluating(model), torch.no_grad():
        ran = run_of(model, inputs_of(model, columns), [at])
    if len(grid_of(ran, at)) < 2:
        return rule
    masked = decoder_masked(model, columns)
    if ran.logits.ndim == 3:
        return Answer(_last_that_counts(model, ran, masked))
    with evaluating(model):
        seen = visible(ran, [at], torch.ones(len(ran.logits), device=ran.logits.device))[at]
    rows, width = seen.shape
    real = real_tokens(masked, rows, width, seen.device, column=architecture(model).place(at).mask)
    token = _same_in_all(seen & real, real)
    if token is None:
        counts = (seen & real).sum(1)
        raise DistillError(
            f"Answer() finds no answering position in this {type(model).__name__}: its answers depend on "
            f"{_few(counts)} tokens of a row at {at}; name a token, Answer(token=0) or Answer(token=-1), or use "
            "Span(0.3)."
        )
    return Answer(token)


def _end_of(model: Any, places: Sequence[Location]) -> Location | None:
    """Return the output of the last block; of a model without blocks the first of these places, if any."""
    try:
        architecture(model).place(Location(-1))
    except InterventionError:
        return places[0] if places else None
    return Location(-1)


def _last_that_counts(model: Any, ran: Run, batch: Mapping[str, Tensor]) -> int:
    """Return the token with the last answer that counts, from the end; −1 where it differs from row to row."""
    rows, width = ran.logits.shape[:2]
    place = label_place(model, ran.logits, batch)
    mask = loss_masks(model, batch, place)[TOKENS]
    if mask is None or mask.shape != (rows, width):
        return -1
    column = "decoder_attention_mask" if "decoder_attention_mask" in batch else "attention_mask"
    real = real_tokens(batch, rows, width, mask.device, column=column)
    last = (mask & real) & ((mask & real).flip(1).cumsum(1).flip(1) == 1)
    after = (real & (last.cumsum(1) > 0)).sum(1)
    return -int(after[0]) if bool((after == after[0]).all()) and int(after[0]) else -1


def _same_in_all(chosen: Tensor, real: Tensor) -> int | None:
    """Return the number of the one chosen token, from the nearer end, None if there is none that all rows share."""
    if not bool((chosen.sum(1) == 1).all()):
        return None
    column = chosen.int().argmax(1, keepdim=True)
    first = (real.cumsum(1) - 1).gather(1, column)[:, 0]
    last = first - real.sum(1)
    from_ends = [int(each[0]) for each in (first, last) if bool((each == each[0]).all())]
    return min(from_ends, key=lambda token: token if token >= 0 else -token - 1, default=None)


def _few(counts: Tensor) -> str:
    """Return a range of counts as text."""
    low, high = int(counts.min()), int(counts.max())
    return f"other {low}" if low == high == 1 else f"{low}" if low == high else f"{low} to {high}"
