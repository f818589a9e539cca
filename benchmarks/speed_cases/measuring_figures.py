"""What it costs to measure interchanges: `interchange_accuracy`, `search_alignment`, and `align`.

By hand: runs on base and source are made once for a batch of 512 pairs, and each counterfactual resumes after the block
that is written. BERT classifiers of 6 → 3 blocks, texts of 16 tokens, three entries; the network of addition of
`interchange_training` for the others.
"""

from collections.abc import Callable
from functools import partial

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor
from torch.nn import functional

import distill
from distill.evaluation.measurement import paired
from distill.losses import kd
from interventions import Location, Rotation

from .interchange_training import ADDITION, BLOCKS, encode, network_of
from .measuring import LIMIT, NOW, Case, Given
from .models import Parts, bert, tokens

LENGTH, AT_ONCE, SPAN = 16, 512, 4
ENTRIES = (((0, 1), (0,)), ((2, 3), (1,)), ((4, 5), (2,)))
"""The blocks of the teacher and of the student that each entry swaps."""


def accuracy_by_hand(models: tuple[Parts, Parts], ids: Tensor, pairs: int, resumed: bool) -> Tensor:
    """Count agreement and effect of each entry, and sum its divergence, over spans of a quarter of the tokens.

    Args:
        models: teacher and student.
        ids: the texts.
        pairs: how many.
        resumed: whether counterfactuals resume; else they run all blocks again.
    """
    drawn = torch.Generator().manual_seed(0)
    base, other = paired(len(ids), pairs, drawn)
    starts = torch.randint(0, LENGTH - SPAN + 1, (2, pairs, len(ENTRIES)), generator=drawn).to(ids.device)
    sums = torch.zeros(3, len(ENTRIES), dtype=torch.float64, device=ids.device)
    for chosen in torch.arange(pairs).split(AT_ONCE):
        rows = torch.arange(len(chosen), device=ids.device)[:, None]
        inputs = [{"input_ids": ids[numbers[chosen]]} for numbers in (base, other)]
        runs = [[model.up(model.embed(each)) for each in inputs] for model in models]
        before = models[0].head(runs[0][0][-1]).argmax(-1)
        for entry, sides in enumerate(ENTRIES):
            here, there = (start[chosen, entry, None] + torch.arange(SPAN, device=ids.device) for start in starts)
            logits = []
            for model, layers, (on, off) in zip(models, sides, runs, strict=True):
                writes = {
                    layer: partial(torch.index_put, indices=(rows, here), values=off[layer][rows, there])
                    for layer in layers
                }
                first = layers[0] if resumed else -1
                state = writes[first](on[first]) if resumed else model.embed(inputs[0])
                ran = model.up(state, first + 1, writes=writes)
                logits.append(model.head(ran[-1] if ran else state))
            answers = [each.argmax(-1) for each in logits]
            sums[0, entry] += (answers[0] == answers[1]).sum()
            sums[1, entry] += (answers[0] != before).sum()
            sums[2, entry] += kd(logits[1], logits[0], reduction="none").sum()
    return sums / pairs


def accuracy(given: Given, pairs: int, rows: int, width: int) -> Case:
    """Interchange accuracy as `fit` measures it at its end."""
    models = tuple(bert(layers, width, seed).eval() for seed, layers in enumerate((6, 3)))
    for model in models:
        model.to(given.device, given.dtype)
    ids = tokens(rows, LENGTH, given.device)["input_ids"]
    mapping = {tuple(map(Location, teacher)): Location(*student) for teacher, student in ENTRIES}
    data = {"input_ids": ids.cpu()}
    parts = (Parts(models[0]), Parts(models[1]))

    def ours(**settings: int) -> object:
        return distill.interchange_accuracy(*models, mapping, data, pairs=pairs, **settings)

    sides = {
        LIMIT: lambda: accuracy_by_hand(parts, ids, pairs, True),
        NOW: ours,
        "by hand, no block skipped": lambda: accuracy_by_hand(parts, ids, pairs, False),
    }
    return Case(sides, 1.1, details={"pairs": pairs})


