"""Tensor-parallel models, in which each process computes some of the heads and units of every block.

transformers (`tp_plan="auto"`) and torch (`parallelize_module`) leave the weights as DTensors: a linear layer that is
split by columns takes a whole state and returns a part of it, one that is split by rows takes a part and returns the
whole. What lies between the two is a part in each process, so that head 1 or unit 7 there is another one in each.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import getclosurevars
from typing import Any, Literal

from torch import nn

from interventions.errors import InterventionError
from interventions.locations import HEAD_SITES, Location
from interventions.models.modules import model_name
from interventions.models.structure import Structure
from interventions.models.wrappers import is_sharded

Kind = Literal["columns", "rows", "both", "experts"]


@dataclass(frozen=True)
class Split:
    """The modules of a model that are split over processes, by their numbers in its structure.

    Attributes:
        processes: the number of processes that hold a part each.
        kinds: {number of a module: its kind}. What holds layers split by columns alone, or by rows alone, is as they
            are; what holds both takes and returns whole states.
        by_tokens: whether the states between the blocks are split too, by tokens.
    """

    processes: int
    kinds: dict[int, Kind]
    by_tokens: bool

    def holds_part(self, structure: Structure, module: nn.Module, io: str, *, inside: bool = False) -> bool:
        """Return whether a process has only a part of an activation.

        Args:
            structure: the modules of the model.
            module: the module with the activation.
            io: which activation it is, as in `Place`.
            inside: whether it is computed in the forward of the module.
        """
        if io == "logits" or not structure.holds(module):
            return False
        number = structure.numbers[id(module)]
        kind = self.kinds.get(number)
        if self.by_tokens or kind == "experts":
            return True
        if kind is None:
            return self._is_between(structure, number)
        if inside or io in HEAD_SITES:
            return kind != "both" or self._holds_ends(structure, number)
        return kind == ("columns" if io == "output" else "rows")

    def _is_between(self, structure: Structure, number: int) -> bool:
        """Return whether a module without split weights lies in split experts, or beside an end of a part."""
        for parent in structure.parents[number]:
            kind = self.kinds.get(parent)
            if kind == "experts" or (kind is None and self._is_between(structure, parent)):
                return True
            if kind is not None and self._holds_ends(structure, parent):
                return True
        return False

    def _holds_ends(self, structure: Structure, number: int) -> bool:
        """Return whether a module in this one takes or returns a part of a state."""
        parts = structure.module(number)._modules.values()
        ends = (self.kinds.get(structure.numbers[id(each)]) for each in parts if each is not None)
        return any(kind in ("columns", "rows") for kind in ends)


def split_of(structure: Structure) -> Split | None:
    """Return which modules of a model are split over processes; None where it is not tensor-parallel."""
    kept = structure.kept
    if "split" not in kept:
        kept["split"] = _find_split(structure)
    return kept["split"]


def check_whole(structure: Structure, module: nn.Module, io: str, location: Location, *, inside: bool = False) -> None:
    """Raise InterventionError for an activation of a tensor-parallel model of which a process has only a part."""
    split = split_of(structure)
    if split is None or not split.holds_part(structure, module, io, inside=inside):
        return
    raise InterventionError(
        f"{location} is split over {split.processes} processes, as this {model_name(structure.module(0))} is "
        f"tensor-parallel, and each has other heads, units or tokens of it; {_way_out(split, location)}load the model "
        "in one piece: from_pretrained(name), without tp_plan."
    )


def _way_out(split: Split, location: Location) -> str:
    """Return the advice to name a place that each process has whole; "" where there is none."""
    if split.by_tokens:
        return ""
    site = "mlp_output" if location.site.startswith("mlp") else "attention_output"
    whole = Location(0) if location.layer is None else Location(location.layer, site, stack=location.stack)
    return f"name what each has whole, e.g. {whole!r}, or "


def _find_split(structure: Structure) -> Split | None:
    tensors: Any = sys.modules.get("torch.distributed.tensor")  # a model with such weights has imported it
    if tensors is None:
        return None
    shares, by_tokens = [1], False
    kinds: dict[int, Kind] = {}
    shards = is_sharded(structure.module(0))
    for number, (_, module) in enumerate(structure.those_left()):
        own = [each for each in module._parameters.values() if isinstance(each, tensors.DTensor)]
        splits = [split for each in own for split in _splits(each, shards=shards)]
        together = max((each.device_mesh.size() for each in own if not shards and not splits), default=1)
        by_tokens |= together > 1  # whole weights, of a norm, on a mesh
        shares += [together, *(size for size, _ in splits)]
        kind = _kind_of(module, {dim for _, dim in splits}) if splits else None
        if kind is not None:
            kinds[number] = kind
    return Split(max(shares), _with_holders(structure, kinds), by_tokens) if max(shares) > 1 else None


def _splits(weight: Any, *, shards: bool) -> Iterator[tuple[int, int]]:
    """Yield over how many processes a weight is split, and along which axis, except by FSDP, whose axis comes first."""
    found = [
        (weight.device_mesh.size(axis), placement.dim % weight.ndim)
        for axis, placement in enumerate(weight.placements)
        if hasattr(placement, "dim") and weight.device_mesh.size(axis) > 1
    ]
    yield from found[1:] if shards else found


def _kind_of(module: nn.Module, axes: set[int]) -> Kind | None:
    """Return the kind of a module with split weights; None where it takes and returns whole states."""
    if isinstance(module, nn.Embedding):
        return None
    if not hasattr(module, "in_features"):
        return "experts"
    kind: Kind = "rows" if axes == {1} else "columns"
    style = getclosurevars(module.forward).nonlocals.get("self") if "forward" in vars(module) else None
    layout = getattr(style, "input_layouts" if kind == "rows" else "output_layouts", None)
    return None if getattr(layout, "is_replicate", lambda: False)() else kind


def _with_holders(structure: Structure, kinds: dict[int, Kind]) -> dict[int, Kind]:
    """Return the kinds of split modules and of those that hold them."""
    inner: dict[int, set[Kind]] = {}
    for number, kind in kinds.items():
        for holder in structure.above([structure.module(number)]):
            inner.setdefault(structure.numbers[id(holder)], set()).add(kind)
    found = dict(kinds)
    for number, held in inner.items():
        found.setdefault(number, "both" if len(held) > 1 or held == {"experts"} else held.pop())
    return found
