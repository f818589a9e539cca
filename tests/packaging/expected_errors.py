"""Compare the errors of mypy with those that lines of files name: `mypy … FILES | python expected_errors.py FILES`."""

import re
import sys
from pathlib import Path

NAMED = re.compile(r"  # ([a-z-]+)$")
FOUND = re.compile(r"([^/]+):(\d+): error: .*\[([a-z-]+)\]$")
Error = tuple[str, int, str]
"""The name of a file, a line, and the kind of error that mypy finds there."""


def named(file: str, code: str) -> set[Error]:
    """Return the errors that the lines of a file name at their ends."""
    lines = ((number, NAMED.search(line)) for number, line in enumerate(code.splitlines(), 1))
    return {(file, number, match[1]) for number, match in lines if match}


def found(output: str) -> set[Error]:
    """Return the errors that mypy has printed."""
    matches = (FOUND.search(line) for line in output.splitlines())
    return {(match[1], int(match[2]), match[3]) for match in matches if match}


if __name__ == "__main__":
    printed = sys.stdin.read()
    files = [Path(name) for name in sys.argv[1:]]
    expected = set().union(*(named(path.name, path.read_text(encoding="utf-8")) for path in files))
    if found(printed) != expected:
        sys.exit(f"mypy finds other errors than those that the files name:\n{printed}")
    print(f"mypy finds the {len(expected)} errors that are there")
