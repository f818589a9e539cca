"""Whether positions name the tokens of each stack: its own, and not those of the call."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from interventions import InterventionError, Location, intervene, record
from interventions.analysis.sweeping.batch_sweeps import real_tokens
from interventions.models.architectures import architecture
from interventions.models.axes import to_vectors
from tests.conformance.cases import Case, seeded

PADDED = 2  # tokens of the first example, where the law is about padding
CHANGED = 1  # a token of plain text in every batch of `tests.conformance.inputs`


def positions(case: Case) -> str | None:
    """Positions write exactly the tokens that they name among those of the stack, and "each" covers these."""
    places, flat = [], []
    for stack in case.live():
        at = case.at(stack, case.ran[stack.name][len(case.ran[stack.name]) // 2])
        (places if vectors(case, at, case.runs[0].activations.calls(at)[0]).ndim > 2 else flat).append(at)
    return first(refused(case, at) for at in flat) or exact(case, places) or padded(case, places)


def first(reasons: object) -> str | None:
    return next((reason for reason in reasons if reason), None)  # type: ignore[attr-defined]


def vectors(case: Case, at: Location, state: Tensor) -> Tensor:
    return to_vectors(state, architecture(case.model).place(at).axes_of(state))


def refused(case: Case, at: Location) -> str | None:
    """A place without tokens says so in one line."""
    try:
        with seeded(), intervene(case.model, {at: mirrored}, positions=-1):
            case.model(**case.base)
    except InterventionError as error:
        return None if "has no positions" in str(error) and "\n" not in str(error) else str(error)
    return f"{at} has no tokens, and positions=-1 is written there"


def mirrored(base: Tensor, source: None, generator: None) -> Tensor:
    """Another number everywhere, however large or small it is."""
    return 1 - base


def exact(case: Case, places: list[Location]) -> str | None:
    """The last token, the first, the last two and those of a mask are written, each alone, in one run."""
    widths = {at: vectors(case, at, case.runs[0].activations.calls(at)[0]).shape[:2] for at in places}
    masks = {at: torch.arange(width) % 2 == torch.arange(batch)[:, None] % 2 for at, (batch, width) in widths.items()}
    masks = {at: mask if mask.any() else ~mask for at, mask in masks.items()}
    choices = (-1, 0, slice(-2, None), masks) if places else ()
    for asked, found in zip(choices, written_at(case, places, choices, case.base), strict=True):
        for at, written in found.items():
            wanted = masks[at] if asked is masks else torch.zeros_like(written)
            if asked is not masks:
                wanted[:, asked] = True
            if not torch.equal(written, wanted):
                name = "a mask" if asked is masks else f"positions={asked}"
                return f"{at}: {name} writes {written[0].nonzero().flatten().tolist()} of {written.shape[1]} tokens"
    short = [at for at, (_, width) in widths.items() if real_tokens(case.runs[0], at).sum(1).max() != width]
    return f'{short[0]}: "each" is other than its {widths[short[0]][1]} tokens' if short else None


def written_at(
    case: Case, places: list[Location], choices: Sequence[object], inputs: dict[str, object]
) -> list[dict[Location, Tensor]]:
    """Which tokens of each place each choice of positions writes, `[batch, token]`: all in one run, if that works."""
    try:
        return written_together(case, places, choices, inputs)
    except Exception:  # a stack may have other tokens where one before it is written
        found: list[dict[Location, Tensor]] = [{} for _ in choices]
        for at in places:
            mine = [{at: each[at]} if isinstance(each, dict) else each for each in choices]
            for every, one in zip(found, written_together(case, [at], mine, inputs), strict=True):
                every.update(one)
        return found


def written_together(
    case: Case, places: list[Location], choices: Sequence[object], inputs: dict[str, object]
) -> list[dict[Location, Tensor]]:
    """Blocks of interventions that nest write one after the other, and what is read between them shows each."""
    with ExitStack() as stack:
        states = [stack.enter_context(record(case.model, places))]
        for asked in choices:
            stack.enter_context(intervene(case.model, dict.fromkeys(places, mirrored), positions=asked))
            states.append(stack.enter_context(record(case.model, places)))
        stack.enter_context(seeded())
        case.model(**inputs)
    return [
        {at: differing(case, at, before.calls(at)[0], after.calls(at)[0]) for at in places}
        for before, after in pairwise(states)
    ]


def differing(case: Case, at: Location, state: Tensor, other: Tensor) -> Tensor:
    """Which tokens differ, `[batch, token]`."""
    pair = (torch.nan_to_num(vectors(case, at, each), 7e7) for each in (state, other))
    return torch.ne(*pair).flatten(2).any(-1)


def padded(case: Case, places: list[Location]) -> str | None:
    """Padding of the text counts where a stack is given the text token by token, and nowhere else."""
    ids, mask = (case.base.get(name) for name in ("input_ids", "attention_mask"))
    if len(places) < 2:
        return None  # one stack: `tests/interventions/execution/test_writes.py` is about its padding
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or ids.ndim != 2 or mask.shape != ids.shape:
        return None
    given = {**case.base, "attention_mask": mask.clone()}
    given["attention_mask"][0, -PADDED:] = 0
    try:
        with seeded():
            case.model(**given)
    except Exception:
        return None  # a model that takes no padding
    entries = {at: replace(at, layer=case.ran[at.stack or case.stacks[0].name][0], site="block_input") for at in places}
    text = by_token(case, list(entries.values()), ids)
    shapes = {at: vectors(case, at, case.runs[0].activations.calls(at)[0]).shape[:2] for at in places}
    own = [at for at in places if text[entries[at]] is False or (text[entries[at]] and shapes[at] == ids.shape)]
    for at, written in (written_at(case, own, [-1], given)[0] if own else {}).items():
        wanted = torch.zeros_like(written)
        wanted[:, -1] = True
        if text[entries[at]]:
            wanted[0] = wanted[0].roll(-PADDED)
        if not torch.equal(written, wanted):
            return f"{at}: with padding in the text, positions=-1 writes {written.int().tolist()}"
    return None


def by_token(case: Case, entries: list[Location], ids: Tensor) -> dict[Location, bool | None]:
    """Whether what is given to a stack is the text, token by token; None if it depends on it in another way."""
    other = ids.clone()
    other[:, CHANGED] = torch.where(ids[:, CHANGED] == ids[:, 0], ids[:, 2], ids[:, 0])
    states = []
    for each in (ids, other):
        with record(case.model, entries) as activations, seeded():
            case.model(**{**case.base, "input_ids": each})
        states.append([activations.calls(at)[0] for at in entries])
    found: dict[Location, bool | None] = {}
    for at, state, new in zip(entries, *states, strict=True):
        columns = differing(case, at, state, new).any(0) if state.shape == new.shape else torch.ones(1).bool()
        alone = columns.nonzero().flatten().tolist() == [CHANGED] and len(columns) == ids.shape[1]
        found[at] = True if alone else None if columns.any() else False
    return found
