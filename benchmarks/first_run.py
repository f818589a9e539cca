"""The first run of the README: `distill fit` from nothing, with its table, its sentence and its time.

    python benchmarks/first_run.py [--seeds 0 1 2]

The command runs in a process of its own, with a folder for the teacher that is empty, so that the time is that of a
first use. What it prints is printed; one JSON line is appended to `first_run.json`, with the commit, the seconds, and
the figures of every model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
COMMAND_LINE = "from distill.cli.main import main; main()"


def run(seeds: list[int]) -> dict[str, Any]:
    """Run the command in a temporary folder, and return its seconds and what its `result.json` says."""
    with tempfile.TemporaryDirectory() as folder:
        options = [] if not seeds else ["--seeds", *map(str, seeds)]
        start = time.monotonic()
        subprocess.run(
            [sys.executable, "-c", COMMAND_LINE, "fit", "--output", f"{folder}/run", *options],
            env={**os.environ, "DISTILL_CACHE": f"{folder}/teachers"},
            check=True,
        )
        seconds = time.monotonic() - start
        return {"seconds": round(seconds, 1), **json.loads(Path(folder, "run", "result.json").read_text("utf-8"))}


def figures(model: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a model, without its settings and its single entries."""
    interchange = model["interchange"]
    overall = {} if interchange is None else interchange["overall"]
    return {
        **{name: model[name] for name in ("name", "layers", "parameters", "seconds", "accuracy")},
        **{name: overall.get(name) for name in ("iia", "effective", "normalized", "effect_rate", "do_nothing", "kl")},
    }


def main() -> None:
    """Run it, and append a line to the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    arguments = parser.parse_args()
    found = run(arguments.seeds)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    line = {
        "date": str(date.today()), "commit": commit.strip(), "torch": version("torch"), "cpus": os.cpu_count(),
        "seeds": arguments.seeds, "seconds": found["seconds"], "sentences": found["sentences"],
        "models": [figures(each) for each in found["models"]],
        "effective": [
            {name: each[name] for name in ("kind", "student", "value", "difference", "trained")}
            for each in found["comparison"]["figures"]
            if each["figure"] == "effective" and each["entry"] == "overall"
        ],
    }  # fmt: skip
    with FILE.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"{found['seconds']} s")


if __name__ == "__main__":
    main()
