"""A shallower student from some of a teacher's layers.

The student has the teacher's weights in the chosen layers and everywhere else. A transformers model is built anew from
a smaller configuration, any other module is copied and its list of blocks cut.

Sanh et al. 2019 (DistilBERT, arXiv:1910.01108); Sun et al. 2019 (PKD, arXiv:1908.09355), section 4.1.
"""

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import DistillError, checked
from distill.models.inputs import evaluating
from distill.students.from_width import plain
from distill.students.ranking import Importance
from interventions import InterventionError, Location, Stack, architecture, run

_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers")
_SIDES = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "num_layers"),
}
# Settings with an entry for each layer, or with the numbers of some layers.
_PER_LAYER = re.compile(r"layer|_types?$|pattern$|windows?$|^intermediate_size$|_heads$|_theta$")
_NUMBERS = re.compile(r"layers?$|idxs?$|ind(ic|ex)es$|layer_ids$|attn_layer")
# Attributes that may differ between a layer and its copy: its number, and T5's relative positions in its first layer.
_OWN = re.compile(r"training|has_relative_attention_bias|(.*_)?(layer|block)_?(idx|id|index|number|num)|idx|index")


def spread(count: int, of: int) -> tuple[int, ...]:
    """Return the numbers of `count` layers among `of`, evenly spread from the first to the last.

    >>> spread(6, 12)  # as DistilBERT: Sanh et al. 2019 (arXiv:1910.01108)
    (0, 2, 4, 7, 9, 11)
    """
    return tuple(round(i * (of - 1) / max(count - 1, 1)) for i in range(count))


@checked
def from_layers(
    teacher: nn.Module,
    layers: int | Sequence[int],
    *,
    by: Importance | None = None,
    stack: str | None = None,
    inputs: object = None,
    copy: bool = True,
) -> nn.Module:
    """Return a student with some of the teacher's layers, and with the teacher's weights in them and everywhere else.

    The usual choices: `6` for six evenly spread (DistilBERT, Sanh et al. 2019, arXiv:1910.01108); `range(6)` for the
    first six (PKD, Sun et al. 2019, arXiv:1908.09355, section 4.1); `range(0, 12, 2)` for every other one; any list;
    `6, by=importance(teacher, data)` for the six of most influence (ShortGPT, Men et al. 2024, arXiv:2403.03853), and
    `6, by=importance(teacher, data, search=6)` for the six that answer best without training.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(vocab_size=20, hidden_size=8, num_attention_heads=2, intermediate_size=8)
    >>> teacher = BertModel(BertConfig(num_hidden_layers=12, **sizes))
    >>> [from_layers(teacher, each).config.num_hidden_layers for each in (6, range(3), range(0, 12, 2), (0, 5, -1))]
    [6, 3, 6, 3]

    Args:
        teacher: a transformers model, or any module with a list of repeated blocks.
        layers: the numbers of the layers, in order, −1 is the last; or their count, spread evenly from first to last.
        by: the result of `importance(teacher, data)`: a count of layers means the most important ones, in the order of
            the teacher.
        stack: one of several lists of blocks, as `Location(stack=…)` takes it; None is the decoder of an
            encoder–decoder. For both: `from_layers(from_layers(teacher, 6), 6, stack="encoder")`.
        inputs: inputs of the model, as `interventions.run` takes them, for a trial run of the student. Needed for a
            module without a transformers configuration whose blocks differ in shape.
        copy: False shares the teacher's weights instead, which are frozen in the student, so that it learns by adapters
            alone: `get_peft_model(from_layers(teacher, 6, copy=False), LoraConfig(…))`.

    Returns:
        A model of the same class, in the mode of the teacher, on its device; nothing is shared with the teacher, unless
        `copy=False`.

    Raises:
        DistillError: a layer that does not exist, or layers that cannot be taken out of this model.
    """
    teacher = plain(teacher, "from_layers")
    whole = stack_of(teacher, stack)
    chosen = _choose(layers, len(whole.blocks)) if by is None else _most(by, layers, whole, stack)
    if hasattr(teacher, "config") and hasattr(teacher, "save_pretrained"):
        student = _build(teacher, whole, chosen, shared=not copy)
    else:
        student = _cut(teacher, whole, chosen, is_tried=inputs is not None, shared=not copy)
    if not copy:
        student.requires_grad_(False)
    if inputs is not None:
        _try_out(student, inputs, chosen)
    return student


