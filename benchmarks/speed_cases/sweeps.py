"""What a sweep costs beside a loop of hooks, and beside the batched and resumed version that one writes by hand.

GPT-2 of 12 × 192 with 12 heads, four examples of 16 tokens; the metric reads the last token.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from interventions import Location, logit_difference, sweep

from .measuring import LIMIT, NOW, UNIT, Case, Given, same
from .models import VOCABULARY, gpt2, keeping, state_of, tokens

LAYERS, WIDTH, HEADS, LENGTH, EXAMPLES = 12, 192, 12, 16, 4
OF_HEAD = WIDTH // HEADS
Cell = tuple[int, str, int | None, int | None]
"""The layer, the site, the head and the position of a counterfactual; None is all of them."""


def part_of(model: GPT2LMHeadModel, layer: int, site: str) -> nn.Module:
    block = model.transformer.h[layer]
    return {"block_output": block, "attention_heads": block.attn.c_proj, "mlp_output": block.mlp}[site]


def hook(part: nn.Module, site: str, change: Callable[[Tensor], Tensor]) -> torch.utils.hooks.RemovableHandle:
    """Register a hook that changes the state at a site of this part."""
    if site == "attention_heads":
        return part.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))
    return part.register_forward_hook(
        lambda module, args, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
    )


def states_of(model: GPT2LMHeadModel, inputs: dict, sites: set[str]) -> dict[tuple[int, str], Tensor]:
    """The states of one run at these sites of all blocks, and the outputs of the blocks."""
    kept: dict = {}
    handles = []
    for layer in range(LAYERS):
        for site in sites | {"block_output"}:
            part = part_of(model, layer, site)
            if site == "attention_heads":
                handles.append(part.register_forward_pre_hook(lambda m, args: kept.update({m: args[0]})))
            else:
                handles.append(part.register_forward_hook(keeping(kept)))
    model(**inputs)
    for handle in handles:
        handle.remove()
    places = [(layer, site) for layer in range(LAYERS) for site in sites | {"block_output"}]
    return {place: kept[part_of(model, *place)] for place in places}


def write(state: Tensor, source: Tensor, cell: Cell) -> None:
    """Write the source into a part of `state`, which is a copy."""
    _, _, head, position = cell
    at = slice(None) if position is None else slice(position, position + 1)
    dims = slice(None) if head is None else slice(head * OF_HEAD, (head + 1) * OF_HEAD)
    state[:, at, dims] = source[:, at, dims]


def hook_loop(model: GPT2LMHeadModel, base: dict, source: dict, cells: list[Cell], metric: Callable) -> Tensor:
    """A full run with one hook for each cell."""
    kept, found = states_of(model, source, {site for _, site, _, _ in cells}), []
    for cell in cells:

        def change(state: Tensor, cell: Cell = cell) -> Tensor:
            new = state.clone()
            write(new, kept[cell[:2]], cell)
            return new

        handle = hook(part_of(model, *cell[:2]), cell[1], change)
        found.append(metric(model(**base).logits[:, -1:]))
        handle.remove()
    return torch.stack(found)


def by_hand(model: GPT2LMHeadModel, base: dict, source: dict, cells: list[Cell], metric: Callable) -> Tensor:
    """The cells of one layer and site in one batch, without the blocks before it, and the last token's logits."""
    sites = {site for _, site, _, _ in cells}
    kept, before = states_of(model, source, sites), states_of(model, base, sites)
    embedded = model.transformer.wte(base["input_ids"]) + model.transformer.wpe.weight[:LENGTH]
    found: dict[Cell, Tensor] = {}
    for layer, site in dict.fromkeys(cell[:2] for cell in cells):
        together = [cell for cell in cells if cell[:2] == (layer, site)]

        def change(state: Tensor, together: list[Cell] = together) -> Tensor:
            new = state.clone()
            for rows, cell in zip(new.chunk(len(together)), together, strict=True):
                write(rows, kept[cell[:2]], cell)
            return new

        first = layer + (site == "block_output")
        state = (before[first - 1, "block_output"] if first else embedded).repeat(len(together), 1, 1)
        if site == "block_output":
            state, handle = change(state), None
        else:
            handle = hook(part_of(model, layer, site), site, change)
        for block in model.transformer.h[first:]:
            state = state_of(block(state))
        if handle is not None:
            handle.remove()
        logits = model.lm_head(model.transformer.ln_f(state[:, -1:])).chunk(len(together))
        found |= {cell: metric(each) for cell, each in zip(together, logits, strict=True)}
    return torch.stack([found[cell] for cell in cells])


def swept(given: Given, places: list[Location], positions: list[int] | None) -> Case:
    model = gpt2(LAYERS, WIDTH, given.device, HEADS).to(given.dtype)
    base, source = (tokens(EXAMPLES, LENGTH, given.device, seed) for seed in (0, 1))
    columns = [None] if positions is None else positions
    cells = [(at.layer, at.site, None if at.heads is None else at.heads[0], p) for at in places for p in columns]
    drawn = torch.Generator().manual_seed(2)
    answers, foils = (torch.randint(VOCABULARY, (EXAMPLES,), generator=drawn).to(given.device) for _ in range(2))

    def metric(logits: Tensor) -> Tensor:
        last = logits[:, -1]
        return (last.gather(1, answers[:, None]) - last.gather(1, foils[:, None]))[:, 0]

    def ours() -> Tensor:
        scored = logit_difference(answers, foils)
        grid = sweep(model, base, source, places, metric=scored, positions=positions)
        return grid.per_example.reshape(len(cells), EXAMPLES)

    given_to_both = (model, base, source, cells, metric)
    sides = {UNIT: partial(hook_loop, *given_to_both), LIMIT: partial(by_hand, *given_to_both), NOW: ours}

    def check() -> None:
        tolerance = 1e-4 if given.dtype == torch.float32 else 0.1  # rows of another number are added in another order
        same(sides[UNIT](), sides[LIMIT](), tolerance)
        same(sides[UNIT](), ours(), tolerance)

    return Case(sides, 1.1, "a loop of hooks", check, {"cells": len(cells)})


BLOCKS = [Location(layer) for layer in range(LAYERS)]
SINGLE = [Location(layer, "attention_heads", heads=head) for layer in range(LAYERS) for head in range(HEADS)]
SITES = [Location(n, site) for n in range(LAYERS) for site in ("attention_heads", "mlp_output", "block_output")]
CASES: dict[str, Callable[[Given], Case]] = {
    "sweep, 192 cells, 12 × 192": partial(swept, places=BLOCKS, positions=list(range(LENGTH))),
    "sweep, 144 heads, 12 × 192": partial(swept, places=SINGLE, positions=None),
    "sweep, 3 sites, 144 cells, 12 × 192": partial(swept, places=SITES, positions=[0, 5, 10, 15]),
    "sweep, 12 blocks, all positions, 12 × 192": partial(swept, places=BLOCKS, positions=None),
}
