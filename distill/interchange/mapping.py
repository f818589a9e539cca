"""Mappings: which locations of a teacher correspond to which locations of its student, {teacher side: student side}."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.causal.model import CausalModel
from distill.errors import DistillError, checked, did_you_mean
from distill.models.inputs import network_of
from interventions import InterventionError, Location, Place, architecture, as_location

Side = Location | str | tuple[Location | str, ...]
Sides = Mapping[Any, Side]
"""{teacher side: student side}. The keys are of type Side too, but a Mapping is invariant in its keys."""
KINDS = ("full", "middle", "late", "single")
REMAINDERS = ("spread", "first")


@dataclass(frozen=True)
class Entry:
    """One entry of a mapping: what is interchanged together in the teacher, and the locations in the student.

    Attributes:
        teacher: locations, or with a causal model as teacher the names of variables.
        student: locations.
        positions: with a causal model as teacher, the tokens at each location of the student, as `CausalModel.select`
            takes them. None is all tokens.
    """

    teacher: tuple[Any, ...]
    student: tuple[Location, ...]
    positions: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", self.positions or (None,) * len(self.student))

    def __str__(self) -> str:
        return f"{_text(self.teacher)} ↔ {_text(self.student)}"


def names_of(entries: tuple[Entry, ...]) -> list[str]:
    """Return the entries as text; equal texts are numbered."""
    texts = [str(entry) for entry in entries]
    return [
        text if texts.count(text) == 1 else f"{text} ({texts[: i + 1].count(text)})" for i, text in enumerate(texts)
    ]


@checked
def layer_mapping(
    teacher: Any, student: Any, kind: str = "full", *, remainder: str = "spread"
) -> dict[tuple[Location, ...], Location]:
    """Return one of the usual mappings between the block outputs of two models of different depth.

    With L_t and L_s layers, counted from 0:

    - `"full"`: every student layer i ↔ teacher layers ⌊i·L_t/L_s⌋ … ⌊(i+1)·L_t/L_s⌋ − 1;
    - `"middle"`: one entry, teacher L_t // 2 ↔ student L_s // 2;
    - `"late"`: two entries, teacher L_t − 3 ↔ student L_s − 3 and L_t − 2 ↔ L_s − 2;
    - `"single"`: only the second entry of `"late"`: the last one below the final block.

    Wu et al. 2021 (DIITO, arXiv:2112.02505), section 3, for L_t = 12 and L_s = 3, 6 or 9. The mapping file of their
    code for 12 → 9 (multiple_single_multilayer_layer_9.nm at b1948ce) gives two teacher layers each to the first three
    student layers and one to the others: that is `remainder="first"`. For 3 and 6, which divide 12, both agree.

    Args:
        teacher, student: the models.
        kind: one of the above.
        remainder: for "full" with L_t / L_s no whole number, the student layers that get one more teacher layer:
            "spread" over the depth, as above, or the "first" L_t mod L_s of them.

    Raises:
        DistillError: an unknown kind or remainder, a student deeper than the teacher, or too few layers for the kind.
    """
    deep, shallow = depth(teacher), depth(student)
    if remainder not in REMAINDERS or (remainder != "spread" and kind != "full"):
        raise DistillError(
            f"layer_mapping(…, {kind!r}, remainder={remainder!r}) is no mapping: only 'full' has one, 'spread' or "
            "'first'; write layer_mapping(teacher, student, 'full', remainder='first')."
        )
    if kind == "search":
        raise DistillError(
            "mapping='search' is for distill.fit and `distill fit` alone, as it needs some training; search first, and "
            "give what is found: search_mapping(teacher, student, data).mapping."
        )
    if kind not in KINDS:
        raise DistillError(f"mapping {kind!r} does not exist: choose one of {', '.join(KINDS)}, or give a dict.")
    if shallow > deep:
        raise DistillError(
            f"the student has {shallow} layers and the teacher {deep}, so no layer mapping is defined; "
            "give a dict, e.g. {Location(1): Location(2)}."
        )
    numbers = _number_layers(kind, deep, shallow, remainder)
    if not numbers:
        raise DistillError(
            f"mapping {kind!r} needs a block below the last one, and the student has {shallow} layer; use "
            "mapping='full'."
        )
    return {tuple(Location(layer) for layer in above): Location(below) for above, below in numbers}


def parse_mapping(text: str) -> dict[tuple[Location, ...], tuple[Location, ...]]:
    """Parse a mapping from text: `teacher~student` entries with spaces between, `+` between locations of one side.

    >>> parse_mapping("block_output.2+block_output.3~block_output.1")
    {(Location(2), Location(3)): (Location(1),)}

    Raises:
        DistillError: an entry without exactly one `~`.
        InterventionError: a side that is not a location.
    """
    mapping = {}
    for entry in text.split():
        sides = entry.split("~")
        if len(sides) != 2:
            raise DistillError(
                f"mapping {text!r} is neither one of {', '.join(KINDS)} nor entries such as "
                "block_output.3~block_output.1 "
                "(teacher~student), with spaces between entries and + between locations of a side."
            )
        above, below = (tuple(Location.parse(place) for place in side.split("+")) for side in sides)
        mapping[above] = below
    return mapping


def mapping_of(mapping: Sides | str, teacher: Any, student: Any) -> Sides:
    """Return a mapping from itself, from a kind of `layer_mapping`, or from text as `parse_mapping` reads it."""
    if not isinstance(mapping, str):
        return mapping
    return parse_mapping(mapping) if "~" in mapping else layer_mapping(teacher, student, mapping)


def depth(model: Any) -> int:
    """Return the number of blocks of a model in the stack that locations refer to by default.

    Raises:
        DistillError: a model without such a stack.
    """
    found = architecture(network_of(model))
    try:
        last = found.place(Location(-1)).block
    except InterventionError as error:
        raise DistillError(f"layers cannot be counted: {error}") from error
    return next(len(stack.blocks) for stack in found.stacks if last in stack.blocks)


def entries_of(
    mapping: Sides | tuple[Entry, ...] | str, teacher: Any, student: Any, positions: Any = None
) -> tuple[Entry, ...]:
    """Return the entries of a mapping, after a check of every location and variable against its model.

    Args:
        mapping: {teacher side: student side}, or a text, e.g. "full"; entries are returned as they are.
        teacher: the model with the locations, or the variables, of the first sides.
        student: the model with the locations of the second sides.
        positions: for a causal model, the tokens of the student's places: one choice for all, or {variable or location:
            choice}, as `CausalModel.select` takes them. None is all tokens.

    Raises:
        DistillError: an empty mapping, a variable that does not exist, a side that names a place twice, or a place that
            two variables share.
        InterventionError: a place that does not exist.
    """
    if isinstance(mapping, tuple) and mapping and all(isinstance(each, Entry) for each in mapping):
        return mapping
    if isinstance(mapping, str) and not isinstance(teacher, CausalModel):
        mapping = mapping_of(mapping, teacher, student)
    if positions is None and isinstance(getattr(mapping, "pairs", None), tuple):  # an Alignment
        return entries_of(mapping.pairs, teacher, student)  # type: ignore[union-attr]
    if isinstance(teacher, CausalModel) and (not isinstance(mapping, Mapping) or not mapping):
        raise DistillError(
            f"mapping={mapping!r} names no variable of the causal model; give a dict, as "
            f"{{{(teacher.inner or teacher.inputs)[0]!r}: Location(1, dims=range(0, 16))}}."
        )
    if not isinstance(mapping, Mapping) or not mapping:
        raise DistillError(
            f"mapping={mapping!r} names no entry; use distill.layer_mapping(teacher, student, 'full') or "
            "{Location(2): Location(1)} (teacher side: student side)."
        )
    if isinstance(teacher, CausalModel):
        return _variable_entries(mapping, teacher, student, positions)
    entries = tuple(Entry(_side(above), _side(below)) for above, below in mapping.items())
    if (empty := next((each for each in entries if not each.teacher or not each.student), None)) is not None:
        raise DistillError(f"mapping entry {empty} names no place on a side; write {{Location(2): Location(1)}}.")
    for side, model in (("teacher", teacher), ("student", student)):
        found = architecture(network_of(model))
        for entry in entries:
            places = [found.place(location) for location in getattr(entry, side)]
            keys = {
                (place.path, place.io, at.heads, at.dims, at.subspace)
                for place, at in zip(places, getattr(entry, side), strict=True)
            }
            if len(keys) < len(places):
                raise DistillError(f"mapping entry {entry} names a place of the {side} twice; name each once.")
    return entries


def _variable_entries(mapping: Sides, model: CausalModel, student: nn.Module, positions: Any) -> tuple[Entry, ...]:
    """Return the entries of a mapping from variables of a causal model; no two variables may share a place."""
    found, entries = architecture(student), list[Entry]()
    claims: list[tuple[Location, Any, Place, str]] = []
    for names, side in mapping.items():
        variables = (names,) if isinstance(names, str) else names
        if not isinstance(variables, tuple) or not all(isinstance(name, str) for name in variables):
            raise DistillError(
                f"the mapping has {names!r} where the causal model has variables; name one, or a tuple of them: "
                f"{', '.join(model.variables)}."
            )
        unknown = next((name for name in variables if name not in model.variables), None)
        if unknown is not None:
            raise DistillError(
                f"the mapping names {unknown!r}, which is no variable of the causal model"
                f"{did_you_mean(str(unknown), model.variables)}; it has {', '.join(model.variables)}."
            )
        entry = Entry(variables, _side(side))
        entry = replace(entry, positions=tuple(_position(entry, at, positions, model) for at in entry.student))
        for at, tokens in zip(entry.student, entry.positions, strict=True):
            claim = (at, tokens, found.place(at), "+".join(variables))
            other = next((each for each in claims if _overlap(claim, each)), None)
            if other is not None:
                raise DistillError(
                    f"the mapping gives {at} to {claim[-1]} and {other[-1]}; give each variable a place of its own, "
                    "e.g. other dims."
                )
            claims.append(claim)
        entries.append(entry)
    _check_used(positions, entries)
    return tuple(entries)


def _position(entry: Entry, at: Location, positions: Any, model: CausalModel) -> Any:
    """Return the tokens at which a location holds a variable; None is all tokens."""
    chosen = positions
    if isinstance(positions, Mapping):
        keys = (at, str(at) if at.subspace is None else at, entry.teacher, *entry.teacher[: len(entry.teacher) == 1])
        chosen = next((positions[key] for key in keys if key in positions), None)
    if _differs_by_row(chosen):
        raise DistillError(
            f"the positions of {'+'.join(entry.teacher)} are given row by row, and bases and sources are drawn in "
            "another order; give a function of the inputs: positions=lambda values: values['…'] + 1, or a name."
        )
    for name in [chosen] if isinstance(chosen, str) else chosen if isinstance(chosen, list | tuple) else ():
        if isinstance(name, str) and name not in model.positions:
            model.select(name, {})  # raises an error that lists the known names
    return chosen


def _differs_by_row(positions: Any) -> bool:
    if isinstance(positions, Tensor):
        return positions.ndim > 1 or positions.dtype == torch.bool
    return isinstance(positions, list | tuple) and any(isinstance(each, list | tuple | Tensor) for each in positions)


def _check_used(positions: Any, entries: list[Entry]) -> None:
    """Raise DistillError for positions of a variable or location that the mapping does not name."""
    if not isinstance(positions, Mapping):
        return
    known = {key for each in entries for key in (each.teacher, *each.teacher[: len(each.teacher) == 1], *each.student)}
    texts = {str(key) for key in known if isinstance(key, Location) and key.subspace is None}
    unused = next((key for key in positions if key not in known and key not in texts), None)
    if unused is not None:
        raise DistillError(
            f"positions are given for {unused!r}, which the mapping does not name; it names "
            f"{', '.join('+'.join(entry.teacher) for entry in entries)}."
        )


def _overlap(first: tuple[Location, Any, Place, str], second: tuple[Location, Any, Place, str]) -> bool:
    """Return whether two places share an entry of an activation; two subspaces of one place may be orthogonal."""
    (a, tokens, here, _), (b, others, there, _) = first, second
    if (here.path, here.io) != (there.path, there.io):
        return False
    if tokens is not None and others is not None and not _may_overlap(tokens, others):
        return False
    if a.subspace is not None and b.subspace is not None and a.subspace is not b.subspace:
        return False
    return all(
        one is None or other is None or not set(one).isdisjoint(other)
        for one, other in ((a.heads, b.heads), (a.dims, b.dims))
    )


def _may_overlap(tokens: Any, others: Any) -> bool:
    """Return whether two choices of tokens may share one, as far as is known without data."""
    sets = [
        set(each) if isinstance(each, list | tuple | range) else {each} for each in map(_hashable, (tokens, others))
    ]
    return not sets[0].isdisjoint(sets[1])


def _hashable(tokens: Any) -> Any:
    return tokens.tolist() if isinstance(tokens, Tensor) else str(tokens) if isinstance(tokens, slice) else tokens


def as_mapping(entries: tuple[Entry, ...]) -> dict[tuple[Any, ...], tuple[Location, ...]]:
    """Return entries as a mapping, {teacher side: student side}."""
    return {entry.teacher: entry.student for entry in entries}


def _number_layers(kind: str, deep: int, shallow: int, remainder: str) -> list[tuple[range, int]]:
    if kind == "full" and remainder == "first":
        size, more = divmod(deep, shallow)
        starts = [i * size + min(i, more) for i in range(shallow + 1)]
        return [(range(starts[i], starts[i + 1]), i) for i in range(shallow)]
    if kind == "full":
        return [(range(i * deep // shallow, (i + 1) * deep // shallow), i) for i in range(shallow)]
    if kind == "middle":
        return [(range(deep // 2, deep // 2 + 1), shallow // 2)]
    offsets = (3, 2) if kind == "late" else (2,)
    return [(range(deep - o, deep - o + 1), shallow - o) for o in offsets if shallow >= o]


def _side(side: Side) -> tuple[Location, ...]:
    places = side if isinstance(side, tuple | list) else (side,)
    if not places:
        raise DistillError("a side of the mapping is empty; name at least one location, e.g. (Location(3),).")
    return tuple(as_location(place) for place in places)


def _text(side: tuple[Any, ...]) -> str:
    return " + ".join(map(str, side))
