"""What docs/measuring.md says of two students of one teacher, and its picture.

    python benchmarks/measuring.py [--seeds 0 1 2] [--plot]

The teacher is that of `pvr`; each student has three of its six blocks and is trained by KD, or by KD and DIITO, as in
tutorial 2. All are measured on the same 2,000 pairs, under the kind of interchange that DIITO trains (`as mapped`) and
the usual others. Beside the figures of each student stand

- `by base`: the interval of a bootstrap over bases, which knows nothing of the images that rows share;
- `difference`: KD + DIITO less KD on the same pairs, with its interval, and the share of pairs on which one of the two
  is right and the other wrong;
- `effective only`: the student by KD of the first seed, measured on effective pairs alone.

One JSON line is appended to `measuring.json`; `measuring.png` is drawn and the tables are printed from the last one,
which is all that `--plot` does.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from rich.console import Console
from torch import nn

import distill
from distill import DIITO, KD, Schedule, Task
from distill.evaluation.interchange_accuracy import kind_of, measurement_of, placed_kinds
from distill.evaluation.kind_measurement import MeasuredKind
from distill.evaluation.outcome import Outcome
from distill.interchange.positions import Span
from distill.statistics.figures import figure_of
from distill.statistics.intervals import Estimate, Share, bootstrap
from interventions import Picture

FILE = Path(__file__).with_suffix(".json")
QUIET = Console(quiet=True)
OBJECTIVES = {"KD": lambda: KD(), "KD + DIITO": lambda: [KD(), DIITO()]}
SCHEDULE = {"steps": 400, "batch_size": 128, "lr": 2e-3, "warmup": 0.1}
PAIRS, MAPPING = 2000, "full"
COMPARED = ("iia", "effective", "normalized", "correlation", "kl")


def interval(found: Share | Estimate | None) -> list[float] | None:
    return None if found is None else [round(each, 4) for each in (found.value, found.low, found.high)]


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def measured(teacher: nn.Module, student: nn.Module, task: Task) -> list[MeasuredKind]:
    measurement = measurement_of(teacher, student, MAPPING, task, pairs=PAIRS, seed=0, batch_size=128)
    placed, _ = placed_kinds(measurement, kind_of(None, Span(0.3)), "usual")
    return measurement.measure(placed)


def figures(each: MeasuredKind) -> dict[str, Any]:
    outcome: Outcome = each.accuracy({"pairs": PAIRS, "seed": 0}).overall
    sums, sharing = each.tally, each.measurement.examples.sharing
    by_base = {
        name: interval(bootstrap(sums[above].sum(1), sums[below].sum(1), sharing.base, 0))
        for name, above, below in (("iia", "agree", "total"), ("effective", "agree_on_effect", "effect"))
    }
    with_interval = ("iia", "effective", "normalized", "agreement")
    plain = ("effect_rate", "do_nothing", "replace_all", "kl", "correlation", "base_kl", "count", "left_out")
    return {
        **{name: interval(getattr(outcome, name)) for name in with_interval},
        **{name: rounded(getattr(outcome, name)) for name in plain},
        "by base": by_base,
    }


def difference(first: MeasuredKind, second: MeasuredKind) -> dict[str, Any]:
    """What the second student adds to the figures of the first, on the same pairs."""
    found = {}
    for name in COMPARED:
        one, other = (figure_of(name, each.tally) for each in (first, second))
        if one is not None and other is not None:
            found[name] = interval((other - one).estimate(first.measurement.examples.sharing))
    agree = [each.tally["agree"] for each in (first, second)]
    return {**found, "discordant": rounded(float((agree[0] != agree[1]).sum() / first.tally["total"].sum()))}


def of_seed(teacher: nn.Module, task: Task, seed: int) -> dict[str, Any]:
    record: dict[str, Any] = {"seed": seed, "students": {}}
    found: dict[str, list[MeasuredKind]] = {}
    for name, objective in OBJECTIVES.items():
        began = time.process_time()
        fitted = distill.fit(
            teacher, distill.from_layers(teacher, 3), MAPPING, task, objective=objective(),
            schedule=Schedule(**SCHEDULE, seed=seed), console=QUIET,
        )  # fmt: skip
        seconds = round(time.process_time() - began, 1)
        found[name] = measured(teacher, fitted.student, task)
        kinds = {each.placed.name: figures(each) for each in found[name]}
        accuracy = interval(distill.accuracy(fitted.student, task.test))
        record["students"][name] = {"accuracy": accuracy, "seconds": seconds, "kinds": kinds}
        if name == "KD" and seed == 0:
            record["effective only"] = effective_only(teacher, fitted.student, task)
    pairs = zip(*found.values(), strict=True)
    record["difference"] = {first.placed.name: difference(first, second) for first, second in pairs}
    return record


def effective_only(teacher: nn.Module, student: nn.Module, task: Task) -> dict[str, Any]:
    found = distill.interchange_accuracy(teacher, student, MAPPING, task, pairs=PAIRS, effective_only=True)
    return {
        name: {"effective": interval(each.effective), "count": each.count, "tried": each.tried}
        for name, each in {**found.per_pair, "overall": found.overall}.items()
    }


def settings_of(seeds: Sequence[int]) -> dict[str, Any]:
    command = ["git", "-C", str(FILE.parent), "log", "-1", "--format=%h %s"]
    return {
        "commit": subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip(),
        "seeds": list(seeds),
        "schedule": SCHEDULE,
        "pairs": PAIRS,
        "mapping": MAPPING,
        "device": platform.processor() or platform.machine(),
        "clock": "processor time of the process [s]",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


def measure(seeds: Sequence[int]) -> dict[str, Any]:
    task = distill.tasks.load("pvr")
    teacher = distill.teacher_of(task, console=QUIET)
    untrained = measured(teacher, distill.from_layers(teacher, 3), task)
    return {
        "date": date.today().isoformat(),
        "settings": settings_of(seeds),
        "teacher": interval(distill.accuracy(teacher, task.test)),
        "untrained": {each.placed.name: figures(each) for each in untrained},
        "runs": [of_seed(teacher, task, seed) for seed in seeds],
    }


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def written(found: list[float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*found)


def table(heading: str, rows: Iterable[Sequence[str]]) -> str:
    columns = heading.count("|") + 1
    return "\n".join([f"| {heading} |", f"|{' --- |' * columns}", *(f"| {' | '.join(row)} |" for row in rows)])


def table_of_kinds(record: dict[str, Any]) -> str:
    """Effective IIA of both students under each kind, means over the seeds, and the differences seed by seed."""
    rows = []
    for kind in record["untrained"]:
        cells = {name: [run["students"][name]["kinds"][kind] for run in record["runs"]] for name in OBJECTIVES}
        means = [fmean(each["effective"][0] for each in cells[name]) for name in OBJECTIVES]
        gains = [run["difference"][kind]["effective"][0] for run in record["runs"]]
        rate, nothing = cells["KD"][0]["effect_rate"], fmean(each["do_nothing"] for each in cells["KD"])
        name = f"{kind} (trained)" if kind == "as mapped" else kind
        untrained = record["untrained"][kind]["effective"][0]
        figures = (f"{each:.3f}" for each in (rate, nothing, untrained, *means))
        rows.append((name, *figures, ", ".join(f"{gain:+.3f}" for gain in gains)))
    return table("kind | effect rate | do nothing | untrained | KD | KD + DIITO | difference, seed by seed", rows)


def table_of_intervals(record: dict[str, Any]) -> str:
    """Intervals that know which images rows share, and those that know of bases alone."""
    kinds, rows = record["runs"][0]["students"]["KD"]["kinds"], []
    for kind in ("as mapped", "answering token", "attention heads", "mlp output"):
        for name in ("iia", "effective"):
            knowing, by_base = kinds[kind][name], kinds[kind]["by base"][name]
            times = (knowing[2] - knowing[1]) / (by_base[2] - by_base[1])
            label = f"{kind}: {'IIA' if name == 'iia' else name}"
            rows.append((label, written(knowing), written(by_base), f"{times:.1f} ×"))
    return table("figure | by images | by base alone | by images, as wide as by base", rows)


BASE, SOURCE, INK = "#4477aa", "#ee7733", "#333333"
TOKENS, SWAPPED = 5, 3
BARS = {
    "effect rate": ("effect_rate", "#bbbbbb", "swaps that change the teacher's answer"),
    "do nothing": ("do_nothing", "#bbbbbb", "right by ignoring every swap"),
    "IIA": ("iia", BASE, "both answer alike after the swap"),
    "effective": ("effective", BASE, "… where the teacher's answer changes"),
    "normalized": ("normalized", BASE, "IIA, on a scale from do nothing (0) to all right (1)"),
}


def box(axes: Axes, at: tuple[float, float], width: float, text: str, color: str) -> None:
    """A rounded box with text, by the middle of its left edge."""
    (x, y), height, shape = at, 0.62, "round,pad=0,rounding_size=0.12"
    frame = FancyBboxPatch((x, y - height / 2), width, height, boxstyle=shape, facecolor="w", edgecolor=color, lw=1.2)
    axes.add_patch(frame)
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=8, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK, **style: Any) -> None:
    settings = {"arrowstyle": "-|>", "mutation_scale": 9, "lw": 1.1, "shrinkA": 0, "shrinkB": 0, **style}
    axes.add_patch(FancyArrowPatch(start, end, color=color, **settings))


def tokens(axes: Axes, x: float, y: float, colors: Sequence[str]) -> None:
    """The vectors of the tokens after a block, one above the other."""
    for number, color in enumerate(colors):
        place = (x, y + 0.62 - 0.26 * number - 0.1)
        axes.add_patch(
            FancyBboxPatch(place, 0.34, 0.2, boxstyle="square,pad=0", facecolor=color, edgecolor="w", lw=0.5)
        )


def network(axes: Axes, y: float, name: str, blocks: tuple[str, str], answer: str) -> None:
    """The run of a base and of a source in one network, and the token that is taken over."""
    axes.text(0, y + 0.95, name, fontsize=10, fontweight="bold", color=INK, va="center")
    below = y - 1.75
    for level, text, color in ((y, "base", BASE), (below, "source", SOURCE)):
        box(axes, (0, level), 1.0, text, color)
        arrow(axes, (1.0, level), (1.35, level))
        box(axes, (1.35, level), 1.4, blocks[0], color)
        arrow(axes, (2.75, level), (3.07, level))
    tokens(axes, 3.1, y, [SOURCE if number == SWAPPED else BASE for number in range(TOKENS)])
    tokens(axes, 3.1, below, [SOURCE] * TOKENS)
    taken, put = (level + 0.62 - 0.26 * SWAPPED for level in (below, y))
    arrow(axes, (3.48, taken), (3.48, put), SOURCE, connectionstyle="arc3,rad=0.5", lw=1.8, mutation_scale=12)
    axes.text(4.15, (y + below) / 2 - 0.25, "one token's vector\nis swapped in", fontsize=8, color=SOURCE, va="center")
    arrow(axes, (3.5, y), (4.15, y))
    box(axes, (4.15, y), 1.5, blocks[1], BASE)
    arrow(axes, (5.65, y), (6.0, y))
    box(axes, (6.0, y), 1.1, answer, INK)


def schematic(axes: Axes) -> None:
    """A base and a source in teacher and student, and the two answers that are compared."""
    network(axes, 5.2, "teacher", ("blocks 0, 1", "blocks 2 to 5"), "3 → 7")
    network(axes, 1.2, "student", ("block 0", "blocks 1, 2"), "3 → 4")
    axes.text(6.55, 5.85, "answer, before →\nafter the swap", fontsize=7.5, color="0.35", ha="center", va="center")
    arrow(axes, (6.8, 4.85), (6.8, 1.55), arrowstyle="<|-|>")
    axes.text(6.68, 2.75, "alike after the swap?\nHere they are not", fontsize=8, color=INK, va="center", ha="right")
    axes.set(xlim=(-0.1, 7.6), ylim=(-1.3, 6.5))
    axes.set_aspect("equal")
    axes.axis("off")


def bars(axes: Axes, found: dict[str, Any]) -> None:
    """The figures of one student."""
    for y, (key, color, text) in enumerate(BARS.values()):
        value, low, high = found[key] if isinstance(found[key], list) else (found[key], None, None)
        axes.barh(y, value, color=color, height=0.42)
        if low is not None:
            axes.plot([low, high], [y, y], color=INK, lw=1.6)
        axes.text(max(value, high or 0) + 0.02, y, f"{value:.2f}", va="center", fontsize=9, color=INK)
        axes.text(0.008, y - 0.37, text, va="center", fontsize=7.5, color="0.35")
    axes.set(xlim=(0, 1.0), ylim=(len(BARS) - 0.6, -0.75), xticks=[0, 0.5, 1])
    axes.set_yticks(range(len(BARS)), BARS)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def plot(record: dict[str, Any]) -> Picture:
    figure = Picture(figsize=(10.5, 4.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    schematic(left)
    bars(right, record["runs"][0]["students"]["KD"]["kinds"]["as mapped"])
    left.set_title("one interchange", fontsize=10, loc="left")
    right.set_title("2,000 pairs of one student (pvr, KD); lines: 95 %", fontsize=10, loc="left")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plot", action="store_true", help="draw and print the last line of the file alone")
    given = parser.parse_args()
    if not given.plot:
        record = measure(given.seeds)
        with FILE.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    latest = lines()[-1]
    plot(latest).savefig(FILE.with_suffix(".png"))
    print(table_of_kinds(latest), table_of_intervals(latest), sep="\n\n")


if __name__ == "__main__":
    main()
