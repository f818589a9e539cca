"""Neuron mappings of Causal-Distill: files that name layers, heads and dims, as locations."""

import json
import re
from collections.abc import Mapping, Sequence
from math import lcm
from pathlib import Path
from typing import Any

from torch import nn

from distill.errors import DistillError
from distill.interchange.mapping import KINDS, Entry, depth, entries_of, mapping_of
from interventions import Location

NAME = re.compile(r"\$L:(?:(\d+)|\[(\d+):(\d+)\])\$H:(?:(\d+)|\[(\d+):(\d+)\])\$\[(\d+):(\d+)\]")
ENTRIES, SIDES = "interchange_variable_mappings", ("teacher_variable_names", "student_variable_names")
XXS_KINDS = {"mid": "middle"}


def neuron_pairs(mapping: str, teacher: nn.Module, student: nn.Module) -> tuple[Entry, ...]:
    """Return the entries of a mapping for a neuron mapping of Causal-Distill.

    The original draws in every step one entry of the file, and from it one name of each side. Entries of a mapping are
    drawn uniformly, so those from an entry of the file with fewer names are repeated.

    Args:
        mapping: the path of a file of Causal-Distill, a kind of `layers` (also "mid"), or entries teacher~student.
        teacher: the model whose layers and width the names of teacher variables refer to.
        student: the model for the names of student variables.

    Raises:
        DistillError: neither a file nor a mapping; or a file of another form.
    """
    kind = XXS_KINDS.get(mapping, mapping)
    if kind in KINDS or "~" in kind:
        return entries_of(mapping_of(kind, teacher, student), teacher, student)
    entries = read_entries(Path(mapping))
    sizes = [len(above) * len(below) for above, below in entries]
    found = []
    for (above, below), size in zip(entries, sizes, strict=True):
        each = [
            Entry(places(one, teacher), places(other, student)) for one in above for other in below
        ]  # fmt: skip
        for pair in each:
            entries_of({pair.teacher: pair.student}, teacher, student)
        found += each * (lcm(*sizes) // size)
    return tuple(found)


def read_entries(path: Path) -> list[tuple[list[str], list[str]]]:
    """Read the entries of a file: for each, names of teacher variables and names of student variables.

    Raises:
        DistillError: no such file, or one of another form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DistillError(
            f"--neuron_mapping {path} is no file, and no mapping: give one of {', '.join(KINDS)}, or entries such as "
            "block_output.6~block_output.3."
        ) from None
    except (OSError, ValueError) as error:
        raise DistillError(f"the neuron mapping {path} cannot be read: {error}; it must be JSON.") from None
    entries = content.get(ENTRIES, [content]) if isinstance(content, Mapping) else None
    if not entries or not all(_is_entry(each) for each in entries):
        raise DistillError(
            f"the neuron mapping {path} has no {ENTRIES!r}; give it a list of {{{SIDES[0]!r}: [names], {SIDES[1]!r}: "
            "[names]}, with names such as $L:6$H:[0:12]$[0:64]."
        )
    return [(list(each[SIDES[0]]), list(each[SIDES[1]])) for each in entries]


def places(name: str, model: nn.Module) -> tuple[Location, ...]:
    """Return the locations of one name: the outputs of its layers' blocks, with the dims of its heads.

    Ranges end before their last number. Heads and dims that the model has no room for are left out.

    Raises:
        DistillError: a name of another form, or one that names no dim of this model.
    """
    match = NAME.fullmatch(name.replace(" ", ""))
    if match is None:
        raise DistillError(
            f"{name!r} is not a variable name of a neuron mapping; write $L:6$H:[0:12]$[0:64]: layer, heads, and dims "
            "in each head."
        )
    numbers = [None if text is None else int(text) for text in match.groups()]
    layers, heads = _range(numbers[:3]), _range(numbers[3:6])
    first, last = (int(number or 0) for number in numbers[6:])
    config: Any = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None)
    if width is None:
        raise DistillError(
            f"{type(model).__name__} has no configuration that says how wide its heads are; give the mapping as "
            "entries: block_output.6~block_output.3."
        )
    size = width // config.num_attention_heads
    dims = [head * size + dim for head in heads for dim in range(first, min(last, size)) if head * size + dim < width]
    if not dims or not layers:
        raise DistillError(
            f"{name!r} names nothing of this model of {depth(model)} layers with {config.num_attention_heads} heads of "
            f"{size} dims; write e.g. $L:0$H:[0:{config.num_attention_heads}]$[0:{size}]."
        )
    return tuple(Location(layer, dims=_dims(dims, width)) for layer in layers)


def _is_entry(entry: Any) -> bool:
    """Return whether it has lists of names for both sides."""
    names = [entry.get(side) if isinstance(entry, Mapping) else None for side in SIDES]
    return all(isinstance(side, list) and side and all(isinstance(name, str) for name in side) for side in names)


def _range(numbers: Sequence[int | None]) -> range:
    """Return the range of a single number, or of a first and a last one that is excluded."""
    one, first, last = numbers
    return range(one, one + 1) if one is not None else range(first or 0, last or 0)


def _dims(dims: Sequence[int], width: int) -> range | tuple[int, ...] | None:
    """Return dims in the shortest form: None for all, a range, or a tuple."""
    if len(dims) == width:
        return None
    together = range(dims[0], dims[-1] + 1)
    return together if len(together) == len(dims) else tuple(dims)
