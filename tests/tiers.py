"""Two tiers of tests: by default some cases of each test function, with `--full` all of them."""

from collections.abc import Iterator, Sequence

import pytest

CASES = 2  # of a test function in the default tier


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
