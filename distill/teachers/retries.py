"""Asking again when a network failed, after a pause that grows."""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

from distill.data.seeds import seed_of
from distill.errors import DistillError, checked

T = TypeVar("T")

NETWORKS = frozenset({"httpx", "httpcore", "requests", "urllib3", "websocket", "websockets"})
OF_THIS_MACHINE = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
DAY = 86_400
TRANSIENT = frozenset({408, 425, 429})


@checked
@dataclass(frozen=True)
class Retries:
    """How often is asked again, and after which pauses: `first · 2^i` s, at most `longest`, times a draw from [½, 1).

    Args:
        count: times after the first.
        first, longest: of the pauses [s].
        seed: of the draws, which keep many clients that failed together from coming back together.
        sleep: what waits.
    """

    count: int = 5
    first: float = 1.0
    longest: float = 60.0
    seed: int = 0
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", seed_of(self.seed))
        if self.count < 0 or not 0 <= self.first <= DAY or not 0 <= self.longest <= DAY:
            raise DistillError(
                f"{self} cannot be; use a count of 0 or more and pauses of 0 s to a day, {DAY} s: Retries(5)."
            )

    def pauses(self) -> Iterator[float]:
        """Their lengths [s], without end; each process of a training draws its own."""
        draw = Random(f"{self.seed} {os.environ.get('RANK', 0)}")
        number = 0
        while True:
            yield min(self.longest, self.first * 2 ** min(number, 64)) * draw.uniform(0.5, 1.0)
            number += 1


def retried(ask: Callable[[], T], retries: Retries, failed: Callable[[BaseException, int, float], Exception]) -> T:
    """What `ask` returns, asked again after errors of the network.

    Args:
        ask: what may fail.
        retries: how often, and after which pauses.
        failed: from the last error, how often was asked and the seconds that were waited, to what is raised.
    """
    waited, pauses = 0.0, retries.pauses()
    for number in range(retries.count + 1):
        try:
            return ask()
        except Exception as error:
            if not is_of_network(error):
                raise
            if number == retries.count:
                raise failed(error, number + 1, waited) from error
            pause = next(pauses)
        retries.sleep(pause)
        waited += pause
    raise AssertionError("retries.count is below 0")


def is_of_network(error: BaseException | None) -> bool:
    """Whether an error says that a host was not reached, or went away, so that asking again may help.

    Not so where the host answered that it will not (status 4xx), where the job itself failed, or where a file of this
    machine is missing. Libraries are known by the names of their classes; none is imported.
    """
    if error is None:
        return False
    if _named(error, "RemoteError", "nnsight"):  # sent, and failed there: has no cause
        return is_of_network(error.__cause__)
    status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status_code", None))
    if isinstance(status, int):
        return status >= 500 or status in TRANSIENT
    if isinstance(error, OSError):  # of which ConnectionError and TimeoutError are two
        return not isinstance(error, OF_THIS_MACHINE)
    if isinstance(error, json.JSONDecodeError) or _is_cut_off(error):
        return True  # nnsight reads an empty message where the host closed the connection
    return any(cls.__module__.split(".")[0] in NETWORKS for cls in type(error).__mro__)


def _is_cut_off(error: Any) -> bool:
    return _named(error, "ValidationError", "pydantic_core") and getattr(error, "title", "") == "ResponseModel"


def _named(error: object, name: str, package: str) -> bool:
    return any(cls.__name__ == name and cls.__module__.split(".")[0] == package for cls in type(error).__mro__)
