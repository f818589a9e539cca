"""Two tiers of tests: by default some cases of each test function, with `--full` all of them.

`python -m tests.tiers` prints, for each folder, how many cases run by default and how many with `--full` alone;
`python -m tests.tiers FILE …`, with what `pytest --junitxml=FILE` wrote, the files of tests that took longest.
"""

import contextlib
import io
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

CASES = 2  # of a test function in the default tier
BUDGET = 120.0
"""The seconds that all cases of a file may take: it runs in one process, for which the other may have to wait."""
SHOWN = 20


def default_tier(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Return what the default tier runs, in the order that it was collected in.

    Raises:
        pytest.UsageError: all cases of a test function are marked `full`.
    """
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {case for name, cases in functions.items() for case in _chosen(name, cases)}
    return [item for item in items if item in kept]


def _chosen(name: str, cases: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Yield the first and the last case that is not marked, and as many between as there is room for."""
    unmarked = [case for case in cases if case.get_closest_marker("full") is None]
    if not unmarked:
        raise pytest.UsageError(f"{name} has no case without the marker full; leave one unmarked, a small one.")
    last = len(unmarked) - 1
    yield from (unmarked[i] for i in sorted({round(i * last / (CASES - 1)) for i in range(CASES)}))


class Count:
    """A plugin of pytest that counts, and runs nothing."""

    def __init__(self) -> None:
        self.default: Counter[str] = Counter()
        self.full_alone: Counter[str] = Counter()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Count the cases of each tier before any is left out."""
        kept = set(default_tier(items))
        for item in items:
            (self.default if item in kept else self.full_alone)[_folder(item.nodeid)] += 1


def _folder(nodeid: str) -> str:
    """Return the folder of a test, of three levels at most; a file outside of folders stands for itself."""
    *folders, file = nodeid.partition("::")[0].split("/")
    return "/".join(folders[:3]) if len(folders) > 1 else "/".join([*folders, file])


def seconds_of(*reports: Path) -> Counter[str]:
    """Return the seconds that the tests of each module took, from reports in the form of JUnit, the slowest first."""
    found: Counter[str] = Counter()
    for case in (case for report in reports for case in ElementTree.parse(report).iter("testcase")):
        module = [part for part in case.get("classname", "").split(".") if not part.startswith("Test")]
        found[".".join(module)] += float(case.get("time", 0))
    return Counter(dict(found.most_common()))


def slowest(*reports: Path) -> Iterator[str]:
    """Yield a line for all files together, and one for each of the slowest."""
    found = seconds_of(*reports)
    yield f"{found.total():8.0f} s  {len(found)} files"
    for module, seconds in found.most_common(SHOWN):
        yield f"{seconds:8.1f} s  {module}{'' if seconds <= BUDGET else f'  over the {BUDGET:.0f} s of a file'}"


def main(*reports: Path) -> None:
    """Print a table: folder, cases of the default tier, cases of the full tier alone; or the slowest files."""
    if reports:
        print("\n".join(slowest(*reports)))
        return
    count = Count()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = pytest.main(["--collect-only", "-q", "-n0"], plugins=[count])
    if status:
        raise SystemExit(said.getvalue()[-3000:])
    folders = sorted({*count.default, *count.full_alone})
    print(f"{'':36}{'default':>9}{'only --full':>13}")
    for folder in folders:
        print(f"{folder:36}{count.default[folder]:9}{count.full_alone[folder]:13}")
    print(f"{'all':36}{count.default.total():9}{count.full_alone.total():13}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
