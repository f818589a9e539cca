"""A mapping for the training of a student, searched before it: with a copy of the student after a few steps of KD.

An untrained student computes nothing yet that could be compared with its teacher, and a trained one is what the mapping
is for. After some steps of plain distillation the blocks of a student have begun to compute what some block of the
teacher does, and the search finds which.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from distill.alignment.mapping_search import MappingSearch, mapping_as_text
from distill.alignment.search_mapping import search_mapping
from distill.causal.model import CausalModel
from distill.errors import DistillError
from distill.interchange.mapping import parse_mapping
from distill.objectives import KD
from distill.storage.files import Damaged, read_json
from distill.training.loop import steps
from distill.training.progress import Plain, show_progress
from distill.training.run_folder import SETTINGS
from distill.training.schedule import Schedule
from interventions import Location

SEARCH = "search"
"""The mapping that `fit` and `distill fit --mapping` search for."""
KD_STEPS, PAIRS = 200, 1000


@dataclass(frozen=True, eq=False)
class FoundMapping:
    """A mapping that was searched for a training.

    Attributes:
        sides: {teacher side: student side}.
        settings: of the search, as plain data, with the mapping as text: the settings of a run keep them, so that a run
            that is resumed takes its mapping from there.
        search: all figures; None where the mapping was read from a run.
    """

    sides: dict[tuple[Location, ...], tuple[Location, ...]]
    settings: dict[str, Any]
    search: MappingSearch | None = None

    @classmethod
    def read(cls, folder: Path) -> "FoundMapping | None":
        """Return the mapping that a run searched, from the settings in its folder; None where there is none."""
        try:
            settings = read_json(folder / SETTINGS, "start anew").get(SEARCH) if (folder / SETTINGS).exists() else None
        except Damaged:
            return None  # the folder says so itself, when it is compared
        return None if settings is None else cls(parse_mapping(settings["mapping"]), settings)


def mapping_for(
    teacher: Any,
    student: nn.Module,
    rows: Any,
    schedule: Schedule,
    *,
    resumed: Path | None = None,
    console: Console | None = None,
) -> FoundMapping:
    """Return the mapping that is best for a training: that of the run that is resumed, or a new one.

    Args:
        teacher, student, rows, schedule, console: as for `search_after_kd`.
        resumed: the folder of a run that is resumed, if it is.
    """
    known = None if resumed is None else FoundMapping.read(resumed)
    return search_after_kd(teacher, student, rows, schedule, console=console) if known is None else known


def search_after_kd(
    teacher: Any,
    student: nn.Module,
    rows: Any,
    schedule: Schedule,
    *,
    controls: Sequence[str] = (),
    console: Console | None = None,
) -> FoundMapping:
    """Search for a mapping with a copy of the student that a few steps of KD have trained; the student is not changed.

    Args:
        teacher: a network, here or `Served`.
        student: the student, as it is before its training.
        rows: the rows to train on, which also are the pairs of the search.
        schedule: of the training; the copy makes its first steps by the same settings, at most 200 of them.
        controls: those of `search_mapping`.
        console: shows the progress of these steps.

    Raises:
        DistillError: no teacher, or a causal model; or no place of the student can be mapped.
    """
    if teacher is None or isinstance(teacher, CausalModel):
        what = "there is no teacher" if teacher is None else "a causal model has variables"
        way_out = "leave mapping out" if teacher is None else "distill.search_alignment(causal_model, network).best"
        raise DistillError(f"mapping='search' compares the places of two networks, and {what}; {way_out}.")
    short = replace(schedule, steps=min(KD_STEPS, schedule.total(len(rows))), workers=0)
    copy = deepcopy(student)
    records = steps(teacher, copy, {}, rows, objective=KD(), schedule=short)
    for _ in show_progress(records, "KD before the search", console or Plain()):
        pass
    found = search_mapping(teacher, copy, rows, pairs=PAIRS, seed=schedule.seed, controls=controls)
    if not found.mapping:
        raise DistillError(
            f"mapping='search' found no place to map ({' '.join(found.notes)}); name a mapping: mapping='full'."
        )
    text = mapping_as_text(found.mapping)
    return FoundMapping(found.mapping, {"mapping": text, "steps": short.steps, "pairs": PAIRS}, found)
