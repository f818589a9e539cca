"""What the packages cost beside the same written by hand in plain torch, and beside peers: all of it by one command.

    python benchmarks/speed.py [--only NAME …] [--rounds 20] [--device cuda] [--peers [PYTHON …]]

`limit` is the least that plain torch needs for the same result, written for one model by hand; `now` is ours. Both are
given in a `unit`, where there is one, such as a plain call. All sides of a case run in one process by turns, so that
ratios are of what the machine was doing at that moment; a figure is the median of the rounds, with its quartiles. On a
CPU the clock is the processor time of one thread, as machines are shared.

Peers (nnsight, pyvene, TransformerLens) run in processes of their own, as importing one may change torch, with the
plain and the hand-written side beside them. `--peers` names the interpreters to look for them in; this one by default,
and `--peers` with nothing behind it leaves them out.

With `--device cuda` there are also models of the shapes of 1B and 7B in bf16: matrix utilization, tokens per second,
and waits for the device (`speed_cases/shapes.py`).

A line is appended to `speed.json`. `docs/speed.md` shows the last figures of each case on a CPU (`--page` writes them
there and measures nothing), and is held to them by a test.
"""

import argparse
import json
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from speed_cases import calls, interchange_training, measuring_figures, peers, shapes, sweeps, training
from speed_cases.measuring import LIMIT, NOW, UNIT, Given, measured

HERE = Path(__file__).parent
FILE = HERE / "speed.json"
PAGE = HERE.parent / "docs" / "speed.md"
CASES = {
    **calls.CASES,
    **sweeps.CASES,
    **interchange_training.CASES,
    **training.CASES,
    **measuring_figures.CASES,
}
PEER = "--only-peer"
PROCESSOR_TIME = "processor time of the process"


def chosen(names: list[str], only: list[str]) -> list[str]:
    """Return the names that begin with one of those asked for."""
    return [name for name in names if any(name.startswith(start) for start in only)]


@torch.no_grad()
def measure(cases: dict[str, Any], only: list[str], given: Given) -> dict[str, Any]:
    """Measure the cases that were asked for; one that fails says why, and the others are measured."""
    rows = {}
    for name in chosen(list(cases), only):
        try:
            rows[name] = measured(cases[name](given), given)
        except Exception as error:
            rows[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print(line_of(name, rows[name]), file=sys.stderr, flush=True)
    return rows


def measure_peers(python: str, given: Given, only: list[str], threads: int) -> dict[str, dict[str, Any]]:
    """Return {peer: {case: figures}} of those that an interpreter has, each measured in a process of its own."""
    found = {}
    for peer in peers.MODULES:
        command = [python, str(HERE / "speed.py"), PEER, peer, "--rounds", str(given.rounds), "--only", *only]
        options = ["--device", str(given.device), "--threads", str(threads)]
        ran = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        last = ran.stdout.strip().splitlines()[-1:] or ["{}"]
        rows = json.loads(last[0]) if ran.returncode == 0 else {"error": ran.stderr.strip().splitlines()[-1]}
        if rows:
            found[peer] = rows
    return found


def quotient(row: dict[str, Any], side: str, unit: str) -> list[float] | None:
    return row.get(f"/ {unit}", {}).get(side)


def duration(ms: float) -> str:
    """Write milliseconds with three digits that count."""
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def shown(figures: list[float] | None, spread: bool = False) -> str:
    """Write a median, and its quartiles."""
    if figures is None:
        return ""
    low, middle, high = figures
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]" if spread and low != high else f"{middle:.2f}"


def line_of(name: str, row: dict[str, Any]) -> str:
    """Write a row of the printed table."""
    if "error" in row:
        return f"{name:62} {row['error']}"
    limit, now = (shown(quotient(row, side, UNIT)) for side in (LIMIT, NOW))
    others = [side for side in row["ms"] if side not in (UNIT, LIMIT, NOW)]
    more = "".join(f"  {side} {shown(quotient(row, side, UNIT) or quotient(row, side, LIMIT))}" for side in others)
    return f"{name:62} {limit:>6} {now:>6} {shown(quotient(row, NOW, LIMIT), True):>20}{more}"