def stack_of(model: nn.Module, name: str | None) -> Stack:
    """Return the list of blocks of a model with this name; without one, the list that locations without it mean.

    Raises:
        DistillError: no such list, or several that it could be.
    """
    found = architecture(model)
    try:
        block = found.place(Location(0, stack=name)).block
    except InterventionError as error:
        raise DistillError(f"layers cannot be counted: {error}") from error
    return next(each for each in found.stacks if (each.name == name or name is None) and block in each.blocks)


def _choose(layers: int | Sequence[int], deep: int) -> tuple[int, ...]:
    if isinstance(layers, int):
        if not 1 <= layers <= deep:
            raise DistillError(
                f"a student of {layers} layers cannot be made from a teacher of {deep}; choose 1 to {deep}."
            )
        return spread(layers, deep)
    wrong = [layer for layer in layers if not -deep <= layer < deep]
    if wrong or not layers:
        raise DistillError(
            f"layers={list(layers)} cannot be taken from a teacher of {deep} layers (0 to {deep - 1}); name at "
            "least one that exists."
        )
    return tuple(layer % deep for layer in layers)


def _most(by: Importance, layers: int | Sequence[int], whole: Stack, stack: str | None) -> tuple[int, ...]:
    """Return the numbers of the most important layers, in order.

    Raises:
        DistillError: the numbers of layers instead of their count, or the importance of another model.
    """
    if not isinstance(layers, int):
        raise DistillError(
            f"layers={list(layers)} names the layers, so by=… has nothing to choose; give their count, "
            f"from_layers(teacher, {max(1, len(layers))}, by=…), or leave by out."
        )
    deep = len(whole.blocks)
    if layers == deep:
        return tuple(range(deep))
    _choose(layers, deep)
    found = by.most_layers(layers, stack)
    ranked = sum(at.stack == stack for at in by.layers)
    if ranked != deep:
        raise DistillError(
            f"by=… ranks {ranked} layers and this teacher has {deep}; measure the teacher itself: "
            "by=importance(teacher, data)."
        )
    return found


def _build(teacher: Any, stack: Stack, chosen: tuple[int, ...], *, shared: bool) -> nn.Module:
    parameter = next(teacher.parameters())
    try:
        with torch.random.fork_rng(devices=[]):
            student = type(teacher)(_shrink_config(teacher, stack, chosen)).to(parameter.device, parameter.dtype)
    except (AssertionError, IndexError, NotImplementedError, TypeError, ValueError) as error:
        if isinstance(error, DistillError):
            raise
        raise DistillError(
            f"no {type(teacher).__name__} of layers {list(chosen)} can be configured ({error}); build the student "
            "yourself and pass it to distill.fit(teacher, student, ...)."
        ) from error
    _check_alike(teacher, student, stack, chosen)
    _copy(teacher, student, stack, chosen, shared=shared)
    for name in ("task_specific_params", "generation_config"):
        if getattr(teacher, name, None) is not None:
            setattr(student, name, deepcopy(getattr(teacher, name)))
    return student.train(teacher.training)


def _shrink_config(teacher: Any, stack: Stack, chosen: tuple[int, ...]) -> Any:
    """Return the configuration of the student: the number of its layers, and the settings of each layer."""
    whole = deepcopy(teacher.config)
    part, deep = _part_of(teacher, whole, stack.path), len(stack.blocks)
    names = _SIDES.get(stack.name, ()) if getattr(part, "is_encoder_decoder", False) else ()
    name = next((each for each in (*names, *_COUNTS) if getattr(part, each, None) == deep), None)
    if name is None:
        raise DistillError(
            f"the configuration of {type(teacher).__name__} does not decide its number of layers (no setting is "
            f"{deep}); build the student yourself and pass it to distill.fit(teacher, student, ...)."
        )
    for setting, value in list(vars(part).items()):
        if isinstance(value, list | tuple) and (kept := _of_layers(setting, list(value), deep, chosen)) is not None:
            setattr(part, setting, type(value)(kept))
    if isinstance(getattr(part, "attention_types", None), list) and hasattr(part, "attention_layers"):
        part.attention_types = [[list(part.attention_layers), 1]]  # GPT-Neo's short form of the same list
    setattr(part, name, len(chosen))
    return whole


