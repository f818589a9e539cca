"""Find locations in a model, by its structure and not by a table of model families."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import ReferenceType, ref

from torch import nn

from interventions.errors import InterventionError
from interventions.locations import HEAD_SITES, STATES, Location
from interventions.models.attentions import Attention, attention_at, stated_heads
from interventions.models.block_sites import heads_at, inside
from interventions.models.final_norms import final_norm
from interventions.models.layers import Missing
from interventions.models.modules import example_path, indexed, model_name
from interventions.models.places import Place
from interventions.models.sides import Side, has_sides, lengths_at, side_of
from interventions.models.stacks import Stack, halves_in
from interventions.models.structure import Structure, forget_structure, structure_of
from interventions.models.tensor_parallel import check_whole, split_of
from interventions.models.wrappers import Model, compiled_part, module_of


@dataclass(frozen=True, eq=False)
class Architecture:
    """The stacks of blocks and the modules of one model, in which locations are found.

    Attributes:
        model: the torch model.
        structure: its modules, and what was found in them before.
    """

    model: nn.Module
    structure: Structure = field(repr=False)

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """The lists of repeated blocks."""
        holds = self.structure.still_holds(self.model)  # else blocks may be gone
        return (self.structure if holds else structure_of(self.model)).stacks_now()

    @cached_property
    def paths(self) -> Mapping[nn.Module, str]:
        """The dotted path of each module."""
        return {module: path for path, module in self.structure.those_left()}

    @property
    def resumes(self) -> bool:
        """True where a run may resume half way, from the recorded output of a block."""
        return self.structure.entry is None or self.structure.entry.resumes

    @property
    def split_over(self) -> int:
        """The number of processes that hold a part each of a tensor-parallel model; 1 for any other."""
        split = split_of(self.structure)
        return 1 if split is None else split.processes

    @cached_property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The blocks of all stacks, each once."""
        return tuple(dict.fromkeys(block for stack in self.stacks for block in stack.blocks))

    def place(self, location: Location) -> Place:
        """Return the place of a location in this model.

        Raises:
            InterventionError: no such module, stack or layer, or a model without blocks.
        """
        if location.operation is not None:
            return self._operation(location)
        key = (location.layer, location.site, location.stack, location.module, location.io)
        kept: dict[Any, _KeptPlace] = self.structure.kept.setdefault("places", {})
        place = kept[key].place(self) if key in kept else None
        if place is None:
            if not self.structure.is_exact(self.model):
                forget_structure(self.model)
                return architecture(self.model).place(location)
            place = self._find(location)
            check_whole(self.structure, place.module, place.io, location)
            kept[key] = _KeptPlace.of(place, self)
        return place

    def _find(self, location: Location) -> Place:
        """Return the place of a location, looked for in the modules."""
        if location.module is not None:
            return self._module(location.module, location.io)
        if location.site == "logits":
            last = self.stacks[-1] if self.stacks else None
            side = self._side("")
            return Place(self.model, "", "logits", None, side, lengths_at(self.model, "", side), last)
        stack = self.stack_of(location)
        try:
            if location.site == "final_norm":
                return replace(self._place(self.final_norm(stack), "output", None, None), stack=stack)
            layer = 0 if location.layer is None else self._index(location.layer, stack)
            block = stack.blocks[layer]
            module, io, attention = inside(block, location.site)
        except Missing as why:
            raise self._missing(location, stack, why) from None
        shared = stack.blocks.count(block) > 1
        return replace(
            self._place(module, io, block, attention),
            turn=stack.blocks[:layer].count(block) if shared else None,
            unflattens=location.site.startswith("mlp_") and not self._has_sides,
        )

    def final_norm(self, stack: Stack) -> nn.Module:
        """Return the normalisation after the last block of `stack`.

        Raises:
            Missing: there is none.
        """
        return final_norm(self.model, stack, dict(self.paths), set(self.blocks))

    def side_of_keys(self, place: Place) -> Side:
        """Return the input to which the keys of an attention belong: of a cross-attention, the one attended to."""
        around = None if place.block is None else self.paths[place.block]
        return side_of(self.model, place.path, sided=self._has_sides, block=around, io="key")

    def _place(self, module: nn.Module, io: str, block: nn.Module | None, attention: Attention | None) -> Place:
        """Return the place of an activation of a module, with all that the model and its type say about it."""
        if module not in self.paths:
            raise InterventionError(
                f"the run is older than the model: a {type(module).__name__} took the place of another module since; "
                "run it again: run(model, inputs)."
            )
        path = self.paths[module]
        heads = attention.heads if attention is not None and io not in HEAD_SITES else None
        kind = attention.kind if attention is not None else ""
        around = None if block is None else self.paths[block]
        side = self._side(path, block=around, io=io)
        entry = self.structure.entry
        axes = entry.axes if entry is not None and block is not None else ""
        lengths = lengths_at(self.model, path, side)
        return Place(module, path, io, block, side, lengths, heads=heads, kind=kind, axes=axes)

    def _side(self, path: str, **where: Any) -> Side:
        """Return the side of the module at a path: one object for all that are alike, by which they are recognised."""
        side = side_of(self.model, path, sided=self._has_sides, **where)
        sides: dict[Side, Side] = self.structure.kept.setdefault("sides", {})
        return sides.setdefault(side, side)

    @property
    def _has_sides(self) -> bool:
        return has_sides(self.model, {stack.name: stack.path for stack in self.stacks})

    def _missing(self, location: Location, stack: Stack, why: Missing) -> InterventionError:
        """Return the error for a site that a block does not have; it names the layers that have it."""
        others = []
        for i, block in enumerate(stack.blocks):
            try:
                inside(block, location.site)
            except Missing:
                continue
            others.append(str(i))
        elsewhere = f"; layers {', '.join(others)} have it" if others and location.layer is not None else ""
        return InterventionError(
            f"{location} does not exist in this {model_name(self.model)}: {why}{elsewhere}; describe(model) lists what "
            "does, and any module goes by path: Location(module='…')."
        )

    def _operation(self, location: Location) -> Place:
        """Return the place of an operation in the innermost module that the location names; it need not exist there."""
        if location.layer is None and location.module is None:
            outer = self._module("", "output")
        else:
            outer = self.place(replace(location, operation=None, io="output", heads=None, dims=None, subspace=None))
        module, names = outer.module, list((location.operation or "").split("."))
        while names and names[0] in module._modules and module._modules[names[0]] is not None:
            module = module.get_submodule(names.pop(0))
        if not names:
            path = self.paths[module]
            raise InterventionError(
                f"{location} names the module {path!r} and no operation in it; write Location(module={path!r})."
            )
        place = self._module(self.paths[module], location.io)
        check_whole(self.structure, module, location.io, location, inside=True)
        return replace(place, turn=outer.turn, unflattens=not self._has_sides, operations=tuple(names))

    def _module(self, path: str, io: str) -> Place:
        """Return the place of an activation of the module at a path."""
        module = self._at(path)
        block = next((block for block in self.blocks if f"{path}.".startswith(f"{self.paths[block]}.")), None)
        if io not in HEAD_SITES:
            if io in STATES and not isinstance(module, nn.RNNBase | nn.RNNCellBase):
                kind = type(module).__name__
                raise InterventionError(
                    f"io={io!r} goes with a recurrent module and {path!r} is a {kind}; use io='output'."
                )
            return self._place(module, io, block, None)
        try:
            module, io, attention = heads_at(attention_at(module), io)
        except Missing as why:
            raise InterventionError(
                f"module {path!r} has no {io} that can be read: {why}; describe(model) lists what can."
            ) from None
        return self._place(module, io, block, attention)

    def _at(self, path: str) -> nn.Module:
        modules = dict(self.model.named_modules())
        module = modules.get(path)
        if module is None:
            near = difflib.get_close_matches(path, modules, n=1, cutoff=0.0)[0]
            raise InterventionError(
                f"module {path!r} does not exist in this {model_name(self.model)}; did you mean {near!r}? "
                "describe(model) lists the paths."
            )
        return module

    def stack_of(self, location: Location) -> Stack:
        """Return the stack of a location: the one it names, the only one, or the decoder."""
        names = [stack.name for stack in self.stacks]
        if not self.stacks:
            compiled = compiled_part(self.model)
            if compiled:
                raise InterventionError(
                    f"{location} needs blocks and those of this {model_name(self.model)} cannot be seen: {compiled} "
                    f"went through torch.compile(module); compile in place, {indexed(compiled)}.compile(), or pass the "
                    f"original: {indexed(compiled)}._orig_mod."
                )
            halved = halves_in(self.model)
            why = (
                f"{halved!r} holds the parts of its layers, which no one module computes"
                if halved is not None
                else "no ModuleList or Sequential of repeated blocks was found"
            )
            raise InterventionError(
                f"{location} needs blocks and this {model_name(self.model)} has none: {why}; name a module instead, "
                f"e.g. Location(module={example_path(self.model)!r})."
            )
        if location.stack is not None:
            if location.stack not in names:
                raise InterventionError(
                    f"stack {location.stack!r} does not exist in this {model_name(self.model)}: "
                    + (
                        f"its stacks are {', '.join(names)}."
                        if len(names) > 1
                        else "it has one stack; leave stack out."
                    )
                )
            return self.stacks[names.index(location.stack)]
        if len(names) > 1:
            if "decoder" in names:
                return self.stacks[names.index("decoder")]
            raise InterventionError(
                f"{location} is ambiguous: this {model_name(self.model)} has the stacks {', '.join(names)}; "
                f"write stack={names[0]!r}."
            )
        return self.stacks[0]

    def _index(self, layer: int, stack: Stack) -> int:
        count = len(stack.blocks)
        if not -count <= layer < count:
            which = f" {stack.name}" if len(self.stacks) > 1 else ""
            raise InterventionError(
                f"Location(layer={layer}) is out of range: this {model_name(self.model)} has {count}{which} "
                f"layers (0 to {count - 1}, or -1 for the last)."
            )
        return layer % count


