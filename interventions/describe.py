"""`describe`: a readable list of the places in a model that a `Location` can name."""

from collections.abc import Iterator
from html import escape
from itertools import pairwise

from torch import nn

from interventions.arguments import checked
from interventions.locations import BLOCK_SITES
from interventions.models.architectures import Architecture, architecture
from interventions.models.attentions import attention_of
from interventions.models.block_sites import inside
from interventions.models.feed_forwards import feed_forward_of
from interventions.models.layers import Missing, width_in, width_out
from interventions.models.modules import model_name
from interventions.models.stacks import Stack
from interventions.models.tensor_parallel import split_of
from interventions.models.wrappers import Model
from interventions.names import printable
from interventions.runs import traced

_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim")
_Row = tuple[str, str, str, str]  # site, layers, shape, where


class Description(str):
    """A text of several lines, which a notebook shows as such."""

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self)}</pre>"


@checked
def describe(model: Model, *, paths: bool = True) -> str:
    """Return a text that lists what can be addressed in a model: sites of each stack with layers, shapes and modules.

    Sites that a model lacks are listed with the reason. Shapes are those that the modules state; the model is not run.
    For a model of nnsight the operations inside the forwards of the listed modules are listed too.

    Args:
        model: a torch model, or one of nnsight.
        paths: also list the modules by path: those of the first block of each stack and those outside of the stacks.

    >>> print(describe(nn.Sequential(nn.Linear(2, 3), nn.ReLU())))
    Sequential: no blocks were found (no ModuleList or Sequential of repeated blocks); its modules go by path.
    <BLANKLINE>
    by path: Location(module='…'), with io='input' for what the module receives
      0  Linear
      1  ReLU
    """
    tracing = traced(model)
    found = architecture(model)
    lines = []
    for stack in found.stacks:
        lines += [_heading(found, stack), *_table(list(_rows(found, stack))), *_missing(found, stack), ""]
    if not found.stacks:
        lines += [
            f"{model_name(found.model)}: no blocks were found (no ModuleList or Sequential of repeated blocks); its "
            "modules go by path.",
            "",
        ]
    if paths:
        lines += ["by path: Location(module='…'), with io='input' for what the module receives"]
        lines += [f"  {path or '(the model)'}  {type(module).__name__}" for path, module in _modules(found)]
    if paths and tracing is not None:
        lines += ["", "inside a forward: Location(module='…', operation='…'), or Location(3, operation='…') in a block"]
        lines += tracing.operations_listed([("", found.model), *_modules(found)])
    return Description(printable("\n".join(lines).rstrip()))


def _heading(found: Architecture, stack: Stack) -> str:
    """Return the first line of a stack: its name, and the number, path and classes of its blocks."""
    kinds = ", ".join(dict.fromkeys(type(block).__name__ for block in stack.blocks))
    which = f" stack={stack.name!r}," if len(found.stacks) > 1 else ""
    count = len(stack.blocks)
    return f"{model_name(found.model)}:{which} {count} block{'s' * (count > 1)} in {stack.path} ({kinds})"


def _rows(found: Architecture, stack: Stack) -> Iterator[_Row]:
    """Yield a row for each site and shape that the stack has."""
    yield "embedding", "", _shape(found, stack, 0, "embedding"), "what block 0 receives"
    for site in BLOCK_SITES:
        layers = [i for i, block in enumerate(stack.blocks) if not isinstance(_place(found, block, site), Missing)]
        shapes: dict[str, list[int]] = {}
        for i in layers:
            shapes.setdefault(_shape(found, stack, i, site), []).append(i)
        for shape, same in shapes.items():
            yield site, _ranges(same), shape, _where(found, stack, same, site)
    try:
        norm = found.final_norm(stack)
        yield "final_norm", "", _shape(found, stack, -1, "block_output"), found.paths[norm]
    except Missing:
        pass
    if stack is found.stacks[-1] and not _is_headless(found.model):
        yield "logits", "", "", "what the model answers"