def _part_of(teacher: Any, whole: Any, path: str) -> Any:
    """Return the part of the copied configuration that the stack at `path` was built from."""
    names = [name for name in getattr(teacher.config, "sub_configs", {}) if getattr(teacher.config, name, None)]
    while path:
        path = path.rpartition(".")[0]
        own = getattr(teacher.get_submodule(path), "config", None)
        for name in names:
            if own is getattr(teacher.config, name):
                return getattr(whole, name)
    return whole


def _of_layers(name: str, values: list[Any], deep: int, chosen: tuple[int, ...]) -> list[Any] | None:
    """Return a setting for the chosen layers, if it has an entry for each layer or numbers of layers; None if not."""
    numbers = all(type(value) is int and 0 <= value < deep for value in values) and values == sorted(set(values))
    if values and numbers and _NUMBERS.search(name):
        return [new for new, old in enumerate(chosen) if old in values]
    if len(values) == deep and _PER_LAYER.search(name):
        return [values[layer] for layer in chosen]
    return None


def _check_alike(teacher: nn.Module, student: nn.Module, stack: Stack, chosen: tuple[int, ...]) -> None:
    """Raise DistillError unless the new blocks equal the chosen ones, down to every number that their modules hold."""
    blocks = next((each.blocks for each in architecture(student).stacks if each.path == stack.path), ())
    name = type(teacher).__name__
    if len(blocks) != len(chosen):
        raise DistillError(
            f"the configuration of {name} does not decide its number of layers ({len(blocks)} were built, "
            f"{len(chosen)} needed); build the student yourself and pass it to distill.fit(teacher, student, ...)."
        )
    others = {each.path: len(each.blocks) for each in architecture(student).stacks}
    for each in architecture(teacher).stacks:
        if each.path != stack.path and others.get(each.path) != len(each.blocks):
            raise DistillError(
                f"the configuration of {name} counts the blocks {each.path!r} with those of {stack.path!r}, so these "
                "cannot be cut alone; build the student yourself and pass it to distill.fit(teacher, student, ...)."
            )
    for new, (old, block) in enumerate(zip(chosen, blocks, strict=True)):
        difference = next(_differences(stack.blocks[old], block), None)
        if difference is not None:
            raise DistillError(
                f"layer {old} of {name} cannot be layer {new} of a student: its {difference} would differ, because it "
                "depends on the number of the layer; choose layers of the same kinds in the same order, e.g. "
                f"range({len(chosen)})."
            )


def _differences(old: nn.Module, new: nn.Module) -> Iterator[str]:
    """Yield the names of modules, settings and unsaved buffers in which two blocks differ."""
    modules = dict(new.named_modules())
    kept = set(old.state_dict())
    buffers = dict(new.named_buffers())
    for path, module in old.named_modules():
        if type(modules.get(path)) is not type(module):
            yield path or "class"
            continue
        for name, value in vars(module).items():
            other = vars(modules[path]).get(name)
            if isinstance(value, bool | int | float | str) and value != other and not _OWN.fullmatch(name):
                yield f"{path}.{name}".lstrip(".")
    for name, buffer in old.named_buffers():
        if name not in kept and (name not in buffers or not _equal(buffer, buffers[name])):
            yield name


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.to(one))


