"""Find the stacks of a model, its lists of repeated blocks, by their structure.

A block is one whole layer. Three kinds of lists look like lists of blocks and are not:

- a list of *stages*, each with a list of blocks (Swin, ConvNeXt, ResNet): the blocks of all stages are one stack;
- a list of the *halves* of layers, attention and feed-forward part by turns (also in stages, as in LeViT, or in two
  lists side by side): no module computes the output of a layer;
- a list of parts inside a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from torch import nn

from interventions.models.attentions import has_attention, only_attends
from interventions.models.feed_forwards import has_feed_forward
from interventions.models.forward_order import adds, has_forward, uses
from interventions.models.layers import is_linear, is_norm, is_scale

_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "n_layer",
    "n_layers",
)
Blocks = tuple[nn.Module, ...]


@dataclass(frozen=True, eq=False)
class Stack:
    """A list of repeated blocks.

    Attributes:
        name: distinguishes it from the other stacks of the model, as "encoder" and "decoder"; "" if it is the only one.
        path: the path of the list in the model.
    """

    name: str
    path: str
    blocks: Blocks


def stacks_in(model: nn.Module) -> Iterator[tuple[str, Blocks]]:
    """Yield `(path, blocks)` of the lists whose blocks the configuration counts, or of all lists if it counts none."""
    counts = _layer_counts(model)
    found = list(_outermost(model, "", counts))
    halves = _in_two_lists(found)
    lists = [each for each in found if each not in halves]
    counted = (
        blocks for path, blocks in lists if {len(blocks), len(list(model.get_submodule(path).children()))} & counts
    )
    kinds = {type(block) for blocks in counted for block in blocks}
    for path, blocks in lists:
        if not kinds or kinds & {type(block) for block in blocks}:
            yield path, blocks


def halves_in(model: nn.Module) -> str | None:
    """Return the path of the first list of halves of layers; None if there is none."""
    counts = _layer_counts(model)
    lists = [(path, module) for path, module in model.named_modules() if _is_list(module)]
    halved = (path for path, module in lists if _is_halved(module, counts) or _holds_pairs(module))
    beside = (path for path, _ in _in_two_lists(list(_outermost(model, "", counts))))
    return next(chain(halved, beside), None)


def entries_of(module: nn.Module) -> Blocks:
    """Return the entries of a list; for a list of stages the blocks of all stages, one after the other."""
    entries = tuple(module.children())
    if not _is_list(module) or not entries:
        return entries
    stages = [] if _are_units(entries) else [_blocks_of_stage(entry) for entry in entries]
    if not any(stages):
        return entries
    # An entry that is no stage changes the shape between two stages, or is a block of another kind, as in MobileViT.
    parts = [stage or (() if _is_transition(entry) else (entry,)) for stage, entry in zip(stages, entries, strict=True)]
    kinds = {type(entry) for stage, entry in zip(stages, entries, strict=True) if stage}
    blocks = tuple(block for part in parts for block in part)
    return entries if any(type(block) in kinds for block in blocks) or not all(map(_is_block, blocks)) else blocks


def names_of(paths: list[str]) -> list[str]:
    """Return the shortest part of each path that no other one has there: `model.encoder.layers` → `encoder`."""
    if len(paths) < 2:
        return ["" for _ in paths]
    parts = [path.split(".") for path in paths]
    for depth in range(max(map(len, parts))):
        names = [part[depth] if depth < len(part) else part[-1] for part in parts]
        if len(set(names)) == len(names):
            return names
    return paths


def _outermost(module: nn.Module, path: str, counts: set[int]) -> Iterator[tuple[str, Blocks]]:
    """Yield `(path, blocks)` of each list of blocks that lies in no other, in order."""
    if path == "" and (blocks := _stack_in(module, counts)):
        yield path, blocks
        return
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if _is_halved(child, counts):
            continue
        if blocks := _stack_in(child, counts):
            yield child_path, blocks
        else:
            yield from _outermost(child, child_path, counts)


def _stack_in(module: nn.Module, counts: set[int]) -> Blocks:
    """Return the blocks of a list of blocks; () of any other module."""
    if not _is_list(module) or _is_halved(module, counts):
        return ()
    blocks = entries_of(module)
    if isinstance(module, nn.ModuleList):
        return blocks if all(map(_is_block, blocks)) else ()
    if blocks == tuple(module.children()):
        blocks = _longest_run(blocks)
    return blocks if len(blocks) > 1 and all(map(_is_block, blocks)) else ()


def _longest_run(entries: Blocks) -> Blocks:
    """Return the longest run of blocks of one class in a `Sequential`; () unless it holds most of the weights."""
    runs: list[list[nn.Module]] = []
    for entry in entries:
        if runs and type(runs[-1][-1]) is type(entry):
            runs[-1].append(entry)
        else:
            runs.append([entry])
    longest = max((run for run in runs if _is_block(run[0])), key=len, default=[])
    held, whole = (sum(p.numel() for entry in each for p in entry.parameters()) for each in (longest, entries))
    return tuple(longest) if 2 * held > whole else ()


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential)


def _is_block(module: nn.Module) -> bool:
    """Return whether a module may be a block: it runs, has parts and weights, and holds no halves of layers."""
    is_made_of_parts = any(True for _ in module.children()) and _has_weights(module) and has_forward(module)
    return is_made_of_parts and not is_norm(module) and not any(map(_is_torn, module.modules()))


def _is_torn(module: nn.Module) -> bool:
    """Return whether a module is a list of layers that no module computes: of lists of parts, or of halves in a row."""
    entries = tuple(module.children()) if isinstance(module, nn.ModuleList) else ()
    torn = len(entries) > 1 and all(isinstance(entry, nn.ModuleList) for entry in entries)
    unlike = torn and all(len({type(part) for part in entry.children()}) > 1 for entry in entries)
    return unlike or _holds_pairs(module)


def _holds_pairs(module: nn.Module) -> bool:
    """Return whether a module is a list of several attentions and several feed-forward parts: halves of layers."""
    if not _is_list(module):
        return False
    entries = [entry for entry in module.children() if _has_weights(entry)]
    return min(sum(map(only_attends, entries)), sum(map(_is_feed_forward, entries))) > 1


def _in_two_lists(lists: list[tuple[str, Blocks]]) -> list[tuple[str, Blocks]]:
    """Return the lists of halves of layers: one of attentions beside one of feed-forward parts."""
    attending = [each for each in lists if all(map(only_attends, each[1]))]
    feeding = [each for each in lists if all(map(_is_feed_forward, each[1]))]
    pairs = [(a, b) for a in attending for b in feeding if _parent(a[0]) == _parent(b[0]) and len(a[1]) == len(b[1])]
    return [each for pair in pairs for each in pair]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _blocks_of_stage(module: nn.Module) -> Blocks:
    """Return the blocks of a stage: of a list, or of a module that runs one list of blocks; () of any other module."""
    if _is_list(module):
        blocks = entries_of(module)
        is_whole = bool(blocks) and all(map(_is_block, blocks)) and _are_whole(blocks)
        return blocks if is_whole and not _mixes_halves(blocks) else ()
    lists = [child for child in module.children() if _is_list(child)]
    held = [(each, blocks) for each in lists if (blocks := _blocks_of_stage(each))]
    if len(held) != 1 or adds(module):
        return ()
    inner, blocks = held[0]
    return () if any(has_attention(child) for child in _until(module, inner)) else blocks


def _until(module: nn.Module, inner: nn.Module) -> Iterator[nn.Module]:
    """Yield the children of a module beside `inner`, without those used only after it: these merge tokens."""
    order = [use.path.partition(".")[0] for use in uses(module)]
    names = {child: name for name, child in module.named_children()}
    last = max((i for i, name in enumerate(order) if name == names[inner]), default=len(order))
    later = set(order[last + 1 :]) - set(order[:last])
    return (child for child, name in names.items() if child is not inner and name not in later)


def _are_whole(blocks: Blocks) -> bool:
    """Return whether blocks are whole layers: of one class, or each with a feed-forward part."""
    return len({type(block) for block in blocks}) == 1 or all(map(has_feed_forward, blocks))


def _are_units(entries: Blocks) -> bool:
    """Return whether each entry is one block of unlike parts: all entries have equal shapes, their parts do not."""
    own = [_shapes(entry) for entry in entries if isinstance(entry, nn.Sequential)]
    parts = [_shapes(part) for entry in entries if isinstance(entry, nn.Sequential) for part in entry.children()]
    return len(own) > 1 and len(set(own)) == 1 and len(set(parts)) > 1


def _shapes(module: nn.Module) -> tuple:
    """Return the classes of all parts of a module and the shapes of their weights."""
    shapes = (tuple(tuple(p.shape) for p in part.parameters(recurse=False)) for part in module.modules())
    return tuple(zip((type(part).__name__ for part in module.modules()), shapes, strict=True))


def _is_transition(module: nn.Module) -> bool:
    """Return whether a module only changes the shape between two stages: no residual sum, attention or blocks."""
    lists = (part for part in module.modules() if _is_list(part) and part is not module)
    held = any(_is_block(entry) for part in lists for entry in part.children())
    return not (held or adds(module) or has_attention(module) or any(map(_is_block, module.children())))


def _is_halved(module: nn.Module, counts: set[int]) -> bool:
    """Return whether a module is a list of halves of layers, or of lists with the parts of one layer each."""
    if not _is_list(module):
        return False
    entries = tuple(module.children())
    if len(entries) in counts or entries_of(module) != entries:
        return False
    if entries and not any(map(has_forward, entries)):
        parts = [part for entry in entries for part in entry.children()]
        return any(map(_is_block, parts)) and not all(map(is_norm, parts))
    return _mixes_halves(entries)


def _mixes_halves(entries: Blocks) -> bool:
    """Return whether some blocks are feed-forward parts alone and others are not: then they are halves of layers."""
    blocks = [entry for entry in entries if _is_block(entry)]
    return len(blocks) > 1 and len({_is_feed_forward(block) for block in blocks}) == 2 and len(blocks) == len(entries)


def _is_feed_forward(module: nn.Module) -> bool:
    """Return whether all weights of a module are those of matrix products of the last axis, norms and scales."""
    if has_attention(module):
        return False
    holders = [part for part in module.modules() if any(True for _ in part.parameters(recurse=False))]
    return all(is_linear(part) or is_norm(part) or is_scale(part) for part in holders)


def _layer_counts(model: nn.Module) -> set[int]:
    """Return the numbers of layers that the configuration and its sub-configurations state."""
    config = getattr(model, "config", None)
    if config is None:
        inner = next((m for m in model.modules() if hasattr(m, "config")), None)
        config = getattr(inner, "config", None)
    configs = [config, *(getattr(config, name) for name in getattr(config, "sub_configs", {}) if hasattr(config, name))]
    found = (getattr(c, name, None) for c in configs for name in _COUNTS)
    return {count for count in found if isinstance(count, int)}
