"""Attention scores and patterns of a source, arranged by the keys of its base.

A row of attention has an entry for each key, so its length is that of the padded text, and with padding on the left the
same token stands in another column. Key number i of the source, counted over real tokens, moves to the column of key
number i of the base. Keys that only the base has get no attention, and keys that only the source has are left out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from distill.errors import DistillError
from distill.models.inputs import real_tokens
from distill.teachers.served import ServedRun
from distill.teachers.verbs import shape_of
from interventions import Location, Run, architecture

KEYED = ("attention_scores", "attention_pattern")


def over_keys(
    base: Run, source: Run, places: Iterable[Location], batch: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> Run:
    """Return the source run with its attention arranged by the keys of the base; without attention, the run itself.

    Args:
        base, source: runs of one model.
        places: the locations that will be taken from the source.
        batch, other: the columns that base and source were run on, with their masks.

    Raises:
        DistillError: attention of a served teacher, with base and source of different lengths.
    """
    whole = list(dict.fromkeys(at.whole for at in places))
    kinds = {at: architecture(base.model).place(at).io for at in whole}
    if not any(kind in KEYED for kind in kinds.values()):
        return source
    if isinstance(source, ServedRun):
        for at in (at for at, kind in kinds.items() if kind in KEYED):
            _refuse_ragged(base, at, batch, other)
        return source
    states: dict[Location, Tensor] = {at: source.activations[at] for at in whole}
    for at, kind in kinds.items():
        if kind in KEYED:
            pairs = ((base, batch), (source, other))
            here, there = (_real_keys(each, at, columns) for each, columns in pairs)
            hidden = 0.0 if kind == "attention_pattern" else torch.finfo(states[at].dtype).min
            states[at] = move_to_keys(states[at], there, here, hidden)
    return replace(source, activations=states)


def _refuse_ragged(base: Run, at: Location, batch: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Raise DistillError if attention would have to be rearranged in a run of a served teacher."""
    mask = _mask_of_keys(base, at)
    if mask in batch and not (mask in other and torch.equal(batch[mask], other[mask])):
        raise DistillError(
            f"{at} of a served teacher has a column for each key, and base and source differ in length or padding; "
            "give the model itself as teacher, or rows of one length."
        )


def move_to_keys(
    rows: Float[Tensor, "batch head query keys"],
    of: Bool[Tensor, "batch keys"],
    to: Bool[Tensor, "batch other"],
    hidden: float,
) -> Float[Tensor, "batch head query other"]:
    """Return rows of attention with each entry in the column of the other text's key of the same number.

    Args:
        rows: attention over the keys of one text.
        of: which keys of that text are real; on the host, as both masks are compared.
        to: which keys of the other text are real.
        hidden: the entry of a key that gets no attention, and of padding.

    >>> row = torch.tensor([[[[0.0, 0.25, 0.75]]]])
    >>> move_to_keys(row, torch.tensor([[False, True, True]]), torch.tensor([[True, True, True]]), 0.0).tolist()
    [[[[0.25, 0.75, 0.0]]]]
    """
    if torch.equal(of, to):
        return rows
    number = (to.cumsum(1) - 1).clamp(0, of.shape[1] - 1)
    columns = torch.argsort((~of).int(), dim=1, stable=True).gather(1, number)
    known = to & (to.cumsum(1) <= of.sum(1, keepdim=True))
    columns, known = (each.to(rows.device, non_blocking=True) for each in (columns, known))
    taken = rows.gather(-1, repeat(columns, "b k -> b h q k", h=rows.shape[1], q=rows.shape[2]))
    return taken.masked_fill(~rearrange(known, "b k -> b 1 1 k"), hidden)


def _real_keys(base: Run, at: Location, batch: Mapping[str, Tensor]) -> Bool[Tensor, "batch keys"]:
    """Return which keys of an attention are no padding: its own tokens, or those of the encoder that it attends to."""
    rows, keys = shape_of(base, at)[0], shape_of(base, at)[-1]
    mask = _mask_of_keys(base, at)
    fits = mask in batch and batch[mask].shape == (rows, keys)
    return real_tokens(batch, rows, keys, torch.device("cpu"), column=mask if fits else "")


def _mask_of_keys(base: Run, at: Location) -> str:
    found = architecture(base.model)
    return found.side_of_keys(found.place(at)).mask
