"""Which block of a student computes what which block of its teacher does: `search_mapping` on pointer-value retrieval.

    python benchmarks/search_mapping.py --seeds 0 1 2

The teacher is that of the task, a vision transformer of 6 blocks; students start as its blocks 0, 2 and 5 and are
trained as in tutorial 2: by KD, and by KD with interchange under the mapping "full". Every block output of the teacher
is interchanged, every one of the student is, one token in the same place of base and source, on 2000 held-out pairs.
Figures are means over the seeds, which decide the order of rows, the draws of training and the pairs. The picture is
that of the first seed's KD student, as `plot` draws it.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging

import distill
from distill import DIITO, KD, Schedule

QUIET = Console(quiet=True)
FIGURES = ("iia", "effective", "normalized", "effect_rate", "do_nothing")
STUDENTS = {"untrained": [], "KD": [KD()], "KD + interchange": [KD(), DIITO()]}


def grids(cells: Any) -> dict[str, Any]:
    found = {name: cells.grid(name).tolist() for name in FIGURES}
    return {name: [[round(x, 4) if x == x else None for x in row] for row in grid] for name, grid in found.items()}


def measured(teacher: Any, task: Any, name: str, seed: int, pairs: int) -> tuple[dict[str, Any], Any]:
    """One student, trained and searched."""
    student = distill.from_layers(teacher, 3)
    if STUDENTS[name]:
        schedule = Schedule(steps=400, batch_size=128, lr=2e-3, warmup=0.1, seed=seed)
        distill.fit(teacher, student, "full", task.train, objective=STUDENTS[name], schedule=schedule, console=QUIET)
    began, cpu = time.perf_counter(), time.process_time()
    found = distill.search_mapping(teacher, student, task, pairs=pairs, seed=seed, controls=())
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    controls = {}
    if name == "KD":
        found = distill.search_mapping(teacher, student, task, pairs=pairs, seed=seed)
        controls = {each: grids(kinds["block_output"]) for each, kinds in found.controls.items()}
    return {
        "student": name,
        "seed": seed,
        "accuracy": distill.accuracy(student, task.test).value,
        "mapping": found.to_dict()["mapping"],
        "seconds": round(seconds, 2),
        "cpu seconds": round(cpu, 2),
        **grids(found.kinds["block_output"]),
        "controls": controls,
    }, found


def mean_of(runs: list[Mapping[str, Any]], figure: str) -> list[list[float | None]]:
    """The mean over seeds of every cell."""
    rows, columns = len(runs[0][figure]), len(runs[0][figure][0])
    every = [[[run[figure][row][column] for run in runs] for column in range(columns)] for row in range(rows)]
    return [[None if None in cell else statistics.fmean(cell) for cell in row] for row in every]


def table(result: Mapping[str, Any]) -> str:
    """IIA and, in brackets, effective IIA of every cell: means over seeds."""
    lines = []
    for name in STUDENTS:
        runs = [run for run in result["runs"] if run["student"] == name]
        shown = {name: runs}
        if runs[0]["controls"]:
            shown |= {f"control: {each}": [run["controls"][each] for run in runs] for each in runs[0]["controls"]}
        for title, grids_of in shown.items():
            iia, effective = mean_of(grids_of, "iia"), mean_of(grids_of, "effective")
            lines.append(f"{title:26} " + " ".join(f"{'teacher ' + str(i):>14}" for i in range(len(iia[0]))))
            for row, (values, others) in enumerate(zip(iia, effective, strict=True)):
                cells = [
                    "left out" if a is None else f"{a:.3f} ({'–' if b is None else f'{b:.2f}'})"
                    for a, b in zip(values, others, strict=True)
                ]
                lines.append(f"  student {row:<16} " + " ".join(f"{cell:>14}" for cell in cells))
        accuracy = statistics.fmean(run["accuracy"] for run in runs)
        found = ", ".join(sorted({run["mapping"] for run in runs}))
        lines += [f"  accuracy {accuracy:.3f}; mappings found: {found}", ""]
    seconds = [run["seconds"] for run in result["runs"]]
    lines.append(f"a search took {min(seconds):.1f} to {max(seconds):.1f} s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--table", action="store_true", help="print the table of the file, and run nothing")
    given = parser.parse_args()
    logging.disable_progress_bar()
    if not given.table:
        task = distill.tasks.load("pvr")
        teacher = distill.teacher_of(task, console=QUIET)
        runs, picture = [], None
        for seed in given.seeds:
            for name in STUDENTS:
                figures, found = measured(teacher, task, name, seed, given.pairs)
                runs.append(figures)
                if picture is None and name == "KD":
                    picture = found.plot()
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        result = {
            "commit": commit,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}",
            "settings": {"pairs": given.pairs, "seeds": given.seeds, "steps": 400, "batch_size": 128, "lr": 2e-3},
            "teacher": {"accuracy": distill.accuracy(teacher, task.test).value},
            "runs": runs,
        }
        given.json.write_text(json.dumps(result, indent=1) + "\n")
        assert picture is not None
        picture.savefig(given.json.with_suffix(".png"), dpi=110)
    print(table(json.loads(given.json.read_text())))


if __name__ == "__main__":
    main()
