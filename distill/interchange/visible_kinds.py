"""Which entries of a mapping are worth an interchange: those at which it shows something of the computation.

The output of the last block of a classifier, e.g., is read at [CLS] alone. Whatever positions are drawn there, [CLS] is
among them, and the answer is that to the source, or it is not, and the answer is that to the base. No interchange of
such an entry says anything about what is computed, so training by it is training on answers.

Whether an entry can be seen is found on a few rows, once: positions are drawn for them many times, and it can be seen
if one of the draws reaches something that the answers depend on, and leaves something of it, in both networks.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.interchange.choices import Choice
from distill.interchange.kinds import Kind
from distill.interchange.mapping import Entry
from distill.interchange.vacuous import Places, Whole, touched, unpadded, visible
from distill.models.inputs import decoder_masked, evaluating, inputs_of, real_tokens, students, teachers
from distill.models.loss_masks import TOKENS, LabelPlace, loss_masks
from distill.models.outputs import logits_if_any
from distill.teachers.verbs import grid_of, run_of
from interventions import Location, Run, architecture

DRAWS = 64
"""How many times positions are drawn for each of the few rows."""


@dataclass(frozen=True, eq=False)
class Sight:
    """The positions that the answers of a network depend on, on a few rows.

    Attributes:
        base: the run on these rows.
        whole: finds places that hold everything that the answers depend on.
        seen: for each location, the positions that the answers depend on.
    """

    base: Run
    whole: Whole
    seen: Mapping[Location, Tensor]

    def shows(self, places: Places, written: Tensor | None, *, has_source: bool) -> bool:
        """Return whether one of the draws reaches something of what the answers depend on, and not all of it.

        Args:
            places: the locations that are written together.
            written: the draws, one after the other, each of all rows, `[draw · row, position]`; None is all positions.
            has_source: whether what is written is that of a source; random values never are a source's.
        """
        times = 1 if written is None else len(written) // len(self.seen[places[0]])
        seen = {at: self.seen[at].repeat(times, 1) for at in places}
        shown = touched(places, seen, written)
        return bool((shown & ~self.whole.replaced(places, seen, written) if has_source else shown).any())


def can_be_seen(
    choices: Sequence[Choice],
    teacher: Any,
    student: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    place: LabelPlace = "none",
    has_source: bool = True,
) -> list[bool]:
    """Return for each choice whether an interchange there can be seen in the answers of both networks.

    Args:
        choices: entries of a mapping with the kinds that draw their positions.
        teacher: a network; None leaves it out, as that of a served teacher, whose gradients are a request each.
        student: the network that is trained. A place that it does not use at all counts as used: training may change
            that, as where a layer starts at 0.
        batch: a few rows, on the device of the student.
        place: where the labels of tokens stand.
        has_source: whether values of a source are written, as by `Swap`.
    """
    rows = (batch, {name: column.roll(1, 0) for name, column in batch.items()})
    with ExitStack() as modes, torch.no_grad():
        for model in (teacher, student):
            modes.enter_context(nullcontext() if model is None else evaluating(model))
        below = _sight(student, "student", choices, rows, place)
        above = None if teacher is None else _sight(teacher, "teacher", choices, rows, place)
        return [
            below is None or _is_seen(choice, above, below, _draws(*choice, below.base, rows), has_source=has_source)
            for choice in choices
        ]


def _is_seen(
    choice: Choice, teacher: Sight | None, student: Sight, written: Tensor | None, *, has_source: bool
) -> bool:
    """Return whether one of the draws of positions shows something in both networks."""
    _, entry = choice
    return all(
        side is None or not _fits(side, places, written) or side.shows(places, written, has_source=has_source)
        for side, places in ((teacher, entry.teacher), (student, entry.student))
    )


def _sight(
    model: nn.Module, name: str, choices: Sequence[Choice], rows: Sequence[Mapping[str, Tensor]], place: LabelPlace
) -> Sight | None:
    """Return what the answers of a network depend on at the places of its side; None of a network without logits.

    Args:
        model: the network.
        name: its side, "teacher" or "student".
        choices: have the places.
        rows: a few rows, and their sources.
        place: where the labels of tokens stand.
    """
    places = list(dict.fromkeys(at for _, entry in choices for at in getattr(entry, name)))
    whole = list(dict.fromkeys(at.whole for at in places))
    read = teachers if name == "teacher" else students

    def ran(batch: Mapping[str, Tensor]) -> Run:
        return run_of(model, inputs_of(model, read(batch)), whole)

    base = ran(rows[0])
    logits = logits_if_any(base)
    if logits is None:
        return None
    mask = loss_masks(model, read(rows[0]), place)[TOKENS] if logits.ndim > 2 else None
    if mask is None or mask.shape != logits.shape[:-1]:
        mask = torch.ones(logits.shape[:-1], device=logits.device)
    seen = visible(base, places, mask)
    if name == "student":
        seen = {at: each if bool(each.any()) else torch.ones_like(each) for at, each in seen.items()}
    here, there = unpadded(*rows)
    return Sight(base, Whole(ran(here), ran(there)), seen)


def _draws(kind: Kind, entry: Entry, student: Run, batches: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
    """Return the positions that a kind writes in the bases, drawn many times; None for all positions."""
    rows, *width = grid_of(student, entry.student[0])
    if kind.positions is None or not width:
        return None
    column = architecture(student.model).place(entry.student[0]).mask
    eligible = []
    for batch in batches:
        masked = decoder_masked(student.model, students(batch))
        real = real_tokens(masked, rows, width[0], torch.device("cpu"), column=column)
        eligible.append(kind.positions.eligible(masked, real).repeat(DRAWS, 1))
    uniform = torch.rand(DRAWS * rows, 2, width[0], generator=torch.Generator().manual_seed(0))
    written: Tensor = kind.positions.draw(*eligible, uniform, aligned=kind.sources.aligned)[0]
    return written


def _fits(side: Sight, places: Places, written: Tensor | None) -> bool:
    """Return whether places have the positions that were drawn; those that do not are refused by the step itself."""
    return written is None or all(grid_of(side.base, at)[1:] == tuple(written.shape[1:]) for at in places)
