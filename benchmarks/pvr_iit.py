"""MNIST pointer-value retrieval: a network trained by interchanges (IIT) beside one trained on behaviour alone.

    python benchmarks/pvr_iit.py --data ../shared/data/mnist --seeds 0 1

The network is ordinary: strided convolutions over the whole image, whose 7x7 cells straddle the tiles, a dense layer
that mixes all of them, and an MLP. IIT is told which quarter of the dense layer should hold which digit. The other
network has the same shape, seed and steps, is told nothing, and is measured under the same mapping. All figures but one
are of MNIST's test images. What is in the JSON already is not run again; with --runs, an interrupted network goes on.
"""

import argparse
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import distill
from distill.tasks.causal.pointers import TILES, pointer_values
from distill.tasks.mnist import mnist
from interventions import Location

DENSE = 3  # the block of the dense layer
WIDTH = 32  # of the part of the dense layer that is aligned with one variable
MAPPING = {tile: Location(DENSE, dims=range(i * WIDTH, (i + 1) * WIDTH)) for i, tile in enumerate(TILES)}
ALIGNED = {"IIT": MAPPING, "behaviour only": {}}
QUIET = Console(quiet=True)
MACHINE = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


class Network(nn.Module):
    """Convolutions, a dense layer, and the answer from it."""

    def __init__(self, width: int = WIDTH * len(TILES)) -> None:
        super().__init__()
        # In blocks, so that counterfactual runs resume from base runs instead of looking at the image again.
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU()),
            nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
            nn.Sequential(nn.Flatten(), nn.Linear(64 * 7 * 7, width)),
            nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)),
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.blocks(pixel_values)


def network(seed: int) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network()


def measured(kind: str, schedule: distill.Schedule, *, data: Path | None, pairs: int, runs: Path | None) -> dict:
    seed = schedule.seed
    model, unseen = (pointer_values(*mnist(data, split), part=None) for split in ("train", "test"))
    net, folder = network(seed), None if runs is None else runs / f"{kind.replace(' ', '-')}-{seed}"
    resumed = folder is not None and any(folder.glob("checkpoints/step-*"))
    fitted = distill.fit(model, net, ALIGNED[kind], schedule=schedule, output_dir=folder, resume=resumed, console=QUIET)
    values = unseen.sample(10_000, torch.Generator().manual_seed(seed))
    rows = distill.Rows({**unseen.encode(values), "labels": unseen.answers(values)})
    began = time.perf_counter()
    found = distill.interchange_accuracy(unseen, net, MAPPING, pairs=pairs, seed=seed, controls="all")
    return {
        "network": kind,
        "schedule": asdict(schedule),
        "behaviour on test images": round(distill.accuracy(net, rows).value, 4),
        "behaviour on training images": fitted.accuracy,
        "pairs": pairs,
        "all four": figures(found.overall),
        "variables": {tile: figures(each) for tile, each in zip(TILES, found.per_pair.values(), strict=True)},
        "controls": {name: figures(each) for name, each in found.controls.items()},
        "seconds to train": None if resumed else round(fitted.seconds, 1),
        "seconds to measure": round(time.perf_counter() - began, 1),
    }


def figures(outcome: distill.Outcome) -> dict[str, float]:
    """Interchange accuracy; that of interchanges which change the answer; and what ignoring them all would reach."""
    named = {"iia": outcome.iia.value, "effective": outcome.effective_iia, "do nothing": outcome.do_nothing}
    return {name: round(value, 4) for name, value in named.items()}


def table(runs: list[dict]) -> str:
    lines = [f"{'':22}  behaviour  {'':17}  IIA    effective  do nothing"]
    for run in runs:
        lines.append(f"{run['network']}, seed {run['schedule']['seed']}".ljust(24))
        lines[-1] += f"{run['behaviour on test images']:<11.3f}" + _scores("all four", run["all four"])
        named = {**run["variables"], **{f"control: {name}": each for name, each in run["controls"].items()}}
        lines += [" " * 35 + _scores(name, each) for name, each in named.items()]
    return "\n".join(lines)


def _scores(name: str, of: dict[str, float]) -> str:
    return f"{name:17}  {of['iia']:.3f}  {of['effective']:.3f}      {of['do nothing']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with mnist.npz; without it the Hugging Face hub is asked")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--runs", type=Path, help="keep checkpoints here, and go on from them")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    done = json.loads(asked.out.read_text()) if asked.out.exists() else {"machine": MACHINE, "runs": []}
    for seed in asked.seeds:
        schedule = distill.Schedule(steps=asked.steps, batch_size=256, lr=2e-3, seed=seed)
        for kind in ALIGNED:
            if any(run["network"] == kind and run["schedule"] == asdict(schedule) for run in done["runs"]):
                continue
            done["runs"].append(measured(kind, schedule, data=asked.data, pairs=asked.pairs, runs=asked.runs))
            asked.out.write_text(json.dumps(done, indent=1) + "\n")
            print(f"{kind}, seed {seed}: {done['runs'][-1]['seconds to train']} s to train", flush=True)
    print(table(done["runs"]))


if __name__ == "__main__":
    main()
