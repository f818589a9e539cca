"""A warning about padding on the side that changes the answers of a model.

BERT's classifiers read the first position of a row and XLNet's the last, which must not be padding; BART and others
count positions from the start of the row and take no `position_ids`. transformers warns of neither.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

LOOKED_AT = 256
"""The number of rows that are read to find whether texts are padded."""
CHANGED = 1e-3
"""The least change of an answer that is warned about, as a share of the largest answer."""


def padded_rows(masks: Any) -> list[int]:
    """Return the row numbers of the shortest and the longest of the first texts; none if all have one length."""
    lengths = [int(mask.sum()) for mask in masks[:LOOKED_AT]]
    shortest, longest = (choose(range(len(lengths)), key=lengths.__getitem__) for choose in (min, max))
    return [shortest, longest] if lengths[shortest] < len(masks[longest]) else []


def warn_if_on_wrong_side(
    kind: str, columns: Mapping[str, Tensor], answer: Callable[[Mapping[str, Tensor]], Tensor | None]
) -> None:
    """Warn if padding changes the answer to the first text, and padding on the other side would not.

    Args:
        kind: the name of the model, for the warning.
        columns: the columns of a batch.
        answer: returns the logits of the model for such columns.
    """
    mask = columns.get("attention_mask")
    if mask is None or mask.ndim != 2 or any("position_ids" in name or "decoder" in name for name in columns):
        return
    width, real = mask.shape[1], mask[0].bool()
    places = real.nonzero()[:, 0].tolist()
    count = len(places)
    if count in (0, width) or places[-1] - places[0] + 1 != count or (places[0] and places[-1] < width - 1):
        return  # without padding, with holes, or with padding on both sides
    side, other, shift = ("left", "right", count - width) if places[0] else ("right", "left", width - count)

    def answers(change: Callable[[Tensor], Tensor], kept: Bool[Tensor, " token"]) -> Tensor | None:
        of_tokens = {name for name, column in columns.items() if column.shape[:2] == mask.shape}
        found = answer({name: change(x[:1]) if name in of_tokens else x[:1] for name, x in columns.items()})
        if found is None or found.ndim < 3:
            return found
        return found[:, kept.to(found.device)] if found.shape[1] == len(kept) else None

    alone = answers(lambda column: column[:, real], real[real])
    here = answers(lambda column: column, real)
    off = _difference(here, alone)
    if off is None or not off > CHANGED:
        return
    before = torch.get_rng_state()
    drawn = _difference(answers(lambda column: column[:, real], real[real]), alone)
    if drawn is None or drawn > off / 20 or not torch.equal(before, torch.get_rng_state()):
        return  # its answers are random, as those of a NoisyTeacher
    there = _difference(answers(lambda column: column.roll(shift, 1), real.roll(shift)), alone)
    if there is not None and there < off / 20:
        warnings.warn(
            f"{kind} answers otherwise where a text is padded on the {side} (by {off:.1%} of its largest answer), and "
            f"not where it is padded on the {other}; pad there: tokenizer.padding_side = {other!r}, "
            f"Rows.of(…, padding_side={other!r}).",
            stacklevel=2,
        )


def _difference(one: Tensor | None, other: Tensor | None) -> float | None:
    """Return the largest difference of answers, as a share of the largest answer; None for different shapes."""
    if one is None or other is None or one.shape != other.shape:
        return None
    return float((one - other).abs().max() / other.abs().max().clamp(min=torch.finfo(other.dtype).tiny))
