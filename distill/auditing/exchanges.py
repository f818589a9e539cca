"""The parts that two models have in common, and how each is exchanged alone: what is read where, and written where."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from distill.auditing.answers import Models
from distill.auditing.layers import Layers
from distill.auditing.reading import COMPRESSED, ORIGINAL, ran_on
from distill.data.rows import Rows
from distill.errors import DistillError
from distill.models.inputs import network_of
from interventions import InterventionError, Location, Run, run

Places = dict[Location, Location]
"""{location in the compressed model: location in the original}."""


@dataclass(frozen=True, eq=False)
class Forced:
    """A run of the compressed model that takes some values from the original's run on the same rows.

    Attributes:
        writes: where it takes them.
    """

    writes: Places


@dataclass(frozen=True, eq=False)
class Exchange:
    """A part of the compressed model, and how it is exchanged alone.

    Attributes:
        site: what it is: "embedding", "attention_heads", "attention_output", "mlp_output", "rest of block",
            "block_output" (a whole block, or all blocks between two that are mapped), "dropped blocks", "final_norm",
            "head" (all after the last block) or "module".
        written: where its output is written in the original; None for the head, which gives the answers.
        read: where its output is read.
        forced: the run in which it is read; None is the run of the original, of which a later part was dropped.
        first: the first block of the original that it stands for, where that is another than the last.
    """

    site: str
    written: Location | None
    read: Location | None
    forced: Forced | None
    first: int | None = None


def exchanges_of(models: Models, rows: Rows, *, whole: bool) -> list[Exchange]:
    """Return the parts of two models that can be exchanged.

    Args:
        models: both; without blocks the modules of the same path are exchanged.
        rows: the data, of which two rows are run.
        whole: only embeddings, whole blocks, and what is after them.

    Raises:
        DistillError: the models have no part in common, or other widths.
    """
    here, there = models.columns(rows, torch.arange(min(2, len(rows))))
    runs = ran_on(ORIGINAL, models.original, here), ran_on(COMPRESSED, models.compressed, there)
    common = Common(models.original, models.compressed, runs)
    if not models.layers:
        return _modules(common)
    found: list[Exchange] = []
    ends: Places = {}
    for number, each in enumerate(models.layers):
        found += _of_stack(common, each, dict(ends), whole=whole, last=number == len(models.layers) - 1)
        ends |= _end(common, each)
    return found


@dataclass(frozen=True, eq=False)
class Common:
    """Two models, and the places that both have.

    Attributes:
        original, compressed: the models.
        runs: one of each on a few rows.
    """

    original: nn.Module
    compressed: nn.Module
    runs: tuple[Run, Run]

    def has(self, here: Location, there: Location) -> bool:
        """Return whether both have a place, with activations of one shape."""
        shapes = [_shape(ran, at) for ran, at in zip(self.runs, (here, there), strict=True)]
        return shapes[0] is not None and shapes[0] == shapes[1]

    def heads(self, here: Location) -> int:
        """Return how many heads the original has at a place."""
        return int(self.runs[0].vectors(here).shape[-2])


def _shape(ran: Run, at: Location) -> torch.Size | None:
    """Return the shape of the activations at a place of a run; None where there is no such place."""
    try:
        if at not in ran.activations:
            ran = run(ran.model, ran.inputs, [at], resumable=False)
        return ran.vectors(at).shape if ran.activations[at].is_floating_point() else None
    except InterventionError:
        return None


def _of_stack(common: Common, layers: Layers, outer: Places, *, whole: bool, last: bool) -> Iterator[Exchange]:
    """Yield the parts of one stack; `outer` are the ends of the stacks before it."""
    stack, pairs = layers.stack, layers.pairs

    def at(layer: int | None, site: str = "block_output") -> Location:
        return Location(layer, site, stack=stack)

    embedding = at(None, "embedding")
    if common.has(embedding, embedding):
        yield Exchange("embedding", embedding, embedding, Forced({**outer}))
    _check_widths(common, [(at(i), at(j)) for i, j in pairs])
    starts = [(0, 0), *((i + 1, j + 1) for i, j in pairs[:-1])]
    alone = Forced({**{at(j, "block_input"): at(i, "block_input") for i, j in starts}, **outer})
    for (first, _), (i, j) in zip(starts, pairs, strict=True):
        yield Exchange("block_output", at(i), at(j), alone, first if first < i else None)
    end = pairs[-1][0]
    if end < layers.depths[0] - 1:
        yield Exchange("dropped blocks", at(layers.depths[0] - 1), at(end), None, end + 1)
    if not whole:
        yield from _inside(common, layers, outer, at)
    after = Forced({**outer, at(pairs[-1][1]): at(layers.depths[0] - 1)})
    norm = at(None, "final_norm")
    if last:
        yield Exchange("head", None, None, after)
    elif common.has(norm, norm):
        yield Exchange("final_norm", norm, norm, after)


def _inside(common: Common, layers: Layers, outer: Places, at: Callable[[int, str], Location]) -> Iterator[Exchange]:
    """Yield the parts of each block: its heads, attention, feed-forward part, and the rest."""

    def places(site: str) -> Places:
        found = ((at(j, site), at(i, site)) for i, j in layers.pairs)
        return {there: here for there, here in found if common.has(here, there)}

    inputs = {at(j, "block_input"): at(i, "block_input") for i, j in layers.pairs} | outer
    heads, attention, mlp = (places(site) for site in ("attention_heads", "attention_output", "mlp_output"))
    ran = Forced(inputs)
    for there, here in heads.items():
        for head in range(common.heads(here)):
            written, read = (replace(each, heads=(head,)) for each in (here, there))
            yield Exchange("attention_heads", written, read, ran)
    ran = Forced(inputs | heads)
    for there, here in attention.items():
        yield Exchange("attention_output", here, there, ran)
    ran = Forced(inputs | attention)
    for there, here in mlp.items():
        yield Exchange("mlp_output", here, there, ran)
    ran = Forced(inputs | attention | mlp)
    both = {each.layer for each in attention} & {each.layer for each in mlp}
    for i, j in layers.pairs:
        if j in both:
            yield Exchange("rest of block", at(i, "block_output"), at(j, "block_output"), ran)


def _end(common: Common, layers: Layers) -> Places:
    """Return where the stacks after one read it: its last normalisation, or its last block."""
    norm = Location(site="final_norm", stack=layers.stack)
    if common.has(norm, norm):
        return {norm: norm}
    return {Location(layers.pairs[-1][1], stack=layers.stack): Location(layers.depths[0] - 1, stack=layers.stack)}


def _modules(common: Common) -> list[Exchange]:
    """Return the modules of the same path that hold weights and no other module, for models without blocks."""
    others = dict(network_of(common.compressed).named_modules())
    found = []
    for path, module in network_of(common.original).named_modules():
        if not path:
            continue
        given, gives = Location(module=path, io="input"), Location(module=path)
        if path in others and _holds_weights(module) and common.has(gives, gives):
            found.append((given, gives))
    if not found:
        raise DistillError(
            f"{ORIGINAL} and {COMPRESSED} have no module in common that can be exchanged; audit a model of the same "
            "architecture."
        )
    forced = Forced({given: given for given, _ in found if common.has(given, given)})  # ids of tokens are the same
    return [Exchange("module", gives, gives, forced) for _, gives in found]


def _holds_weights(module: nn.Module) -> bool:
    """Return whether a module holds weights itself, and no other module."""
    return not any(True for _ in module.children()) and bool(module.state_dict())


def _check_widths(common: Common, places: Iterable[tuple[Location, Location]]) -> None:
    """Raise DistillError where two blocks return other shapes."""
    for here, there in places:
        if not common.has(here, there):
            shapes = [_shape(ran, at) for ran, at in zip(common.runs, (here, there), strict=True)]
            wide, narrow = ("nothing" if each is None else str(list(each)) for each in shapes)
            raise DistillError(
                f"{here} of {ORIGINAL} has {wide} and {there} of {COMPRESSED} {narrow}, so their parts cannot take "
                "each other's place; audit a model of the same width."
            )