def _copy(teacher: nn.Module, student: nn.Module, stack: Stack, chosen: tuple[int, ...], *, shared: bool) -> None:
    """Copy the teacher's weights into a student, or let it hold them in the teacher's memory."""
    sources = _sources(teacher, student, stack, chosen)
    # Buffers that are not saved are copied too: a teacher in half precision has rounded ones.
    given = dict(teacher.named_buffers()) | teacher.state_dict()
    held: dict[str, Any] = dict(student.named_buffers(remove_duplicate=False))
    held |= dict(student.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, target in (dict(student.named_buffers()) | student.state_dict()).items():
            path = next((each for each in sources if name.startswith(f"{each}.")), None)
            source = name if path is None else sources[path] + name.removeprefix(path)
            if source not in given and "relative_attention_bias" in name:
                source = name  # T5 has it in its first layer only: the first layer of the student gets it
            if source not in given or given[source].shape != target.shape:
                raise DistillError(
                    f"{name!r} of the student has no counterpart of its shape among the weights of "
                    f"{type(teacher).__name__}, so these layers cannot be taken out of it; build the student yourself "
                    "and pass it to distill.fit(teacher, student, ...)."
                )
            if shared:
                held[name].data = given[source].detach()
            else:
                target.copy_(given[source])


def _sources(teacher: nn.Module, student: nn.Module, stack: Stack, chosen: tuple[int, ...]) -> dict[str, str]:
    """Return the path in the teacher for each path in the student, of blocks and of other modules with one a layer."""
    old, new = architecture(teacher), architecture(student)
    built = next(each for each in new.stacks if each.path == stack.path)
    sources: dict[str, str] = {}
    for block, layer in zip(built.blocks, chosen, strict=True):
        source = old.paths[stack.blocks[layer]]
        if sources.setdefault(new.paths[block], source) != source:
            raise DistillError(
                f"layers of {type(teacher).__name__} share their weights in groups, and {list(chosen)} would tear them "
                f"apart; choose as many of each group, in order: range({len(chosen)})."
            )
    for path in _beside(teacher, stack):
        if len(list(student.get_submodule(path).children())) == len(chosen):
            sources |= {f"{path}.{i}": f"{path}.{layer}" for i, layer in enumerate(chosen)}
    return sources


def _beside(model: nn.Module, stack: Stack) -> list[str]:
    """Return the paths of other lists in the module of the stack that have an entry for each block."""
    parent = stack.path.rpartition(".")[0]
    children = model.get_submodule(parent).named_children()
    paths = ((f"{parent}.{name}" if parent else name, child) for name, child in children)
    others = {each.path for each in architecture(model).stacks if each.path != stack.path and each.name}
    return [
        path
        for path, child in paths
        if isinstance(child, nn.ModuleList | nn.ParameterList)
        and path != stack.path
        and path not in others
        and len(child) == len(stack.blocks)
    ]


def _cut(teacher: nn.Module, stack: Stack, chosen: tuple[int, ...], *, is_tried: bool, shared: bool) -> nn.Module:
    name, deep = type(teacher).__name__, len(stack.blocks)
    container: Any = teacher.get_submodule(stack.path)
    held = tuple(container)
    if held != stack.blocks or len(set(held)) < deep:
        raise DistillError(f"the blocks of {name} do not lie in one list; build the student yourself.")
    beside = _beside(teacher, stack)
    if beside:
        raise DistillError(
            f"{name} has {beside[0]!r} beside its blocks {stack.path!r}, with as many entries, and may count on that; "
            "build the student yourself and pass it to distill.fit(teacher, student, ...)."
        )
    if not is_tried and len({tuple(p.shape for p in block.parameters()) for block in held}) > 1:
        raise DistillError(
            f"the blocks {stack.path!r} of {name} differ in shape, so not every choice of them fits together; give "
            "inputs for a trial run: from_layers(teacher, layers, inputs=…)."
        )
    student = _copied(teacher, shared=shared)
    container = student.get_submodule(stack.path)
    blocks = [_copied(block, shared=shared) for block in (list(container.children())[layer] for layer in chosen)]
    for key in [key for key, _ in container.named_children()]:
        delattr(container, key)
    for key, block in enumerate(blocks):
        container.add_module(str(key), block)
    path = stack.path
    while path:  # the modules around the blocks may hold their number
        path = path.rpartition(".")[0]
        module = student.get_submodule(path)
        for count in ("num_blocks", "n_blocks", *_COUNTS):
            if type(vars(module).get(count)) is int and vars(module)[count] == deep:
                setattr(module, count, len(chosen))
    return student


def _copied(module: nn.Module, *, shared: bool) -> nn.Module:
    """Return a copy of a module, or one with parameters and buffers of its own in the memory of the module's."""
    memo: dict[int, Any] = {}
    if shared:
        memo |= {id(each): nn.Parameter(each.detach(), requires_grad=False) for each in module.parameters()}
        memo |= {id(each): each.detach() for each in module.buffers()}
    return deepcopy(module, memo)


def _try_out(student: nn.Module, inputs: Any, chosen: tuple[int, ...]) -> None:
    try:
        with evaluating(student), torch.no_grad():
            run(student, inputs, resumable=False)
    except (RuntimeError, IndexError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DistillError(
            f"a {type(student).__name__} of its layers {list(chosen)} does not run on these inputs ({error}); choose "
            "others, or build the student yourself and pass it to distill.fit(teacher, student, ...)."
        ) from error
