"""The search for a mapping between two networks: which place of a student computes what a place of its teacher does.

Every place of the teacher is interchanged, every place of the student is, and the answers of all pairs of places are
compared. The figure of a cell is the interchange intervention accuracy of the mapping with that one entry.

Geiger et al. 2021 (arXiv:2106.02997), section 3. For variables of causal models the same is `search_alignment`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distill.alignment.crossed_interchanges import CrossedInterchanges
from distill.alignment.mapping_search import Cells, MappingSearch
from distill.causal.model import CausalModel
from distill.errors import DistillError, NothingToMeasure, checked
from distill.evaluation.interchange_accuracy import measurement_of
from distill.evaluation.kind_measurement import KindMeasurement, PlacedKind
from distill.evaluation.measurement import Measurement
from distill.evaluation.outcome import outcomes_of
from distill.interchange.kinds import USUAL, Kind, kinds_of
from distill.interchange.mapping import Entry, depth, entries_of
from distill.interchange.positions import Span
from distill.models.inputs import refuse_valueless
from distill.models.outputs import answered
from distill.models.trials import translated
from distill.teachers.served import Served
from distill.teachers.without_adapters import teacher_and_student
from interventions import InterventionError, Location, Model, architecture, as_location, shown

SIDES = ("student", "teacher")
SAME_PLACE = Kind(Span(0.3, same=True))
"""The kind of interchange that is searched by default: a span of tokens, each from the same place of the source."""
CONTROLS = ("network", "labels")


@checked
def search_mapping(
    teacher: Model | Served | CausalModel,
    student: Model,
    data: Any,
    *,
    kinds: Any = None,
    places: Any = None,
    pairs: int = 1000,
    seed: Any = 0,
    batch_size: int | None = None,
    controls: str | Sequence[str] = CONTROLS,
    exclude: Any = None,
    answers: Any = None,
) -> MappingSearch:
    """Measure how well each place of a student computes what each place of its teacher does, and find the best mapping.

    The runs on base and source are shared by all cells: each batch is one base and one source run of a network (and a
    run with gradients where its answer depends on some tokens only), and one counterfactual, resumed from the run on
    the base, for each of its places under each kind. Pairs and positions are the same for all cells of a kind.

    Args:
        teacher: a network, here or `Served`.
        student: a network with the same inputs and classes.
        data: held-out rows, a Task, or the name of one (its test rows), as for `interchange_accuracy`.
        kinds: a `Kind` of interchange, several, or {name: Kind}; by default spans of 30 % of the tokens in the same
            place of base and source, at the outputs of blocks. `Kind(site="mlp_output")` searches another site, and
            `"usual"` those of `interchange_accuracy`, as far as the models have them.
        places: (places of the teacher, places of the student), in the order of computation; by default the outputs of
            all blocks. Models without blocks need it: `(["module:0", "module:2"], ["module:0"])`.
        pairs: how many pairs of base and source each cell is measured on, the same for all.
        seed: of the pairs, the positions and the controls.
        batch_size: pairs of a forward; the figures do not depend on it. None takes as many as a share of the free
            memory holds, on a processor 512 at most.
        controls: `"network"` (a student with new weights) and `"labels"` (the teacher takes the sources of other
            pairs), each searched in the same way; () for none.
        exclude: the result of `fit`: data may not hold rows that it was trained on.
        answers: which part of a model's output is its answer, as for `fit`.

    Raises:
        NothingToMeasure: every interchange of every cell is left out.
        DistillError: a causal model, a model without blocks and no `places`, a site that one side lacks, fewer than two
            rows.

    Geiger et al. 2021 (arXiv:2106.02997), section 3.
    """
    teacher, student = teacher_and_student(teacher, student)
    if isinstance(teacher, CausalModel):
        raise DistillError(
            "search_mapping compares the places of two networks, and a causal model has variables; search for those: "
            "search_alignment(causal_model, network)."
        )
    for model in (teacher, student):
        if isinstance(model, nn.Module):
            refuse_valueless(model, "search_mapping")
    wanted, names = {"block_output": SAME_PLACE} if kinds is None else kinds_of(kinds), _controls(controls)
    if not wanted:
        raise DistillError(
            f"search_mapping(kinds={shown(kinds)}) has no kind of interchange; leave kinds out for the usual one."
        )
    gradients = torch.inference_mode(False)  # they show which positions an output depends on
    with answered((teacher, student), answers), translated(), gradients:
        crossed = _crossed(teacher, student, places)
        measurement = measurement_of(
            teacher, student, crossed, data, pairs=pairs, seed=seed, batch_size=batch_size, exclude=exclude
        )
        placed = _placed(measurement, wanted, needed=kinds != USUAL)
        found = _cells(measurement, placed)
        if not any(each.count for cells in found.values() for each in cells.outcomes):
            raise NothingToMeasure(
                "every interchange of every pair of places replaces all that an answer can see, or nothing that it can "
                "see, so there is nothing to search; name places below the last block: places=([Location(0)], "
                "[Location(0)]), or kinds=Kind(Span(0.3))."
            )
        compared = {name: _cells(measurement, placed, name) for name in names}
    settings = {"pairs": pairs, "seed": measurement.seed, "kinds": {each.name: repr(each.kind) for each in placed}}
    return MappingSearch(found, compared, settings)


def _placed(measurement: KindMeasurement, kinds: Mapping[str, Kind], *, needed: bool) -> list[PlacedKind]:
    """Return the kinds at their places in both networks; those that the networks lack are left out, unless needed."""
    found = []
    for name, kind in kinds.items():
        try:
            found.append(measurement.place(name, kind))
        except (DistillError, InterventionError):
            if needed:
                raise
    return found


def _cells(measurement: KindMeasurement, placed: Sequence[PlacedKind], control: str | None = None) -> dict[str, Cells]:
    """Return the cells of every kind, of the student or of a control; kinds with the same sources share runs."""
    found: dict[str, Cells] = {}
    for kind in placed:
        if kind.name not in found:
            together = [each for each in placed if each.kind.sources == kind.kind.sources]
            found |= _cells_together(measurement, together, control)
    return {each.name: found[each.name] for each in placed}


def _cells_together(
    measurement: KindMeasurement, placed: Sequence[PlacedKind], control: str | None
) -> dict[str, Cells]:
    """Return the cells of kinds whose sources are the same."""
    examples, few = measurement.examples(placed[0].kind), measurement.few(placed[0].kind)
    entries = tuple(entry for each in placed for entry in each.entries)
    draws = tuple(each.draws[0] for each in placed for _ in each.entries)  # one draw for all cells of a kind
    interchanges = CrossedInterchanges(measurement.teacher, measurement.student, entries, draws, few)
    measured = Measurement(interchanges, examples, measurement.seed, measurement.batch_size)
    tally = measured.tally() if control is None else measured.control(control)
    assert tally is not None  # both controls are possible at any place
    found, first = dict[str, Cells](), 0
    for each in placed:
        numbers = range(first, first + len(each.entries))
        outcomes = outcomes_of([tally.of(i) for i in numbers], examples.sharing)
        student, teacher = (tuple(dict.fromkeys(getattr(e, side)[0] for e in each.entries)) for side in SIDES)
        found[each.name], first = Cells(student, teacher, outcomes), numbers.stop
    return found


def _crossed(teacher: Any, student: Any, places: Any) -> tuple[Entry, ...]:
    """Return an entry for every place of the student with every place of the teacher, row by row."""
    if places is None:
        above, below = (_blocks(name, model) for name, model in (("teacher", teacher), ("student", student)))
    else:
        above, below = _given(places)
    entries_of(dict.fromkeys(above, below[0]), teacher, student)  # every place exists
    entries_of({above[0]: tuple(below)}, teacher, student)
    return tuple(Entry((one,), (other,)) for other in below for one in above)


def _blocks(name: str, model: Any) -> list[Location]:
    """Return the outputs of the blocks of the stack that locations without a stack refer to."""
    if not isinstance(model, Served) and not architecture(model).stacks:
        raise DistillError(
            f"the {name}, {type(model).__name__}, has no blocks that repeat; name the places of both: "
            "search_mapping(…, places=([Location(module='0'), …], [Location(module='0'), …]))."
        )
    return [Location(layer) for layer in range(depth(model))]


def _given(places: Any) -> tuple[list[Location], list[Location]]:
    """Return the places of teacher and student that the caller names.

    Raises:
        DistillError: something else than two lists of places.
    """
    both = isinstance(places, tuple | list) and len(places) == 2
    sides = [list(side) if isinstance(side, tuple | list) else None for side in places] if both else []
    if not all(sides) or not sides:
        raise DistillError(
            f"places={shown(places)} names no places of a teacher and of a student; give two lists: "
            "places=([Location(0), Location(1)], [Location(0)])."
        )
    above, below = ([as_location(at) for at in side or ()] for side in sides)
    for name, side in (("teacher", above), ("student", below)):
        if len(set(side)) < len(side):
            raise DistillError(f"places={shown(places)} names a place of the {name} twice; name each once.")
    return above, below


def _controls(controls: Any) -> tuple[str, ...]:
    """Return the names of the controls.

    Raises:
        DistillError: a control that does not exist.
    """
    names = CONTROLS if controls == "all" else (controls,) if isinstance(controls, str) else tuple(controls or ())
    unknown = next((name for name in names if name not in CONTROLS), None)
    if unknown is not None:
        raise DistillError(
            f"search_mapping has no control {unknown!r}; controls are {', '.join(CONTROLS)}, or controls=() for none."
        )
    return tuple(dict.fromkeys(names))
