"""Which locations of the teacher correspond to which of the student: {teacher side: student side}."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from distill.causal_models import CausalModel
from distill.errors import DistillError
from interventions import InterventionError, Location, architecture, as_location

Side = Location | str | tuple[Location | str, ...]
Alignment = Mapping[Any, Side]
"""{teacher side: student side}. The keys are sides too, but a Mapping is invariant in its keys."""
KINDS = ("full", "middle", "late", "single")


@dataclass(frozen=True)
class Pair:
    """One entry of a mapping: what is interchanged together in the teacher, and the locations in the student.

    Attributes:
        teacher: locations; of a causal model the names of variables.
    """

    teacher: tuple[Any, ...]
    student: tuple[Location, ...]

    def __str__(self) -> str:
        return f"{_text(self.teacher)} ↔ {_text(self.student)}"


def layers(teacher: nn.Module, student: nn.Module, kind: str = "full") -> dict[tuple[Location, ...], Location]:
    """The usual mappings between block outputs of two models of different depth.

    With L_t and L_s layers, counted from 0:

    - `"full"`: every student layer i ↔ teacher layers ⌊i·L_t/L_s⌋ … ⌊(i+1)·L_t/L_s⌋ − 1;
    - `"middle"`: one pair, teacher L_t // 2 ↔ student L_s // 2;
    - `"late"`: two pairs, teacher L_t − 3 ↔ student L_s − 3 and L_t − 2 ↔ L_s − 2;
    - `"single"`: the second pair of `"late"` alone: the last one below the final block.

    Wu et al. 2021 (DIITO, arXiv:2112.02505), section 3, for L_t = 12 and L_s = 3, 6 or 9.

    Raises:
        DistillError: an unknown kind, a student deeper than the teacher, or too few layers for the kind.
    """
    deep, shallow = depth(teacher), depth(student)
    if kind not in KINDS:
        raise DistillError(f"mapping {kind!r} does not exist: choose one of {', '.join(KINDS)}, or give a dict.")
    if shallow > deep:
        raise DistillError(
            f"the student has {shallow} layers and the teacher {deep}, so no layer mapping is defined; "
            "give a dict, e.g. {Location(1): Location(2)}."
        )
    numbers = _numbers(kind, deep, shallow)
    if not numbers:
        raise DistillError(
            f"mapping {kind!r} needs a block below the last one, and the student has {shallow} layer; use "
            "mapping='full'."
        )
    return {tuple(Location(layer) for layer in above): Location(below) for above, below in numbers}


def parse_mapping(text: str) -> dict[tuple[Location, ...], tuple[Location, ...]]:
    """A mapping written as text: `teacher~student` entries with spaces between, `+` between locations of one side.

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


def mapping_of(mapping: Alignment | str, teacher: nn.Module, student: nn.Module) -> Alignment:
    """A mapping given as itself, as a kind of `layers`, or as text."""
    if not isinstance(mapping, str):
        return mapping
    return parse_mapping(mapping) if "~" in mapping else layers(teacher, student, mapping)


def depth(model: nn.Module) -> int:
    """How many blocks `model` has in the stack that locations refer to by default."""
    found = architecture(model)
    try:
        last = found.place(Location(-1)).block
    except InterventionError as error:
        raise DistillError(f"layers cannot be counted: {error}") from error
    return next(len(stack.blocks) for stack in found.stacks if last in stack.blocks)


def pairs_of(mapping: Alignment, teacher: nn.Module | CausalModel, student: nn.Module) -> tuple[Pair, ...]:
    """The entries of a mapping, every location checked against its model, and every variable.

    Raises:
        DistillError: an empty mapping, a variable that does not exist, a side that names a place twice, or a place that
            two variables share.
        InterventionError: a place that does not exist.
    """
    if not isinstance(mapping, Mapping) or not mapping:
        raise DistillError(
            f"mapping={mapping!r} names no pair; use distill.layers(teacher, student, 'full') or "
            "{Location(2): Location(1)} (teacher side: student side)."
        )
    if isinstance(teacher, CausalModel):
        return _aligned(mapping, teacher, student)
    pairs = tuple(Pair(_side(above), _side(below)) for above, below in mapping.items())
    for side, model in (("teacher", teacher), ("student", student)):
        found = architecture(model)
        for pair in pairs:
            places = [found.place(location) for location in getattr(pair, side)]
            keys = {
                (place.path, place.io, at.heads, at.dims, at.subspace)
                for place, at in zip(places, getattr(pair, side), strict=True)
            }
            if len(keys) < len(places):
                raise DistillError(f"mapping entry {pair} names a place of the {side} twice; name each once.")
    return pairs


def _aligned(mapping: Alignment, model: CausalModel, student: nn.Module) -> tuple[Pair, ...]:
    """Variables of a causal model with the places that hold them, no place for two."""
    found, held = architecture(student), dict[Any, str]()
    pairs = []
    for names, side in mapping.items():
        variables = (names,) if isinstance(names, str) else tuple(names)
        for name in variables:
            if name not in model.variables:
                raise DistillError(
                    f"the mapping names {name!r}, which is no variable of the causal model; it has "
                    f"{', '.join(model.variables)}."
                )
        places = _side(side)
        for at in places:
            place = found.place(at)
            for key in _parts(place.path, place.io, at):
                if key in held:
                    raise DistillError(
                        f"the mapping gives {at} to {'+'.join(variables)} and {held[key]}; give each variable a place "
                        "of its own, e.g. other dims."
                    )
                held[key] = "+".join(variables)
        pairs.append(Pair(variables, places))
    return tuple(pairs)


def _parts(path: str, io: str, at: Location) -> list[tuple[Any, ...]]:
    """What a location writes, part by part; a subspace is one part, since two of one place may be orthogonal."""
    heads = (None,) if at.heads is None else tuple(at.heads)
    dims = (None,) if at.dims is None else tuple(at.dims)
    return [
        (path, io, head, dim, id(at.subspace) if at.subspace is not None else None) for head in heads for dim in dims
    ]


def as_mapping(pairs: tuple[Pair, ...]) -> dict[tuple[Any, ...], tuple[Location, ...]]:
    """Pairs as a mapping again."""
    return {pair.teacher: pair.student for pair in pairs}


def _numbers(kind: str, deep: int, shallow: int) -> list[tuple[range, int]]:
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
