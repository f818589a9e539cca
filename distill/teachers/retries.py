"""Retries of requests over a network that failed, after pauses that grow."""

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
    """The number of retries and the pauses before them: min(longest, first · 2^i) s, times a draw from [½, 1).

    Args:
        count: the number of retries after the first request.
        first, longest: the first and the longest pause, before the draw [s].
        seed: seeds the draws, which keep many clients that failed together from retrying together.
        sleep: the function that waits.
        timeout: the longest wait for the answer of a server to one request [s].
    """

    count: int = 5
    first: float = 1.0
    longest: float = 60.0
    seed: int = 0
    sleep: Callable[[float], None] = time.sleep
    timeout: float = 600.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", seed_of(self.seed))
        if self.count < 0 or not 0 <= self.first <= DAY or not 0 <= self.longest <= DAY:
            raise DistillError(
                f"{self} cannot be; use a count of 0 or more and pauses of 0 s to a day, {DAY} s: Retries(5)."
            )
        if not 0 < self.timeout <= DAY:
            raise DistillError(f"{self} cannot be; use a timeout above 0 s and of up to a day, {DAY} s: Retries(5).")

    def pauses(self) -> Iterator[float]:
        """Yield the lengths of the pauses [s], without end; each process of a training draws its own."""
        draw = Random(f"{self.seed} {os.environ.get('RANK', 0)}")
        number = 0
        while True:
            yield min(self.longest, self.first * 2 ** min(number, 64)) * draw.uniform(0.5, 1.0)
            number += 1


def retry(send: Callable[[], T], retries: Retries, give_up: Callable[[BaseException, int, float], Exception]) -> T:
    """Return what `send` returns; after errors of the network, call it again.

    Args:
        send: may fail.
        retries: the number of retries and their pauses.
        give_up: returns the exception to raise, from the last error, the number of calls and the seconds of all pauses.
    """
    waited, pauses = 0.0, retries.pauses()
    for number in range(retries.count + 1):
        try:
            return send()
        except Exception as error:
            if not is_of_network(error):
                raise
            if number == retries.count:
                raise give_up(error, number + 1, waited) from error
            pause = next(pauses)
        retries.sleep(pause)
        waited += pause
    raise AssertionError("retries.count is below 0")


def is_of_network(error: BaseException | None) -> bool:
    """Return whether an error says that a host was not reached, or went away, so that a retry may help.

    False if the host refused (status 4xx), if the job itself failed, or if a file of this machine is missing. Libraries
    are recognized by the names of their classes; none is imported.
    """
    if error is None:
        return False
    if _named(error, "RemoteError", "nnsight"):  # sent, and failed there: has no cause
        return is_of_network(error.__cause__)
    status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status_code", None))
    if isinstance(status, int):
        return status >= 500 or status in TRANSIENT
    if isinstance(error, OSError):  # ConnectionError and TimeoutError among them
        return not isinstance(error, OF_THIS_MACHINE)
    if isinstance(error, json.JSONDecodeError) or _is_cut_off(error):
        return True  # nnsight reads an empty message where the host closed the connection
    return any(cls.__module__.split(".")[0] in NETWORKS for cls in type(error).__mro__)


def _is_cut_off(error: Any) -> bool:
    return _named(error, "ValidationError", "pydantic_core") and getattr(error, "title", "") == "ResponseModel"


def _named(error: object, name: str, package: str) -> bool:
    return any(cls.__name__ == name and cls.__module__.split(".")[0] == package for cls in type(error).__mro__)
