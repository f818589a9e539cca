"""Print what becomes of wrong arguments: `python -m tests.faults.fuzz [NAME …] [--every N] [--json FILE]`."""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.faults.fuzz.attack import Outcome, attacked, attacks
from tests.faults.fuzz.recipes import RECIPES

LOST = ("silent", "raw", "left", "hangs")


def main(arguments: list[str] | None = None) -> int:
    """Attack, print what is silent or raw, and count."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", help="of recipes, or how they begin; all by default")
    parser.add_argument("--every", type=int, default=1, help="try each so many alone")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    chosen = [r for r in RECIPES if not given.names or r.name.startswith(tuple(given.names))]
    outcomes = list(tried(chosen, given.every))
    for (kind, recipe, argument), group in sorted(grouped(outcomes).items()):
        if kind in LOST:
            print(f"{kind:7}{recipe}({argument}=…), {len(group)}: {'|'.join(each.value for each in group)}")
            print("\n".join(f"           {text}" for text in dict.fromkeys(each.text for each in group[:40])))
    counts = Counter(each.kind for each in outcomes)
    print(f"{len(outcomes)} tried: " + ", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    if given.json:
        given.json.write_text(json.dumps([asdict(each) for each in outcomes]))
    return int(any(counts[kind] for kind in LOST))


def grouped(outcomes: list[Outcome]) -> dict[tuple[str, str, str], list[Outcome]]:
    """Return the outcomes by kind, recipe and argument."""
    found: dict[tuple[str, str, str], list[Outcome]] = {}
    for each in outcomes:
        found.setdefault((each.kind, each.recipe, each.argument), []).append(each)
    return found


def tried(recipes: list, every: int) -> list[Outcome]:
    """Return the outcome of each attack on the recipes, after each recipe was seen to be right."""
    for recipe in recipes:
        seen = attacked(recipe)
        if seen.kind != "right":
            raise SystemExit(f"{recipe.name} is no right call: {seen.kind} {seen.text}")
    every_one = [(recipe, *attack) for recipe in recipes for attack in attacks(recipe)]
    return [attacked(*each) for each in every_one[::every]]


if __name__ == "__main__":
    sys.exit(main())
