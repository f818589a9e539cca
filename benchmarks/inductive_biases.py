"""Do students take on the inductive biases of their teachers?

    python benchmarks/inductive_biases.py --seeds 0 1 2                                         # 8x8 digits, embedded
    python benchmarks/inductive_biases.py --task mnist --data ../shared/data/mnist --seeds 0 1 2
    python benchmarks/inductive_biases.py --task agreement --seeds 0 1 2
    python benchmarks/inductive_biases.py --paths 20                                            # only the figure

A convolutional network (CNN) and a fully connected one (MLP) learn digits alone, then each teaches new networks of both
kinds; all are tested on the images as they are, shifted and scaled. On agreement, an LSTM and a transformer take their
parts. Teachers are the networks that learned alone, in eval mode; students see their softened answers (temperature 5),
no labels. What is in the JSON already is not run again. Teachers are kept in --teachers, and trained again where they
are missing there. With --paths, the first seed's networks are trained once more, and the paths of their last blocks on
the test rows are drawn into the .png beside the JSON, with so many checkpoints each.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from tempfile import gettempdir

import torch
from rich.console import Console
from safetensors.torch import load_model, save_model
from torch import nn

import distill
from distill.evaluation.metrics import calibration
from distill.evaluation.training_path import TrainingPath, snapshots, training_path
from distill.networks import CNN, MLP, LSTMClassifier, TransformerClassifier
from distill.tasks import agreement, load
from interventions import Location

TEMPERATURE = 5.0
MILLION = 1_000_000  # bins of the calibration errors that the paper publishes: nearly one for each example
QUIET = Console(quiet=True)
MACHINE = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
WORDS, CLASSES = len(agreement.VOCABULARY), len(agreement.CLASSES)
NETWORKS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "digits": {"CNN": CNN, "MLP": lambda: MLP(64)},
    "mnist": {"CNN": CNN, "MLP": MLP},
    "agreement": {
        "LSTM": lambda: LSTMClassifier(WORDS, CLASSES),
        "transformer": lambda: TransformerClassifier(WORDS, CLASSES),
    },
}


def network(task: str, kind: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[task][kind]()


def scores(model: nn.Module, task: distill.Task) -> dict[str, dict[str, float]]:
    tests = {"test": task.test, **task.tests}
    found = {name: (calibration(model, rows), calibration(model, rows, bins=MILLION)) for name, rows in tests.items()}
    return {
        name: {
            "accuracy": round(each.accuracy.value, 4),
            "ece": round(each.error, 4),
            "ece of 1,000,000 bins": round(fine.error, 4),
            "sure": round(each.confidence, 4),
        }
        for name, (each, fine) in found.items()
    }


def measured(task: distill.Task, teacher: tuple[str, nn.Module] | None, kind: str, schedule: distill.Schedule):
    """A network that learned alone, or from a teacher, and what to write down about it."""
    # Students do not start where a teacher of their kind and seed did.
    student = network(task.name, kind, schedule.seed + (1000 if teacher else 0))
    objective = distill.KD(TEMPERATURE) if teacher else distill.Labels()
    began = time.perf_counter()
    # Not fit, which would also measure interchanges, and those between unlike networks mean nothing without a mapping.
    for _ in distill.steps(teacher and teacher[1], student, data=task, objective=objective, schedule=schedule):
        pass
    seconds = time.perf_counter() - began
    run = f"{teacher[0]} → {kind}" if teacher else kind
    about = {"task": task.name, "run": run, "schedule": asdict(schedule), "seconds": round(seconds, 1)}
    return student, about | {"scores": scores(student, task)}


def runs_of(task: distill.Task, schedule: distill.Schedule, folder: Path, done: list[dict]):
    """The runs that are not done yet, one after the other."""
    kinds = list(NETWORKS[task.name])
    known = [run["run"] for run in done if run["task"] == task.name and run["schedule"] == as_json(schedule)]
    teachers = {}
    for kind in kinds:
        if all(name in known for name in (kind, *(f"{kind} → {other}" for other in kinds))):
            continue
        facts = "-".join(str(value) for value in asdict(schedule).values())
        path = folder / f"{task.name}-{len(task.train)}-{kind}-{facts}.safetensors"
        teachers[kind] = network(task.name, kind, schedule.seed)
        if path.exists():
            load_model(teachers[kind], path)
        else:
            teachers[kind], about = measured(task, None, kind, schedule)
            folder.mkdir(parents=True, exist_ok=True)
            save_model(teachers[kind], str(path))
            if kind not in known:
                yield about
        teachers[kind].eval()
    for kind, teacher in teachers.items():
        for other in kinds:
            if f"{kind} → {other}" not in known:
                yield measured(task, (kind, teacher), other, schedule)[1]


def paths(task: distill.Task, schedule: distill.Schedule, checkpoints: int) -> TrainingPath:
    """How the last blocks of networks move that learn alone, and from a teacher of the first kind."""
    kinds = list(NETWORKS[task.name])
    watched = {"data": task.test, "at": Location(-1), "every": max(1, (schedule.steps or 0) // checkpoints)}
    if task.name == "agreement":
        watched["positions"] = -1
    found, teacher = {}, None
    for name, teaches, kind in [
        *((kind, False, kind) for kind in kinds),
        *((f"→ {kind}", True, kind) for kind in kinds),
    ]:
        student = network(task.name, kind, schedule.seed + (1000 if teaches else 0))
        objective = distill.KD(TEMPERATURE) if teaches else distill.Labels()
        records = distill.steps(
            teacher if teaches else None, student, data=task, objective=objective, schedule=schedule
        )
        found[f"{kinds[0]} {name}" if teaches else name] = snapshots(records, student, **watched)
        teacher = teacher or student.eval()
    return training_path(found)


def as_json(schedule: distill.Schedule) -> dict:
    return json.loads(json.dumps(asdict(schedule)))


def table(runs: list[dict]) -> str:
    """Accuracy and calibration error, means over the seeds of runs that differ in nothing else."""
    lines = []
    for kind in dict.fromkeys(_kind(run) for run in runs):
        mine = [run for run in runs if _kind(run) == kind]
        tests = list(mine[0]["scores"])
        task, steps, batch_size, lr = kind
        lines.append(f"{task}, {steps} × {batch_size}, lr {lr:g}".ljust(34) + "".join(f"{test:>22}" for test in tests))
        for name in dict.fromkeys(run["run"] for run in mine):
            of = [run["scores"] for run in mine if run["run"] == name]
            cells = (
                f"{mean(each[test]['accuracy'] for each in of):.3f}, ECE {mean(each[test]['ece'] for each in of):.3f}"
                for test in tests
            )
            lines.append(f"  {name} ({len(of)})".ljust(34) + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def _kind(run: dict) -> tuple[str, int, int, float]:
    return run["task"], *(run["schedule"][name] for name in ("steps", "batch_size", "lr"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(NETWORKS), default="digits")
    parser.add_argument("--data", type=Path, help="for mnist, a folder with mnist.npz; without it the hub is asked")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--paths", type=int, help="draw the paths of training instead, with so many checkpoints")
    parser.add_argument("--teachers", type=Path, default=Path(gettempdir()) / "inductive-biases")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    task = load(asked.task, data=asked.data)
    done = json.loads(asked.out.read_text()) if asked.out.exists() else {"machine": MACHINE, "runs": []}
    schedules = [
        distill.Schedule(
            steps=asked.steps, batch_size=asked.batch_size, lr=asked.lr, seed=seed,
            optimizer="adam", decay="constant", warmup=0.0, weight_decay=0.0, clip=None,
        )
        for seed in asked.seeds
    ]  # fmt: skip
    if asked.paths:
        path = paths(task, schedules[0], asked.paths)
        path.plot().savefig(asked.out.with_suffix(".png"))
        return print(path)
    for seed, schedule in zip(asked.seeds, schedules, strict=True):
        for about in runs_of(task, schedule, asked.teachers, done["runs"]):
            done["runs"].append(about)
            asked.out.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n")
            print(f"{about['run']}, seed {seed}: {about['seconds']} s, {about['scores']}", flush=True)
    print(table(done["runs"]))


if __name__ == "__main__":
    main()
