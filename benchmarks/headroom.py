"""What a causal term could add after plain KD: losses and gradients with and without interchange, on two tasks.

    python benchmarks/headroom.py [--tasks pvr agreement] [--steps 250] [--batches 16]

The student has half of the layers of the teacher and is trained by KD alone, T = 2, with
the batches of its task; then every entry of "full" is measured, for several kinds of interchange. On `pvr` that is the
pilot's setting. A second look at the same student with batches of another size shows how much of the base gradient is
the noise of its batch. The figures are written to `headroom.json`, one task a key, with the commit; the picture of the
first task to `headroom.png`.
"""

import argparse
import json
import platform
import subprocess
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

import distill
from distill.interchange.kinds import Kind
from distill.interchange.mapping import depth

KINDS = {
    "one token, same place": Kind(distill.Scattered(1)),
    "the answering token": Kind(distill.Answer()),
    "heads, same places": Kind(distill.Span(0.3, same=True), site="attention_heads"),
}
SIZES = (32, 2048)
"""The other sizes of batches."""


def measured(name: str, steps: int, batches: int, seed: int) -> tuple[dict, distill.Headroom]:
    """Return the figures of one task as plain data, and those of the kinds themselves."""
    task = distill.tasks.load(name)
    teacher = distill.teacher_of(task)
    student = distill.from_layers(teacher, depth(teacher) // 2)
    schedule = replace(distill.Schedule.of(task.student or task.recipe, seed), steps=steps)
    objective = [distill.KD(2.0), distill.DIITO(match=distill.KD(2.0))]
    began = time.perf_counter()
    found = distill.headroom(
        teacher, student, task, objective=objective, kinds=KINDS, steps=steps, batches=batches, schedule=schedule,
        seed=seed,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    print(f"{name}\n{found}\n")
    trained = deepcopy(student)
    for _ in distill.steps(teacher, trained, None, task, objective=distill.KD(2.0), schedule=schedule):
        pass
    sizes = {}
    for size in SIZES:
        other = distill.headroom(
            teacher, trained, task, objective=objective, steps=0, batches=min(batches, len(task.train) // size),
            batch_size=size, schedule=schedule, seed=seed,
        )  # fmt: skip
        print(f"{name}, batches of {size}\n{other}\n")
        sizes[size] = other.to_dict()
    return {"kinds": found.to_dict(), "seconds": round(seconds, 1), "sizes of batches": sizes}, found


def main() -> None:
    """Measure, print and write."""
    options = argparse.ArgumentParser()
    options.add_argument("--tasks", nargs="+", default=["pvr", "agreement"])
    options.add_argument("--steps", type=int, default=250)
    options.add_argument("--batches", type=int, default=16)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    path = Path(__file__).with_suffix(".json")
    written = json.loads(path.read_text()) if path.exists() else {}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    for number, name in enumerate(given.tasks):
        figures, found = measured(name, given.steps, given.batches, given.seed)
        machine = f"{platform.machine()} cpu, {torch.get_num_threads()} threads, torch {torch.__version__}"
        written[name] = {"commit": commit, "machine": machine, "settings": vars(given), **figures}
        path.write_text(json.dumps(written, indent=1) + "\n")
        if not number:
            found.plot().savefig(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