def architecture(model: Model) -> Architecture:
    """Return the stacks of repeated blocks of `model`, torch's or nnsight's, found by structure.

    A stack is an outermost `ModuleList` whose entries hold parameters, or an outermost `Sequential` of at least two
    blocks of one class. The blocks of stages in such a list (Swin, ConvNeXt) are one stack; halves of layers (attention
    and feed-forward part by turns) are none. Where the configuration of the model counts layers, lists of another
    length are left out, unless they hold blocks of the same class. Model types that this misleads stand in
    `interventions.models.overrides`.

    Raises:
        InterventionError: `model` is no `nn.Module`.
    """
    model = module_of(model)
    if not isinstance(model, nn.Module):
        raise InterventionError(
            f"a torch model is needed and {type(model).__name__} was given; pass the nn.Module itself, "
            "e.g. pipeline.model or trainer.model."
        )
    structure = structure_of(model)
    held: ReferenceType[Architecture] | None = structure.kept.get("architecture")
    found = None if held is None else held()
    if found is None:
        found = Architecture(model, structure)
        structure.kept["architecture"] = ref(found)
    return found


@dataclass(frozen=True, eq=False)
class _KeptPlace:
    """A place that was found, as it is kept: without the modules, to which it refers weakly.

    Attributes:
        plain: all else that the place holds.
        modules: {attribute: module}.
        stack: the number of its stack.
        way: the modules on the way to its module, each with the name of the next one; they tell whether it is still
            there.
        heads: the numbers of heads that these modules state, for a place with heads.
    """

    plain: dict[str, Any]
    modules: dict[str, ReferenceType[nn.Module]]
    stack: int | None
    way: tuple[tuple[str, ReferenceType[nn.Module]], ...]
    heads: tuple[object, ...]

    @classmethod
    def of(cls, place: Place, found: Architecture) -> "_KeptPlace":
        """Return a place of a model as it is kept."""
        fields = vars(place)
        modules = {name: value for name, value in fields.items() if isinstance(value, nn.Module)}
        plain = {name: value for name, value in fields.items() if name != "stack" and name not in modules}
        way, held = [], [found.model]
        for name in place.path.split(".") if place.path else ():
            held.append(held[-1].get_submodule(name))
            way.append((name, ref(held[-1])))
        stack = None if place.stack is None else found.stacks.index(place.stack)
        heads = stated_heads(held) if place.heads is not None or place.kind else ()
        return cls(plain, {name: ref(each) for name, each in modules.items()}, stack, tuple(way), heads)

    def place(self, found: Architecture) -> Place | None:
        """Return the place; None where another module stands on the way to it."""
        held = [found.model]
        for name, kept in self.way:
            module = held[-1]._modules.get(name)
            if module is None or module is not kept():
                return None
            held.append(module)
        if self.heads and stated_heads(held) != self.heads:
            return None
        place = object.__new__(Place)  # a frozen class, whose `__init__` would cost more than all else here
        fields = vars(place)
        fields.update(self.plain, stack=None if self.stack is None else found.stacks[self.stack])
        for name, kept in self.modules.items():
            module = fields[name] = kept()
            if module is None:
                return None
        return place
