"""The units that a narrower student keeps of each weight of its teacher: dims of the stream, heads, neurons.

Every axis of a weight belongs to one kind of unit. Weights inside a block are divided by their names, which the tests
check for every type of `distill.students.from_width.KNOWN`; an axis as long as the residual stream is one of its dims.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from distill.errors import DistillError
from distill.students.ranking import Importance, most
from interventions import Location, architecture

_MAKES_HEADS = re.compile(
    r"(^|\.)(([qkv]|query|key|value)(_proj|_lin)?|c_attn|q_attn|qkv_proj|Wqkv|query_key_value)\.(weight|bias)$"
)
_READS_HEADS = re.compile(
    r"(^|\.)(out_proj|o_proj|out_lin|(attn|attention|crossattention)\.(output\.dense|c_proj|dense|o|Wo)"
    r"|(Self|EncDec)Attention\.o)\.weight$"
)
_MAKES_NEURONS = re.compile(
    r"(^|\.)(fc1|lin1|wi(_[01])?|gate_proj|up_proj|gate_up_proj|Wi|c_fc|intermediate\.dense|dense_h_to_4h)\.(weight|bias)$"
)
_READS_NEURONS = re.compile(r"(^|\.)(fc2|lin2|wo|down_proj|mlp\.(Wo|c_proj)|output\.dense|dense_4h_to_h)\.weight$")
_POSITIONS = "relative_attention_bias"
_KEYS = re.compile(r"(^|\.)(k|v|key|value)(_proj|_lin)?\.(weight|bias)$")
_CROSS = re.compile(r"(crossattention|EncDecAttention|encoder_attn)(?=\.)")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that a student may have smaller.

    Attributes:
        width: of the residual stream.
        heads: the number of query heads.
        key_heads: the number of key and value heads.
        head_dim: the width of a head, which stays.
        neurons: the number of feed-forward units.
    """

    width: int
    heads: int
    key_heads: int
    head_dim: int
    neurons: int