def settings_of(asked: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on."""
    command = ["git", "-C", str(HERE), "log", "-1", "--format=%h %s"]
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "date": date.today().isoformat(),
        "commit": subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": chip,
        "clock": "wall, synchronized" if device.type == "cuda" else PROCESSOR_TIME,
        "threads": asked.threads,
        "rounds": asked.rounds,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


def lines() -> list[dict[str, Any]]:
    """The lines of the file."""
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()] if FILE.exists() else []


def latest(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the last figures of each case on a CPU, and the commits that they are of."""
    of_device = [each for each in records if each["clock"] == PROCESSOR_TIME]
    rows, commits, beside = {}, {}, {}
    for record in of_device:
        rows |= record["rows"]
        commits |= {name: record["commit"].split()[0] for name in record["rows"]}
        for peer, figures in record.get("peers", {}).items():
            beside[peer] = beside.get(peer, {}) | figures
    kept = {name: rows[name] for name in CASES if name in rows}
    return of_device[-1] | {
        "rows": kept, "peers": beside, "commits": list(dict.fromkeys(commits[name] for name in kept))
    }  # fmt: skip


def conditions(record: dict[str, Any]) -> str:
    """Return under which conditions the last figures were measured, as a sentence."""
    versions = f"torch {record['torch']}, transformers {record['transformers']}"
    machine = f"{record['device']}, {record['threads']} thread, clock: {record['clock']}"
    return f"Measured on {record['date']} with {versions}, on {machine}; commits {', '.join(record['commits'])}."


def table(record: dict[str, Any]) -> str:
    """Return the figures of a line as a table in Markdown."""
    rows = ["| what | unit | limit | now | now / limit | others |", "| --- | --- | --- | --- | --- | --- |"]
    for name, row in record["rows"].items():
        if "error" in row:
            rows.append(f"| {name} | | | | {row['error']} | |")
            continue
        unit = f"{row['unit']}, {duration(row['ms'][UNIT])}" if "unit" in row else ""
        limit, now = (shown(quotient(row, each, UNIT)) or duration(row["ms"][each]) for each in (LIMIT, NOW))
        bare = {each: figures for each, figures in row["ms"].items() if each not in (UNIT, LIMIT, NOW)}
        others = [f"{each} {shown(quotient(row, each, UNIT) or quotient(row, each, LIMIT))}" for each in bare]
        for peer, theirs in record.get("peers", {}).items():
            if "/ unit" in theirs.get(name, {}):
                others.append(f"{peer} {shown(quotient(theirs[name], peer, UNIT))}")
        over = shown(quotient(row, NOW, LIMIT), True)
        rows.append(f"| {name} | {unit} | {limit} | {now} | {over} | {', '.join(others)} |")
    return "\n".join(rows)


def with_figures(page: str, record: dict[str, Any]) -> str:
    """Return the text of the page with other figures: the line of their conditions, and the table after it."""
    before, rest = page.split("\nMeasured on ", 1)
    return "\n".join([before, conditions(record), "", table(record), "", rest.split("|\n\n", 1)[1]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose names begin so")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", nargs="*", default=[sys.executable], help="interpreters that have them")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which a case begins no further round")
    parser.add_argument(PEER, choices=peers.MODULES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument(
        "--page", action="store_true", help="write the last figures into docs/speed.md; measure nothing"
    )
    asked = parser.parse_args()
    if asked.page:
        PAGE.write_text(with_figures(PAGE.read_text(encoding="utf-8"), latest(lines())), encoding="utf-8")
        return
    torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    given = Given(device, asked.rounds, asked.seconds)
    if asked.only_peer:
        print(json.dumps(measure(peers.cases_of(asked.only_peer), asked.only, given)))
        return
    record = settings_of(asked, device) | {"rows": measure(CASES, asked.only, given)}
    found: dict[str, Any] = {}
    if chosen(list(peers.PLACED), asked.only):
        for python in asked.peers:
            found = measure_peers(python, given, asked.only, asked.threads) | found
    record |= {"peers": found} if found else {}
    if device.type == "cuda" and chosen(list(shapes.SHAPES), asked.only):
        record["shapes"] = shapes.measure(chosen(list(shapes.SHAPES), asked.only), given)
    with asked.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    print(table(record))
    if "shapes" in record:
        print(shapes.table(record["shapes"]))


if __name__ == "__main__":
    main()
