"""How many pairs and seeds a measurement needs: the tables of docs/measuring.md.

    python benchmarks/power.py [--repeats 200] [--again] [--print]

Each simulated measurement draws pairs of `ROWS` rows as `interchange_accuracy` does, lets a share of them change the
teacher's answer, and takes the interval that a measurement prints (`share_of`, `Figure.estimate`).

- `intervals`: the half-width of the 95 % interval of effective IIA, where rows have nothing in common.
- `images`: the same for rows made of 4 of 364 images, some of which students find harder than others: a student follows
  a pair if the sum of the effects of its eight images and of chance, all normal, is below a threshold; the images have
  `IMAGE_SHARE` of the variance. Each repeat draws images and rows anew. Beside the interval that knows the images stand
  the bootstrap over bases, which does not, the half-width that is right (1.96 standard deviations over the repeats),
  and how many of the intervals hold the true value.
- `differences`: the smallest difference of two students, measured on the same pairs, that is found in 80 of 100 cases
  at a two-sided level of 5 % (Connor 1987, Biometrics 43), and in how many of simulated ones it was found.
- `seeds`: how many pairs of students a paired t-test needs for the same power (from the noncentral t).

One JSON line is appended to `power.json`; what is there with the same settings and of the same commit is not computed
again. `--print` prints the tables of the last line.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from scipy.special import stdtrit
from scipy.stats import nct
from torch import Tensor
from torch.distributions import Normal

from distill.evaluation.measurement import paired
from distill.statistics.figures import ratio
from distill.statistics.intervals import Share, bootstrap, share_of
from distill.statistics.sharing import Sharing

FILE = Path(__file__).with_suffix(".json")
ROWS, IMAGES, TILES = 4000, 364, 4  # those of the test rows of pvr
PAIRS, RATES, SHARES = (500, 2000, 10_000), (0.05, 0.12, 0.25, 0.5), (0.5, 0.7, 0.9)
FOLLOWED, IMAGE_SHARE = 0.7, 0.2
DISCORDANT = (0.02, 0.06, 0.13)
DIFFERENCES, DEVIATIONS = (0.005, 0.01, 0.02, 0.05), (0.005, 0.01, 0.02)
Z, Z_POWER, POWER, LEVEL = 1.959964, 0.841621, 0.8, 0.05
Cells = list[dict[str, float]]


def drawn(pairs: int, rate: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the bases and sources of the pairs that change the teacher's answer, at least two of them."""
    base, source = paired(ROWS, pairs, generator)
    kept = torch.rand(pairs, generator=generator) < rate
    kept[:2] = True
    return base[kept], source[kept]


def measured(right: Tensor, sharing: Sharing) -> Share:
    return share_of(right.double(), torch.ones(len(right), dtype=torch.float64), sharing)


def half(interval: Share) -> float:
    return (interval.high - interval.low) / 2


def intervals(repeats: int, generator: torch.Generator) -> Iterator[dict[str, float]]:
    """The half-width of the interval of effective IIA, where rows have nothing in common."""
    for pairs in PAIRS:
        for rate in RATES:
            for share in SHARES:
                found = []
                for _ in range(repeats):
                    base, source = drawn(pairs, rate, generator)
                    right = torch.rand(len(base), generator=generator) < share
                    found.append(half(measured(right, Sharing(base, source))))
                yield {"pairs": pairs, "effect rate": rate, "effective": share, "half-width": fmean(found)}


def with_images(pairs: int, rate: float, generator: torch.Generator) -> tuple[Tensor, Sharing]:
    """Return on which pairs a student follows its teacher, where images are hard or easy, and what pairs share."""
    base, source = drawn(pairs, rate, generator)
    tiles = torch.randint(IMAGES, (ROWS, TILES), generator=generator)
    effects = torch.randn(IMAGES, generator=generator) * sqrt(IMAGE_SHARE / (2 * TILES))
    chance = torch.randn(len(base), generator=generator) * sqrt(1 - IMAGE_SHARE)
    hardness = effects[tiles[base]].sum(1) + effects[tiles[source]].sum(1) + chance
    right = hardness < Normal(0.0, 1.0).icdf(torch.tensor(FOLLOWED))
    return right, Sharing(base, source, tiles[base], tiles[source])


def images(repeats: int, generator: torch.Generator) -> Iterator[dict[str, float]]:
    """The same for rows made of a few images, by a measurement that knows of them and by one that does not."""
    for pairs in PAIRS:
        for rate in RATES:
            values, knowing, by_base = [], [], []
            for number in range(repeats):
                right, sharing = with_images(pairs, rate, generator)
                knowing.append(measured(right, sharing))
                by_base.append(bootstrap(right.double(), torch.ones(len(right)).double(), sharing.base, number))
                values.append(knowing[-1].value)
            cell = {"pairs": pairs, "effect rate": rate, "right": Z * stdev(values)}
            for name, found in (("by images", knowing), ("by base", by_base)):
                cell[name] = fmean(map(half, found))
                cell[f"{name}, holds"] = fmean(each.low <= FOLLOWED <= each.high for each in found)
            yield cell