def _missing(found: Architecture, stack: Stack) -> Iterator[str]:
    """Yield a line for each reason why sites are missing in some layers."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for i, block in enumerate(stack.blocks):
        absent: dict[str, list[str]] = {}
        for site in BLOCK_SITES:
            place = _place(found, block, site)
            if isinstance(place, Missing):
                absent.setdefault(str(place), []).append(site)
        for reason, sites in absent.items():
            reasons.setdefault((", ".join(sites), reason), []).append(i)
    try:
        found.final_norm(stack)
    except Missing as why:
        reasons["final_norm", str(why)] = []
    if stack is found.stacks[-1] and _is_headless(found.model):
        reasons["logits", f"{type(found.model).__name__} has no head"] = []
    for (names, reason), layers in reasons.items():
        yield f"  missing{' in ' + _ranges(layers) if layers else ''}: {names}: {reason}"


def _is_headless(model: nn.Module) -> bool:
    """Return whether a model is one of transformers that returns hidden states and no logits."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        return False
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    named = MODEL_MAPPING_NAMES.get(kind, ())
    return type(model).__name__ in ((named,) if isinstance(named, str) else named)


def _place(found: Architecture, block: nn.Module, site: str) -> nn.Module | Missing:
    """Return the module of a site in a block, or the reason why there is none."""
    try:
        module, io, _ = inside(block, site)
    except Missing as why:
        return why
    split = split_of(found.structure)
    if split is not None and split.holds_part(found.structure, module, io):
        return Missing(f"split over {split.processes} processes, which have other heads, units or tokens of it each")
    return module


def _shape(found: Architecture, stack: Stack, layer: int, site: str) -> str:
    """Return the shape at a site as the modules state it, with `…` for what they do not state."""
    block = stack.blocks[layer]
    if site in ("attention_scores", "attention_pattern"):
        return f"[batch, {_number(attention_of(block).heads)} heads, query, key]"
    if site in ("query", "key", "value", "attention_heads"):
        attention = attention_of(block)
        heads = attention.key_heads if site in ("key", "value") else attention.heads
        width = attention.match_dim if site in ("query", "key") else attention.head_dim
        return f"[batch, token, {_number(heads)} heads, {_number(width)}]"
    if site == "mlp_activation":
        down = feed_forward_of(block).down
        return f"[batch, token, {_number(width_in(down) if down is not None else None)}]"
    if any(isinstance(module, nn.Conv2d) for module in block.modules()) and _width(found, block) is None:
        return "[batch, channel, height, width]"
    return f"[batch, token, {_number(_width(found, block))}]"


def _width(found: Architecture, block: nn.Module) -> int | None:
    """Return the width of the states between the blocks; None if no module and no configuration states it."""
    try:
        projection = attention_of(block).projection
        if projection is not None and width_out(projection) is not None:
            return width_out(projection)
    except Missing:
        pass
    config = getattr(found.model, "config", None)
    return next((getattr(config, name) for name in _WIDTHS if isinstance(getattr(config, name, None), int)), None)


def _number(number: int | None) -> str:
    return "…" if number is None else str(number)


def _where(found: Architecture, stack: Stack, layers: list[int], site: str) -> str:
    """Return the path of the module at a site, with a star for the number of the block if there are several."""
    block = stack.blocks[layers[0]]
    module, io, _ = inside(block, site)
    path = found.paths[module].replace(found.paths[block], f"{stack.path}.*" if len(layers) > 1 else found.paths[block])
    return f"{path} ({io})" if io in ("input", "output") else path


def _ranges(numbers: list[int]) -> str:
    """Format `[0, 1, 2, 5]` as `0–2, 5`, and `[1, 3, 5, 7]` as `1, 3, …, 7`."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]}, …, {numbers[-1]}"
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}–{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _table(rows: list[_Row]) -> Iterator[str]:
    """Yield the rows as aligned lines, below a heading."""
    head = ("site", "layers", "shape", "module")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _modules(found: Architecture) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules with their paths, without those of all blocks but the first of each stack."""
    later = [f"{found.paths[block]}." for stack in found.stacks for block in stack.blocks[1:]]
    for path, module in found.model.named_modules():
        is_list = isinstance(module, nn.ModuleList | nn.ModuleDict)
        if path and not is_list and not any(f"{path}.".startswith(start) for start in later):
            yield path, module
