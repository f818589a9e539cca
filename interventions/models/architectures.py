"""How a location is found in a model: by the structure of the model, not by a table of model families."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakKeyDictionary

from jaxtyping import Bool
from torch import Tensor, nn

from interventions.errors import InterventionError
from interventions.locations import HEAD_SITES, STATES, Location
from interventions.models.axes import axes_of
from interventions.models.final_norms import AfterBlocks, final_norm
from interventions.models.overrides import Blocks, exception_for
from interventions.models.padding import real_of
from interventions.models.sides import NOWHERE, Side, has_sides, lengths_at, side_of, token_lengths
from interventions.models.sites import (
    Attention,
    Missing,
    attention_at,
    attention_of,
    feed_forward_of,
    heads_of,
    kind_of,
)
from interventions.models.stacks import Stack, entries_of, halves_in, names_of, stacks_in
from interventions.models.wrappers import Model, compiled_part, module_of


@dataclass(frozen=True, eq=False)
class Place:
    """A location found in a model.

    Attributes:
        module: the module whose input, output or attention it is.
        path: its dotted path.
        io: "input" or "output", or what else is read or written: a site with heads of an attention module, the final
            state of a recurrent one, the "logits" of a model.
        block: the block that is or contains it, None outside of all blocks.
        side: whose tokens its tokens are, and which argument of the model masks them.
        lengths: what says how many tokens the convolutions before it make of so many frames, if anything does.
        stack: the stack that it comes after: the normalisation after its blocks, or the logits (of the last stack).
        heads: into how many heads its last axis is divided, where these lie side by side.
        kind: of the attention, see `interventions.models.sites.Attention`.
        turn: which call of the block it is, where layers share blocks.
        axes: of what its block holds, where `interventions.models.overrides` states them.
        unflattens: whether its examples and tokens may lie on one axis, as in OPT's feed-forward part.
        operations: the names of an operation in the forward of the module, and of those inside of it; none for the
            module itself.
    """

    module: nn.Module
    path: str
    io: str
    block: nn.Module | None
    side: Side = NOWHERE
    lengths: nn.Module | None = None
    stack: Stack | None = None
    heads: int | None = None
    kind: str = ""
    turn: int | None = None
    axes: str = ""
    unflattens: bool = False
    operations: tuple[str, ...] = ()

    @property
    def after(self) -> AfterBlocks | None:
        """What each run is held to, of the normalisation after the blocks of a stack."""
        return None if self.stack is None or self.io == "logits" else AfterBlocks(self.stack)

    @property
    def mask(self) -> str:
        """The argument of the model that says which of its tokens are real; "" if none does."""
        return self.side.mask

    def real(self, arguments: Mapping[str, object], batch: int, width: int) -> Bool[Tensor, "batch width"] | None:
        """Which of `width` tokens there are no padding, in a run of the model with these arguments; see `real_of`."""
        mask = arguments.get(self.mask)
        counted = None if self.lengths is None else partial(token_lengths, self.lengths)
        return real_of(
            mask if isinstance(mask, Tensor) else None, batch, width, beside=self.side.beside, lengths=counted
        )

    @property
    def is_block_output(self) -> bool:
        """Whether it is what a block returns, not what is inside one."""
        return self.module is self.block and self.io == "output" and not self.operations

    def axes_of(self, state: Tensor) -> str:
        """The axes of what is there, as `interventions.models.axes` writes them."""
        if self.operations and state.ndim == 4 and kind_of(self.module) is not None:
            return self._axes_inside(state)
        if self.io in ("attention_scores", "attention_pattern"):
            return "b h t d"  # of scores one row of keys for each head and query
        if self.heads is not None and self.axes == "t b d":
            return "t b h d"
        if self.io in HEAD_SITES or self.heads is not None:
            return "b x y h d" if state.ndim == 5 else "b t h d"
        if self.io in STATES and state.ndim == 3:
            return "t b d"  # one final state for each layer and direction
        if state.ndim == len(self.axes.split()):
            return self.axes
        return axes_of(self.module, state)

    @property
    def _is_function(self) -> bool:
        """Whether it is the attention function of transformers, which returns `[batch, token, head, dims]`."""
        return len(self.operations) == 1 and self.operations[0].rpartition("_")[0].endswith("interface")

    def _axes_inside(self, state: Tensor) -> str:
        """Those of four axes in the forward of an attention: heads before the tokens, or after."""
        if self._is_function:
            return "b t h d"
        config = getattr(self.module, "config", None)
        heads = {heads_of(self.module), getattr(config, "num_key_value_heads", None)}
        before, after = (size in heads for size in state.shape[1:3])
        return "b t h d" if after and not before else "b h t d"

    def check_axes(self, state: Tensor, location: Location) -> None:
        """Raise where it cannot be told which of two axes is that of the heads, and one of them is chosen from."""
        if not (self.operations and state.ndim == 4 and kind_of(self.module) is not None):
            return
        if self._is_function or tuple(state.shape[1:3]) == (1, 1):
            return
        if self.axes_of(state) == self.axes_of(state.transpose(1, 2)):
            raise InterventionError(
                f"{location} has shape {list(state.shape)}: as many heads as tokens, or neither, so which are which "
                "cannot be told; leave heads and positions out, use a sequence of another length, or a site with heads."
            )


@dataclass(frozen=True, eq=False)
class Architecture:
    """What can be addressed in one model: its stacks of blocks, and its modules with their dotted paths."""

    model: nn.Module
    stacks: tuple[Stack, ...]
    paths: dict[nn.Module, str]

    @property
    def resumes(self) -> bool:
        """Whether a run may be taken up half way."""
        exception = exception_for(self.model)
        return exception is None or exception.resumes

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The blocks of all stacks, each once."""
        return tuple(dict.fromkeys(block for stack in self.stacks for block in stack.blocks))

    def place(self, location: Location) -> Place:
        """Where `location` is.

        Raises:
            InterventionError: no such module, stack or layer, or a model without blocks.
        """
        if location.operation is not None:
            return self._operation(location)
        if location.module is not None:
            return self._module(location.module, location.io)
        if location.site == "logits":
            last = self.stacks[-1] if self.stacks else None
            side = side_of(self.model, "", sided=self._has_sides)
            return Place(self.model, "", "logits", None, side, lengths_at(self.model, "", side), last)
        stack = self._stack(location)
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
        """The normalisation after the last block of `stack`.

        Raises:
            Missing: there is none.
        """
        return final_norm(self.model, stack, self.paths, set(self.blocks))

    def side_of_keys(self, place: Place) -> Side:
        """Whose tokens the keys of an attention are: those of what it attends to, if it is a cross-attention."""
        around = None if place.block is None else self.paths[place.block]
        return side_of(self.model, place.path, sided=self._has_sides, block=around, io="key")

    def _place(self, module: nn.Module, io: str, block: nn.Module | None, attention: Attention | None) -> Place:
        if module not in self.paths:
            raise InterventionError(
                f"the run is older than the model: a {type(module).__name__} took the place of another module since; "
                "run it again: run(model, inputs)."
            )
        path = self.paths[module]
        heads = attention.heads if attention is not None and io not in HEAD_SITES else None
        kind = attention.kind if attention is not None else ""
        around = None if block is None else self.paths[block]
        side = side_of(self.model, path, sided=self._has_sides, block=around, io=io)
        exception = exception_for(self.model)
        axes = exception.axes if exception is not None and block is not None else ""
        lengths = lengths_at(self.model, path, side)
        return Place(module, path, io, block, side, lengths, heads=heads, kind=kind, axes=axes)

    @property
    def _has_sides(self) -> bool:
        return has_sides(self.model, {stack.name: stack.path for stack in self.stacks})

    def _missing(self, location: Location, stack: Stack, why: Missing) -> InterventionError:
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
        """The operation that a location names, in the innermost module that it names, whether that has it or not."""
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
        return replace(place, turn=outer.turn, unflattens=not self._has_sides, operations=tuple(names))

    def _module(self, path: str, io: str) -> Place:
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
            module, io, attention = _heads_at(attention_at(module), io)
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

    def _stack(self, location: Location) -> Stack:
        names = [stack.name for stack in self.stacks]
        if not self.stacks:
            compiled = compiled_part(self.model)
            if compiled:
                raise InterventionError(
                    f"{location} needs blocks and those of this {model_name(self.model)} cannot be seen: {compiled} "
                    f"went through torch.compile(module); compile in place, {_item(compiled)}.compile(), or pass the "
                    f"original: {_item(compiled)}._orig_mod."
                )
            halved = halves_in(self.model)
            why = (
                f"{halved!r} holds the parts of its layers, which no one module computes"
                if halved is not None
                else "no ModuleList or Sequential of repeated blocks was found"
            )
            raise InterventionError(
                f"{location} needs blocks and this {model_name(self.model)} has none: {why}; name a module instead, "
                f"e.g. Location(module={_a_path(self.model)!r})."
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


def inside(block: nn.Module, site: str) -> tuple[nn.Module, str, Attention | None]:
    """The module of a block, and which side of it, that a site is; with its attention where it has heads.

    Raises:
        Missing: the block has no such site.
    """
    if site in ("block_output", "block_input", "embedding"):
        return block, "output" if site == "block_output" else "input", None
    if site in HEAD_SITES:
        return _heads_at(attention_of(block), site)
    if site.startswith("attention_"):
        attention = attention_of(block)
        if site == "attention_input":
            return attention.module, "input", None
        if attention.kind == "torch":
            return attention.module, "output", None
        if attention.projection is None:
            raise Missing(f"no output projection was found in or after {type(attention.module).__name__}")
        return attention.projection, "output", None
    part = feed_forward_of(block)
    if site == "mlp_input":
        return part.input, "input", None
    if site == "mlp_output":
        return part.output, "output", None
    if part.down is None:
        raise Missing(f"{type(part.output).__name__} is a mixture of experts, whose activations go by the path of each")
    return part.down, "input", None


def _heads_at(attention: Attention, site: str) -> tuple[nn.Module, str, Attention]:
    kind, name = attention.kind, type(attention.module).__name__
    if kind == "torch":
        raise Missing(f"{name} is torch's own, which computes {site} inside one call")
    if kind == "own" and site in ("query", "key", "value"):
        raise Missing(f"{name} computes attention by products of its own; name the projection of the {site} by path")
    if kind == "own" and site == "attention_heads":
        if attention.projection is None or attention.heads is None:
            what = "output projection" if attention.projection is None else "number of heads"
            raise Missing(f"{name} computes attention by products of its own and has no {what} that was found")
        return attention.projection, "input", attention
    return attention.module, site, attention


def architecture(model: Model) -> Architecture:
    """The stacks of repeated blocks of `model` (of nnsight: of the model that it traces), found by structure.

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
            f"a torch model was asked for and {type(model).__name__} given; pass the nn.Module itself, "
            "e.g. pipeline.model or trainer.model."
        )
    modules = modules_of(model)
    entry = exception_for(model)
    known = _known.get(model)
    if known is None or known.modules != tuple(map(id, modules)) or known.entry is not entry:
        known = _known[model] = _Known.of(model, modules, entry)
    by_id = {id(module): module for module in modules}
    return Architecture(
        model,
        tuple(Stack(name, path, tuple(by_id[block] for block in blocks)) for name, path, blocks in known.stacks),
        {module: known.paths[id(module)] for module in modules},
    )


@dataclass(frozen=True)
class _Known:
    """What was found in a model, by numbers and names: it keeps no module alive.

    Attributes:
        modules: the ids of the modules at the time: others mean that the model was changed.
        stacks: name, path and ids of the blocks of each stack.
    """

    modules: tuple[int, ...]
    entry: Blocks | None
    stacks: tuple[tuple[str, str, tuple[int, ...]], ...]
    paths: dict[int, str]

    @classmethod
    def of(cls, model: nn.Module, modules: list[nn.Module], entry: Blocks | None) -> "_Known":
        given = entry.lists_in(model) if entry is not None else []
        order = entry.in_order if entry is not None else None
        lists = [(path, order(model, tuple(held.children())) if order else entries_of(held)) for path, held in given]
        lists = lists or list(stacks_in(model))
        names = names_of([path for path, _ in lists])
        stacks = ((name, path, tuple(map(id, blocks))) for name, (path, blocks) in zip(names, lists, strict=True))
        paths = {id(module): path for path, module in model.named_modules()}
        return cls(tuple(map(id, modules)), entry, tuple(stacks), paths)


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, each once: what `model.modules()` gives, in another order and several times faster."""
    found = {model: None}
    waiting = [model]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and child not in found:
                found[child] = None
                waiting.append(child)
    return list(found)


def model_name(model: nn.Module) -> str:
    """How errors call a model: its transformers type, else its class."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return f"{kind!r} model" if kind else f"{type(model).__name__}"


def _item(path: str) -> str:
    """A path as Python writes it.

    >>> _item("encoder.layer.0")
    'encoder.layer[0]'
    """
    return "".join(f"[{name}]" if name.isdecimal() else f".{name}" for name in path.split(".")).removeprefix(".")


def _a_path(model: nn.Module) -> str:
    named = [path for path, module in model.named_modules() if path and not any(True for _ in module.children())]
    return named[len(named) // 2] if named else ""
