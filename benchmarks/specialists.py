"""Do specialists for the classes that a generalist confuses answer better than it does?

    python benchmarks/specialists.py --seeds 0 1 2                              # MNIST, ../shared/data/mnist
    python benchmarks/specialists.py --seeds 0 1 2 --n 4 --size 3

A small generalist learns a few MNIST digits; `Specialists.train` makes specialists from it and these rows. Beside it,
the generalist trained on for as many steps as all specialists together, on the rows as they are: what more training of
the same kind gives. Measured on the 10,000 test digits: accuracy, and as in Hinton, Vinyals, Dean 2015
(arXiv:1503.02531), section 5.5, conditional accuracy, among the classes of a specialist on the rows of these classes
alone. What is in the JSON already is not run again.
"""

import argparse
import copy
import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch
from rich.console import Console
from torch import nn

import distill
from distill.networks import MLP
from distill.specialists.training import predictions
from distill.tasks import Rows, load

QUIET = Console(quiet=True)
MACHINE = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
FIRST = distill.Schedule(steps=300, batch_size=64, lr=1e-3)


def generalist_of(rows: Rows, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MLP()
    return trained(network, rows, replace(FIRST, seed=seed))


def trained(network: nn.Module, rows: Rows, schedule: distill.Schedule) -> nn.Module:
    distill.fit(None, network, data=rows, objective=distill.Labels(), schedule=schedule, console=QUIET)
    return network.eval()


def accuracy(answers: torch.Tensor, labels: torch.Tensor) -> float:
    return float((answers.argmax(-1) == labels).float().mean())


def conditional(answers: torch.Tensor, labels: torch.Tensor, sets: tuple[tuple[int, ...], ...]) -> float:
    """The mean over the sets of classes of the accuracy on their rows, among their classes."""
    found = []
    for classes in sets:
        mine = torch.isin(labels, torch.tensor(classes))
        chosen = torch.tensor(classes)[answers[mine][:, list(classes)].argmax(-1)]
        found.append(float((chosen == labels[mine]).float().mean()))
    return mean(found)


def measured(task: distill.Task, rows: int, n: int, size: int | None, seed: int) -> dict:
    draw = torch.Generator().manual_seed(seed)
    few = task.train.take(torch.randperm(len(task.train), generator=draw)[:rows])
    labels = task.test.table["labels"]
    generalist = generalist_of(few, seed)
    schedule = distill.Schedule(steps=150, batch_size=64, lr=3e-4)
    began = time.perf_counter()
    teacher = distill.Specialists.train(generalist, few, n, size=size, schedule=schedule, seed=seed, console=QUIET)
    seconds = time.perf_counter() - began
    longer = trained(copy.deepcopy(generalist), few, replace(schedule, steps=150 * n, seed=seed))
    sets, answers = teacher.classes, {}
    for name, network in {"generalist": generalist, "trained on": longer, "with specialists": teacher}.items():
        answers[name] = predictions(network, task.test)
    scores = {
        name: {
            "accuracy": round(accuracy(each, labels), 4),
            "conditional": round(conditional(each, labels, sets), 4),
        }
        for name, each in answers.items()
    }
    return {
        "rows": rows, "n": n, "size": size, "seed": seed, "classes": [list(each) for each in sets],
        "seconds": round(seconds, 1), "scores": scores,
    }  # fmt: skip


def table(runs: list[dict]) -> str:
    """Means and standard deviations over the seeds."""
    lines = []
    for rows, n, size in dict.fromkeys((run["rows"], run["n"], run["size"]) for run in runs):
        mine = [run for run in runs if (run["rows"], run["n"], run["size"]) == (rows, n, size)]
        lines.append(f"{rows} rows, {n} of {size or 'any'} classes, {len(mine)} seeds".ljust(38) + "accuracy".rjust(16)
                     + "conditional".rjust(16))  # fmt: skip
        for name in mine[0]["scores"]:
            cells = []
            for what in ("accuracy", "conditional"):
                found = [run["scores"][name][what] for run in mine]
                spread = f" ± {stdev(found):.3f}" if len(found) > 1 else ""
                cells.append(f"{mean(found):.3f}{spread}".rjust(16))
            lines.append(f"  {name}".ljust(38) + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--n", type=int, default=3)
    parser.add_argument("--size", type=int, help="classes of each specialist; without it clusters as they are")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    task = load("mnist", data=asked.data)
    done = json.loads(asked.out.read_text()) if asked.out.exists() else {"machine": MACHINE, "runs": []}
    for seed in asked.seeds:
        key = (asked.rows, asked.n, asked.size, seed)
        if any((run["rows"], run["n"], run["size"], run["seed"]) == key for run in done["runs"]):
            continue
        about = measured(task, asked.rows, asked.n, asked.size, seed)
        done["runs"].append(about)
        asked.out.write_text(json.dumps(done, indent=1) + "\n")
        print(f"seed {seed}: {about['seconds']} s, classes {about['classes']}, {about['scores']}", flush=True)
    print(table(done["runs"]))


if __name__ == "__main__":
    main()