def smallest_difference(pairs: int, discordant: float) -> float:
    """The difference d with d √pairs = z √discordant + z' √(discordant − d²); at most all that are discordant."""
    found = 0.0
    for _ in range(100):
        found = min((Z * sqrt(discordant) + Z_POWER * sqrt(max(discordant - found**2, 0.0))) / sqrt(pairs), discordant)
    return found


def differences(repeats: int, generator: torch.Generator) -> Iterator[dict[str, float]]:
    """The smallest difference that a paired comparison finds, and how often simulated ones are found."""
    for pairs in PAIRS:
        for discordant in DISCORDANT:
            wanted = smallest_difference(pairs, discordant)
            hits = 0
            for _ in range(repeats):
                base, source = paired(ROWS, pairs, generator)
                dice = torch.rand(pairs, generator=generator)
                won, lost = dice < (discordant + wanted) / 2, dice > 1 - (discordant - wanted) / 2
                found = ratio(won.double() - lost.double(), torch.ones(pairs))
                assert found is not None
                hits += found.estimate(Sharing(base, source)).low > 0
            yield {"pairs": pairs, "discordant": discordant, "difference": wanted, "found": hits / repeats}


def power_of(seeds: int, difference: float, deviation: float) -> float:
    """How often a paired t-test of so many differences finds their mean, two-sided."""
    bound, shift = float(stdtrit(seeds - 1, 1 - LEVEL / 2)), difference / deviation * sqrt(seeds)
    return float(nct.sf(bound, seeds - 1, shift) + nct.cdf(-bound, seeds - 1, shift))


def seeds() -> Iterator[dict[str, float]]:
    """How many pairs of students show a difference."""
    for difference in DIFFERENCES:
        for deviation in DEVIATIONS:
            needed = next(n for n in range(2, 10_000) if power_of(n, difference, deviation) >= POWER)
            yield {"difference": difference, "deviation": deviation, "seeds": needed}


def grid(cells: Cells, down: Sequence[str], across: str, value: str, form: str) -> str:
    """A table in Markdown: a row for each combination of `down`, a column for each value of `across`."""
    columns = list(dict.fromkeys(cell[across] for cell in cells))
    rows = dict.fromkeys(tuple(cell[name] for name in down) for cell in cells)
    lines = [f"| {' | '.join(down)} | {' | '.join(f'{across} {column:g}' for column in columns)} |"]
    lines.append("| " + " | ".join("---" for _ in range(len(down) + len(columns))) + " |")
    for row in rows:
        found = [cell for cell in cells if tuple(cell[name] for name in down) == row]
        lines.append(f"| {' | '.join(f'{each:,g}' for each in row)} | {' | '.join(form.format(**c) for c in found)} |")
    return "\n".join(lines)


def table_of_images(cells: Cells) -> str:
    lines = ["| pairs | effect rate | right | by images (holds) | by base alone (holds) |", "| " + "--- | " * 5]
    lines[1] = lines[1].strip()
    for cell in cells:
        known = (f"± {cell[name]:.3f} ({cell[f'{name}, holds']:.0%})" for name in ("by images", "by base"))
        rates = f"{cell['pairs']:,g} | {cell['effect rate']:g} | ± {cell['right']:.3f}"
        lines.append(f"| {rates} | {' | '.join(known)} |")
    return "\n".join(lines)


def tables(record: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/measuring.md, by their names."""
    return {
        "intervals": grid(
            record["intervals"], ("pairs", "effect rate"), "effective", "half-width", "± {half-width:.3f}"
        ),
        "images": table_of_images(record["images"]),
        "differences": grid(record["differences"], ("pairs",), "discordant", "difference", "{difference:.3f}"),
        "seeds": grid(record["seeds"], ("difference",), "deviation", "seeds", "{seeds}"),
    }


def settings_of(repeats: int) -> dict[str, Any]:
    command = ["git", "-C", str(FILE.parent), "log", "-1", "--format=%h %s"]
    return {
        "commit": subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip(),
        "repeats": repeats,
        "rows": ROWS,
        "images": f"{TILES} of {IMAGES} a row, with {IMAGE_SHARE} of the variance, effective {FOLLOWED}",
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "scipy")},
    }


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()] if FILE.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--again", action="store_true", help="also what was computed before")
    parser.add_argument("--print", action="store_true", help="print the tables of the last line alone")
    given = parser.parse_args()
    if not given.print:
        settings = {"settings": settings_of(given.repeats)}
        if not given.again and any(settings.items() <= line.items() for line in lines()):
            return
        generator, began = torch.Generator().manual_seed(0), time.process_time()
        cells = {
            "intervals": list(intervals(given.repeats, generator)),
            "images": list(images(given.repeats, generator)),
            "differences": list(differences(given.repeats, generator)),
            "seeds": list(seeds()),
        }
        rounded = {name: [{k: round(v, 5) for k, v in cell.items()} for cell in each] for name, each in cells.items()}
        seconds = round(time.process_time() - began, 1)
        record = {"date": date.today().isoformat(), **settings, "seconds": seconds, **rounded}
        with FILE.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    for name, table in tables(lines()[-1]).items():
        print(f"{name}\n\n{table}\n")


if __name__ == "__main__":
    main()
