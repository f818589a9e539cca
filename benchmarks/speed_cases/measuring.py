"""How a case is measured: its sides in turn, medians of seconds, and the spread of ratios within one run."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Side = Callable[[], Any]
UNIT, LIMIT, NOW = "unit", "limit", "now"


@dataclass(frozen=True)
class Case:
    """Sides that compute the same thing, each as a call.

    Attributes:
        sides: by name. `limit` is written by hand in plain torch for this one model, and `now` is ours. `unit`, where
            there is one, is what both are given in. Others are compared with them.
        at_most: what is wanted of `now / limit`.
        unit: what the unit is.
        check: raises where the sides do not compute the same.
        drawn: whether what `limit` and `now` compute is drawn anew in each round, and so differs from the unit's.
        details: numbers that are not times, such as the count of modules.
    """

    sides: dict[str, Side]
    at_most: float | None = None
    unit: str = "a plain call"
    check: Callable[[], None] | None = None
    drawn: bool = False
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Given:
    """What the command line says about all cases."""

    device: torch.device
    rounds: int = 20
    seconds: float = 60.0
    """After that long no further round of a case begins, but for the first five."""
    dtype: torch.dtype = torch.float32


def clock_of(device: torch.device) -> Callable[[], float]:
    """On a CPU the processor time of this process: machines are shared."""
    if device.type != "cuda":
        return time.process_time

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized


def seconds_of(sides: dict[str, Side], given: Given) -> dict[str, list[float]]:
    """Return the seconds of each side in each round; each second round goes the other way round.

    Sides that all take less than 5 ms are called several times in a row, and the mean counts.
    """
    clock, slowest = clock_of(given.device), 1e-6
    for side in sides.values():
        began = clock()
        side()  # the first call makes what later ones find
        if clock() - began < 0.5:
            began = clock()
            side()
        slowest = max(slowest, clock() - began)
    repeats = max(1, min(20, round(5e-3 / slowest)))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    start = time.perf_counter()
    for number in range(given.rounds):
        if number >= 5 and time.perf_counter() - start > given.seconds:
            break
        for name in list(sides) if number % 2 else reversed(sides):
            began = clock()
            for _ in range(repeats):
                sides[name]()
            seconds[name].append((clock() - began) / repeats)
    return seconds


def quartiles(over: list[float], under: list[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile of the ratios of the rounds."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return [round(each, 4) for each in statistics.quantiles(ratios, n=4)] if len(ratios) > 1 else ratios * 3


def of_means(over: list[float], under: list[float]) -> list[float]:
    """Return the ratio of the means of all rounds, thrice."""
    return [round(statistics.fmean(over) / statistics.fmean(under), 4)] * 3


def measured(case: Case, given: Given) -> dict[str, Any]:
    """Check a case and measure it: milliseconds of each side, and quartiles of ratios."""
    if case.check is not None:
        case.check()
    seconds = seconds_of(case.sides, given)
    result: dict[str, Any] = {
        "ms": {name: round(1e3 * statistics.median(taken), 4) for name, taken in seconds.items()},
        "rounds": len(next(iter(seconds.values()))),
    }
    for unit in (UNIT, LIMIT):
        if unit in seconds:
            others = {name: taken for name, taken in seconds.items() if name != unit}
            quotients = of_means if case.drawn and unit == UNIT else quartiles
            result[f"/ {unit}"] = {name: quotients(taken, seconds[unit]) for name, taken in others.items()}
    if UNIT in seconds:
        result["unit"] = case.unit
    if case.at_most is not None:
        result["at most"] = case.at_most
    return result | case.details


def same(hand: torch.Tensor, ours: torch.Tensor, tolerance: float = 0.0) -> None:
    """Raise where two sides differ by more than a tolerance, relative to the largest value."""
    apart = (hand.float() - ours.float()).abs().max() / hand.float().abs().max().clamp_min(1e-30)
    assert apart <= tolerance, f"the sides differ by {apart.item():.2g}"