VARIABLES, PLACES, PAIRS = ("ab", "c"), range(4), 1000


def searched(given: Given, width: int) -> Case:
    """The search for two variables in four blocks at eight tokens: one counterfactual for each block and token.

    Both variables have the same counterfactual runs of the network, as what is swapped is the whole vector.
    """
    network = network_of(width, given).eval()
    at = [Location(layer) for layer in PLACES]
    generator = torch.Generator().manual_seed(0)

    def by_hand() -> Tensor:
        base, source = (ADDITION.sample(PAIRS, generator, given.device) for _ in range(2))
        states = [network.embed(encode(each)) for each in (base, source)]
        wanted = {"ab": source["a"] + source["b"] + base["c"], "c": base["a"] + base["b"] + source["c"]}
        found = torch.zeros(len(VARIABLES), len(PLACES), 8, device=given.device)
        for layer in PLACES:
            states = [network.layers[layer](state) for state in states]
            for token in range(8):
                new = states[0].clone()
                new[:, token] = states[1][:, token]
                answers = network.rest(new, layer + 1).argmax(-1)
                for number, name in enumerate(VARIABLES):
                    found[number, layer, token] = (answers == wanted[name]).float().mean()
        return found

    def ours() -> object:
        return distill.search_alignment(ADDITION, network, [("ab",), ("c",)], at, positions=range(8), pairs=PAIRS)

    return Case({LIMIT: by_hand, NOW: ours}, 1.1, details={"cells": len(VARIABLES) * len(PLACES) * 8})


def aligned(given: Given, width: int, steps: int = 20, batch: int = 256) -> Case:
    """Twenty steps of `align` on one variable, without a measurement; by hand, Adam on the directions."""
    network, end = network_of(width, given).eval(), BLOCKS // 2 + 1
    generator = torch.Generator().manual_seed(0)

    def by_hand() -> float:
        rotation = Rotation(width // 4).to(given.device)
        with torch.no_grad():
            rotation.coordinates(torch.zeros(1, width, device=given.device))  # it takes its width from the first vector
        optimizer = torch.optim.Adam(rotation.parameters(), lr=0.2 / width**0.5)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for _ in range(steps):
            base, source = (ADDITION.sample(batch, generator, given.device) for _ in range(2))
            with torch.no_grad():
                here, there = (network.up(network.embed(encode(each)), 0, end) for each in (base, source))
            with torch.enable_grad():
                directions = rotation.directions
                swapped = here + ((there - here) @ directions) @ directions.T
                wanted = source["a"] + source["b"] + base["c"]
                loss = functional.cross_entropy(network.rest(swapped, end), wanted)
            loss.backward()
            optimizer.step()
            decay.step()
            optimizer.zero_grad()
            loss.item()
        return float(loss)

    def ours() -> object:
        place = Location(end - 1, subspace=Rotation(width // 4))
        accelerator = Accelerator(cpu=given.device.type == "cpu")
        settings = dict(steps=steps, batch_size=batch, pairs=0, console=QUIET, accelerator=accelerator)
        return distill.align(ADDITION, network, {"ab": place}, **settings)

    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return Case({LIMIT: by_hand, NOW: ours}, 1.1)


QUIET = Console(quiet=True)
CASES: dict[str, Callable[[Given], Case]] = {
    "interchange_accuracy, 4,000 pairs, 6 → 3 × 32": partial(accuracy, pairs=4_000, rows=1_000, width=32),
    "interchange_accuracy, 500 pairs, 6 → 3 × 192": partial(accuracy, pairs=500, rows=500, width=192),
    "search_alignment, 2 variables × 4 blocks × 8 tokens, 6 × 64": partial(searched, width=64),
    "align, 20 steps, 6 × 64": partial(aligned, width=64),
}
