"""What it costs to start: processor time of importing the packages and of the help of the command lines.

    python benchmarks/startup.py [--rounds 7] [--repository ..] [--again]

Each case is a fresh process, and its seconds are those that processors worked for it (user and system together), since
machines are shared. The cases run in turn in each round; the figure is the median of the rounds, and beside it stand
the fastest and the slowest. A first round, in which Python writes its bytecode, is not counted. `nothing` is Python
itself, `torch` is what any use of a model pays. One JSON line is appended to `startup.json`; what is there with the
same settings and of the same commit is not measured again.

- `import interventions`, `import distill`: the packages alone, whose public names are imported when they are used.
- `distill.fit`: the package, and what a first training imports.
- `distill --help`, `distill --version`, `python -m interventions --help`: what prints a text. Lines of
  commits before 4b0dc55, which had no `--version`, have the figure of the refused option there.
- `distill objectives`: a command that does need the packages.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
COMMAND_LINE = "from distill.cli.main import main; main()"
CASES: dict[str, list[str]] = {
    "nothing": ["-c", "pass"],
    "torch": ["-c", "import torch"],
    "import interventions": ["-c", "import interventions"],
    "import distill": ["-c", "import distill"],
    "distill.fit": ["-c", "import distill; distill.fit"],
    "distill --help": ["-c", COMMAND_LINE, "--help"],
    "distill --version": ["-c", COMMAND_LINE, "--version"],
    "distill objectives": ["-c", COMMAND_LINE, "objectives"],
    "python -m interventions --help": ["-m", "interventions", "--help"],
}


def seconds_of(arguments: list[str], repository: Path) -> float:
    """Run Python with these arguments on the packages of a repository, and return its processor time."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments],
        cwd=repository,
        env={**environment, "PYTHONPATH": str(repository.absolute()), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,  # a refused option is one of the cases
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(repository: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Return the median, the fastest and the slowest seconds of each case."""
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for number in range(rounds + 1):
        for name, arguments in CASES.items():
            taken = seconds_of(arguments, repository)
            if number:
                seconds[name].append(taken)
    return {
        name: {
            "median": round(statistics.median(each), 3),
            "fastest": round(min(each), 3),
            "slowest": round(max(each), 3),
        }
        for name, each in seconds.items()
    }


def settings_of(repository: Path, rounds: int) -> dict[str, Any]:
    """Return what the figures depend on."""
    command = ["git", "-C", str(repository), "log", "-1", "--format=%h %s"]
    return {
        "commit": subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip(),
        "rounds": rounds,
        "device": platform.processor() or platform.machine(),
        "clock": "processor time of the process, user and system [s]",
        "threads": 1,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "typer")},
    }


def is_known(settings: dict[str, Any]) -> bool:
    """Return whether it was measured before."""
    lines = FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []
    return any(settings.items() <= json.loads(line).items() for line in lines)


def main() -> None:
    """Measure the cases and append the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repository", type=Path, default=Path(__file__).parents[1], help="whose packages")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    given = parser.parse_args()
    settings = settings_of(given.repository, given.rounds)
    if is_known(settings) and not given.again:
        return
    record = {"date": date.today().isoformat(), **settings, "cases": measure(given.repository, given.rounds)}
    with FILE.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    print(json.dumps(record, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
