"""Which blocks of a compressed model stand for which blocks of its original."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from distill.errors import DistillError
from distill.models.inputs import network_of
from interventions import Location, Stack, architecture, as_location, shown

Pairs = tuple[tuple[int, int], ...]
Search = Callable[[], Mapping[Any, Any]]
SEARCH = "search"
ALIKE = 0.9
"""The least cosine of the weights of two blocks of which one is taken for the other."""


@dataclass(frozen=True)
class Layers:
    """The blocks of one stack that stand for each other.

    Attributes:
        stack: the name of the stack in locations; None where a model has one.
        pairs: (block of the original, block of the compressed model), both ascending.
        depths: how many blocks both have.
    """

    stack: str | None
    pairs: Pairs
    depths: tuple[int, int]


def layers_of(
    original: nn.Module, compressed: nn.Module, mapping: Any = None, search: Search | None = None
) -> tuple[Layers, ...]:
    """Return which blocks stand for each other, stack by stack; none for models without blocks.

    Without a mapping block i stands for block i where both are equally deep; else each block of the compressed model
    for the block of the original whose weights are most like its own, as after layers were dropped; and where no
    weights are alike, for the one that a search finds. Blocks that are left at both ends stand for each other.

    Args:
        original, compressed: the models.
        mapping: {block of the original: block of the compressed model}, numbers or locations of block outputs, or
            "search".
        search: finds such a mapping; None refuses models that need it.

    Raises:
        DistillError: a mapping of blocks that do not exist or are not ascending; other stacks; or models of different
            depths whose blocks cannot be matched.
    """
    stacks, others = (architecture(network_of(model)).stacks for model in (original, compressed))
    if not stacks and mapping is None:
        return ()
    if [each.name for each in stacks] != [each.name for each in others]:
        raise DistillError(
            f"the original has the stacks {_names(stacks)} and the compressed model {_names(others)}, so no block "
            "stands for another; audit a model of the same architecture."
        )
    if isinstance(mapping, str) and mapping == SEARCH and search is not None:
        mapping = search()
    given = {} if mapping is None else _given(mapping, stacks)
    found = []
    for one, other in zip(stacks, others, strict=True):
        name = one.name if len(stacks) > 1 else None
        depths = (len(one.blocks), len(other.blocks))
        pairs = given.get(one.name) or _matched(one, other)
        if pairs is None and search is not None:
            given |= _given(search(), stacks)
            pairs = given.get(one.name)
        if pairs is None:
            raise _unmatched(*depths)
        _check(pairs, depths)
        found.append(Layers(name, _ended(pairs, depths), depths))
    return tuple(found)


def _ended(pairs: Pairs, depths: tuple[int, int]) -> Pairs:
    """Return the pairs with the last blocks of both, if neither stands for another one."""
    last = (depths[0] - 1, depths[1] - 1)
    return (*pairs, last) if pairs[-1][0] < last[0] and pairs[-1][1] < last[1] else pairs


def _unmatched(deep: int, shallow: int) -> DistillError:
    """Return the error about blocks of which it is unknown which stands for which."""
    return DistillError(
        f"the original has {deep} blocks and the compressed model {shallow}, whose weights are not those of some of "
        "them, and no search finds which stands for which; say it: mapping={0: 0, 3: 1}, {block of the original: block "
        "of the compressed model}."
    )


def _given(mapping: Any, stacks: tuple[Stack, ...]) -> dict[str, Pairs]:
    """Return a mapping of the user as pairs of numbers for each stack that it names."""
    if not isinstance(mapping, Mapping) or not mapping:
        raise DistillError(
            f"mapping={shown(mapping)} names no blocks; write {{block of the original: block of the compressed "
            "model}, e.g. mapping={0: 0, 3: 1}."
        )
    pairs: dict[str, list[tuple[int, int]]] = {}
    last = stacks[-1].name if stacks else ""
    for above, below in mapping.items():
        (layer, stack), (other, _) = _layer(above), _layer(below)
        pairs.setdefault(last if stack is None else stack, []).append((layer, other))
    unknown = next((name for name in pairs if name not in [each.name for each in stacks]), None)
    if unknown is not None:
        raise DistillError(f"mapping={shown(mapping)} names the stack {unknown!r}; there are {_names(stacks)}.")
    return {name: tuple(sorted(each)) for name, each in pairs.items()}


def _layer(side: Any) -> tuple[int, str | None]:
    """Return the number of a block and its stack; the last of several in a tuple."""
    place = side[-1] if isinstance(side, tuple | list) and side else side
    if isinstance(place, int) and not isinstance(place, bool):
        return place, None
    if isinstance(place, Location | str):
        at = as_location(place)
        if at.layer is not None and at.site == "block_output" and at.module is None and at.whole == at:
            return at.layer, at.stack
    raise DistillError(
        f"mapping side {shown(side)} is no block; write its number, e.g. mapping={{3: 1}}, or Location(3), its output."
    )


def _check(pairs: Pairs, depths: tuple[int, int]) -> None:
    for side, depth, whose in zip(zip(*pairs, strict=True), depths, ("original", "compressed model"), strict=True):
        wrong = next((each for each in side if not 0 <= each < depth), None)
        if wrong is not None:
            raise DistillError(
                f"mapping names block {wrong} and the {whose} has {depth} (0 to {depth - 1}); name blocks that exist."
            )
        if any(b <= a for a, b in pairwise(side)):
            raise DistillError(
                f"mapping {dict(pairs)} names the blocks {', '.join(map(str, side))} of the {whose}: each must come "
                "after the one before it, e.g. mapping={0: 0, 3: 1}."
            )


def _matched(one: Stack, other: Stack) -> Pairs | None:
    """Return block i for block i, or the blocks whose weights are most alike; None where they are like no others."""
    deep, shallow = len(one.blocks), len(other.blocks)
    if deep == shallow:
        return tuple((i, i) for i in range(deep))
    like = torch.tensor([[_cosine(a, b) for a in one.blocks] for b in other.blocks])
    best, most = like.argmax(1).tolist(), like.amax(1)
    ascending = all(b > a for a, b in pairwise(best))
    if not ascending or float(most.min()) < ALIKE:
        return None
    return tuple((layer, i) for i, layer in enumerate(best))


def _cosine(one: nn.Module, other: nn.Module) -> float:
    """Return the mean cosine of the weights of two blocks, by their names; −1 where these or their shapes differ."""
    weights, others = _weights(one), _weights(other)
    if weights.keys() != others.keys() or any(weights[name].shape != others[name].shape for name in weights):
        return -1.0
    cosines = [
        cosine_similarity(weights[name].flatten(), others[name].flatten(), dim=0)
        for name in weights
        if weights[name].numel() > 1 and bool(weights[name].any())
    ]
    return float(torch.stack(cosines).mean()) if cosines else -1.0


def _weights(block: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of a block by name, those of quantized modules as numbers."""
    found = {}
    for name, module in block.named_modules():
        for key, value in [*module.named_parameters(recurse=False), *_quantized(module)]:
            if isinstance(value, torch.Tensor):
                found[f"{name}.{key}"] = value.detach().float()
    return found


def _quantized(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return weight and bias of a quantized module of torch, which are no parameters."""
    if not type(module).__module__.startswith("torch.ao.nn.quantized"):
        return []
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    found = [(name, each()) for name, each in (("weight", weight), ("bias", bias)) if callable(each)]
    return [(n, e.dequantize() if e.is_quantized else e) for n, e in found if isinstance(e, torch.Tensor)]


def _names(stacks: tuple[Stack, ...]) -> str:
    return ", ".join(repr(each.name) for each in stacks) or "none"
