"""Hierarchical equality as in pyvene's introduction: a network learns it, DAS finds where, and what a step costs.

    python benchmarks/equality_das.py --seeds 3

The network is four linear layers of width 16 on random vectors; the figures are of 12,800 held-out pairs. The cost of
one step is compared with the same step in plain torch (source up to the place, base with the swapped directions, loss,
gradient, Adam), in one process, rounds interleaved, medians.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import distill
from distill.tasks.causal.equality import hierarchical_equality
from interventions import Location, Rotation, interchange, run_to

MODEL = hierarchical_equality(entities=None)
QUIET = Console(quiet=True)
PLACE = "2"  # the second linear layer's output


def network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = [
            nn.Linear(16, 16),
            nn.ReLU(),
            nn.Linear(16, 16),
            nn.ReLU(),
            nn.Linear(16, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        ]
        return nn.Sequential(*sizes)


def aligned(seed: int) -> dict:
    net, began = network(seed), time.perf_counter()
    fitted = distill.fit(MODEL, net, {}, steps=6000, batch_size=1024, lr=5e-3, seed=seed, console=QUIET)
    trained = time.perf_counter()
    mapping = {
        name: Location(module=PLACE, subspace=Rotation(8, seed=10 * seed + i))
        for i, name in enumerate(("left", "right"))
    }
    found = distill.align(
        MODEL, net, mapping, steps=1000, batch_size=1024, seed=seed, pairs=12_800, controls="all", console=QUIET
    )
    done = time.perf_counter()
    return {
        "seed": seed,
        "task accuracy": fitted.accuracy,
        "iia": found.iia,
        "per variable": [outcome.iia.value for outcome in found.accuracy.per_pair.values()],
        "controls": {name: outcome.iia.value for name, outcome in found.accuracy.controls.items()},
        "seconds to train": round(trained - began, 1),
        "seconds to align and measure": round(done - trained, 1),
    }


def step_cost(batch: int, rounds: int) -> dict:
    """Median seconds of one DAS step of one variable, ours and in plain torch, on the same batches."""
    net = network(0).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    base, source = (MODEL.run(MODEL.sample(batch, generator)) for _ in range(2))
    inputs, source_inputs = MODEL.encode(base), MODEL.encode(source)
    wanted = MODEL.answers(MODEL.interchange(base, {"left": source}))
    place = Location(module=PLACE, subspace=Rotation(8, 16))
    plain = Rotation(8, 16)
    ours, theirs = (torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (place.subspace, plain))

    def with_us() -> Tensor:
        with torch.no_grad():
            taken = run_to(net, source_inputs, [place])
        logits = interchange(net, inputs, taken, place).logits
        return finish(logits, ours)

    def by_hand() -> Tensor:
        with torch.no_grad():
            there = net[:3](source_inputs)
        state, directions = net[:3](inputs), plain.directions
        state = state + (there @ directions - state @ directions) @ directions.T
        return finish(net[3:](state), theirs)

    def finish(logits: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        loss = nn.functional.cross_entropy(logits, wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for number in range(rounds + 5):
        losses = []
        for name, step in (("ours", with_us), ("plain", by_hand)):
            began = time.perf_counter()
            losses.append(step())
            if number >= 5:
                seconds[name].append(time.perf_counter() - began)
        assert torch.allclose(*losses, rtol=1e-4), f"the steps compute different losses: {losses}"
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "batch": batch,
        "ours [ms]": round(1000 * medians["ours"], 3),
        "plain [ms]": round(1000 * medians["plain"], 3),
        "ours / plain": round(medians["ours"] / medians["plain"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    result = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "runs": [],
        "step": [],
    }
    for batch in (1024, 6400):
        result["step"].append(step_cost(batch, asked.rounds))
        print(result["step"][-1], flush=True)
    for seed in range(asked.seeds):
        result["runs"].append(aligned(seed))
        print(result["runs"][-1], flush=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