class KeptUnits:
    """The units that a student keeps of its teacher, in the teacher's order.

    Args:
        teacher: the model.
        old, new: the sizes of teacher and student.
        by: the importance of the teacher's units; None keeps the first ones.

    Raises:
        DistillError: the importance of another model.
    """

    def __init__(self, teacher: nn.Module, old: Sizes, new: Sizes, by: Importance | None) -> None:
        self.old, self.new, self.by = old, new, by
        self._blocks: dict[str, tuple[int, str | None]] = {}
        found = architecture(teacher)
        for stack in found.stacks:
            for layer, block in enumerate(stack.blocks):
                self._blocks[f"{found.paths[block]}."] = (layer, stack.name or None)
        self._transposed = {path for path, each in teacher.named_modules() if type(each).__name__ == "Conv1D"}
        self._shared_positions = _with_shared_positions(teacher, self._blocks)
        self._heads: dict[Location | str | None, Tensor] = {}
        self.dims = torch.arange(new.width)
        if by is not None and new.width < old.width:
            self.dims = most(_checked(by.dims, "dims", "the residual stream", old.width), new.width)

    def part(self, name: str, weight: Tensor, shape: torch.Size) -> Tensor:
        """Return the part of a weight of the teacher that the student keeps.

        Args:
            name: of the weight.
            weight: of the teacher.
            shape: that of the student.
        """
        for axis, (long, short) in enumerate(zip(weight.shape, shape, strict=True)):
            if long != short:
                index = self._index(name, axis, long, short)
                weight = weight.index_select(axis, index.to(weight.device))
        return weight

    def _index(self, name: str, axis: int, long: int, short: int) -> Int[Tensor, " kept"]:
        """Return which entries of an axis are kept."""
        prefix = next((each for each in self._blocks if name.startswith(each)), None)
        kind = "" if prefix is None and _POSITIONS not in name else self._kind(name, axis)
        if kind == "positions":
            index = self._heads_of(name, prefix)
        elif kind == "heads":
            index = self._entries_of_heads(name, self._heads_of(name, prefix), long)
        elif kind == "neurons":
            index = self._neurons_of(prefix)
            index = torch.cat([index + start for start in range(0, long, self.old.neurons)])  # merged: gates, values
        else:
            index = self.dims if (long, short) == (self.old.width, self.new.width) else torch.arange(short)
        if len(index) != short:
            raise DistillError(
                f"{name!r} has {long} entries in the teacher and {short} in the student, and not the {len(index)} that "
                "are kept of its units; build the student yourself and pass it to distill.fit(teacher, student, ...)."
            )
        return index

    def _kind(self, name: str, axis: int) -> str:
        """Return the kind of units along an axis of a weight in a block; "" for dims of the stream."""
        is_bias = name.endswith("bias")
        outputs = 0 if is_bias or name.rpartition(".")[0] not in self._transposed else 1
        if _POSITIONS in name:
            return "positions" if axis == 1 else ""
        if axis == outputs:
            return "heads" if _MAKES_HEADS.search(name) else "neurons" if _MAKES_NEURONS.search(name) else ""
        return "heads" if _READS_HEADS.search(name) else "neurons" if _READS_NEURONS.search(name) else ""

    def _heads_of(self, name: str, prefix: str | None) -> Int[Tensor, " heads"]:
        """Return the query heads that are kept of the attention with a weight, whole groups of key heads."""
        if self.by is None or self.new.heads == self.old.heads:
            return torch.arange(self.new.heads)
        cross = _CROSS.search(name)
        if cross is not None:
            path = name[: cross.end()]
            places = [at for at in self.by.heads if at.module in (path, f"{path}.self")]
        elif prefix is None or self._blocks[prefix][1] in self._shared_positions:
            places = self._stack_heads(name, prefix)
        else:
            layer, stack = self._blocks[prefix]
            places = [Location(layer, "attention_heads", stack=stack)]
        key = ", ".join(map(str, places)) or name
        if key not in self._heads:
            found = [_checked(self.by.heads.get(at), "heads", str(at), self.old.heads) for at in places]
            values = torch.stack(found).square().mean(0).sqrt() if found else None
            ranked = _checked(values, "heads", key, self.old.heads)
            self._heads[key] = most(ranked, self.new.heads, self.old.heads // self.old.key_heads)
        return self._heads[key]

    def _stack_heads(self, name: str, prefix: str | None) -> list[Location]:
        """Return the self-attentions of the stack of a weight, all of which use the same positions by head."""
        if prefix is not None:
            wanted = self._blocks[prefix][1]
        else:
            parent = name[: name.index(_POSITIONS)]
            wanted = next(stack for each, (_, stack) in self._blocks.items() if each.startswith(parent))
        return [Location(n, "attention_heads", stack=stack) for n, stack in self._blocks.values() if stack == wanted]

    def _entries_of_heads(self, name: str, heads: Tensor, long: int) -> Int[Tensor, " kept"]:
        """Return which entries of an axis of heads are kept: those of queries, keys, values, or of all in one."""
        dim, old = self.old.head_dim, self.old
        keys = heads[:: old.heads // old.key_heads] // (old.heads // old.key_heads)
        if ".query_key_value." in f".{name}":  # those of a head lie side by side
            return _entries(heads, 3 * dim)
        if long == old.heads * dim and not (_KEYS.search(name) and old.key_heads < old.heads):
            return _entries(heads, dim)
        if long == old.key_heads * dim:
            return _entries(keys, dim)
        queries, both = (old.heads + 2 * old.key_heads) * dim, 2 * old.key_heads * dim
        if long == queries:
            starts = (0, old.heads * dim, (old.heads + old.key_heads) * dim)
            parts = zip((heads, keys, keys), starts, strict=True)
        elif long == both:
            parts = zip((keys, keys), (0, old.key_heads * dim), strict=True)
        else:
            raise DistillError(f"{name!r} has {long} entries, which are no whole heads; build the student yourself.")
        return torch.cat([_entries(each, dim) + start for each, start in parts])

    def _neurons_of(self, prefix: str | None) -> Int[Tensor, " neurons"]:
        """Return the neurons that are kept of a block."""
        if self.by is None or prefix is None or self.new.neurons == self.old.neurons:
            return torch.arange(self.new.neurons)
        layer, stack = self._blocks[prefix]
        at = Location(layer, "mlp_activation", stack=stack)
        return most(_checked(self.by.neurons.get(at), "neurons", str(at), self.old.neurons), self.new.neurons)


def _entries(units: Tensor, dim: int) -> Int[Tensor, " kept"]:
    """Return the entries of units of `dim` entries each.

    >>> _entries(torch.tensor([0, 2]), 2)
    tensor([0, 1, 4, 5])
    """
    return (units[:, None] * dim + torch.arange(dim)).reshape(-1)


def _checked(values: Any, what: str, where: str, count: int) -> Tensor:
    """Return the importance of some units.

    Raises:
        DistillError: there is none, or of another number of units.
    """
    if not isinstance(values, Tensor) or len(values) != count:
        found = "none" if values is None else len(values)
        raise DistillError(
            f"by=… ranks {found} of the {count} {what} at {where} of this teacher; measure the teacher itself: "
            "by=importance(teacher, data)."
        )
    return values


def _with_shared_positions(teacher: nn.Module, blocks: Mapping[str, tuple[int, str | None]]) -> set[str | None]:
    """Return the stacks of which all layers add the same bias of relative positions to each head (T5, MPNet)."""
    names = [name for name, _ in teacher.named_parameters(remove_duplicate=False) if _POSITIONS in name]
    shared = set()
    for stack in {stack for _, stack in blocks.values()}:
        own = [each for each, (_, of) in blocks.items() if of == stack]
        parent = own[0].rstrip(".").rpartition(".")[0].rpartition(".")[0]
        held = [name for name in names if name.startswith(f"{parent}." if parent else "")]
        if held and len(held) < len(own):
            shared.add(stack)
    return shared
