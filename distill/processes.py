"""The processes of one training or command: what they gather from each other, and what one of them does for all.

Processes that divide work, or wait for one of them, all take part; where one of them fails, all raise its error. In a
training they wait for each other in reductions, where nothing reaches them but the end of the connections of one that
has ended. So one that fails reports its error in the store through which they found each other.
"""

import itertools
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from jaxtyping import Shaped
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from distill.errors import DistillError, OtherProcessFailed
from interventions import InterventionError, in_one_line

T = TypeVar("T")
_DIVIDING: ContextVar[bool] = ContextVar("dividing", default=False)
_SAID: Counter[str] = Counter()
GRACE = timedelta(seconds=3)
"""The time in which processes that fail alike tell each other, so that none of them takes the others for lost."""
PATIENCE = 20.0
"""The seconds after which a process is ended that does not get out of waiting for one that failed."""
OF_CONNECTIONS = re.compile("gloo|nccl|connection|broken pipe|process ?group|tcpstore", re.IGNORECASE)
GONE = (RuntimeError, OSError)
"""The errors of a store whose process is gone."""
_RUNS = itertools.count()


def process_state() -> PartialState:
    """Return the state of this process among those of the run, as an `Accelerator` that is made now would have it."""
    return PartialState(cpu=on_cpu())


def on_cpu() -> bool:
    """Return whether accelerate must be set to the CPU, as it would let each of several processes train alone there."""
    is_one_of_several = "LOCAL_RANK" in os.environ
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (is_one_of_several and not torch.accelerator.is_available())


def started() -> int:
    """Return how many processes were started together, whether or not they know each other yet."""
    named = os.environ.get("WORLD_SIZE", "") if "RANK" in os.environ else ""
    return max(processes(), int(named) if named.isdecimal() else 1)


def processes() -> int:
    """Return how many processes train together; 1 without `torch.distributed`."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gather(rows: Shaped[Tensor, "own ..."]) -> Shaped[Tensor, "all ..."]:
    """Return the rows of all processes, in the order of the processes, on each of them; without a graph.

    The processes may have different numbers of rows, or none. All of them must call it equally often.
    """
    rows = rows.detach().contiguous()
    if processes() == 1:
        return rows
    own_count = torch.tensor([len(rows)], device=rows.device)
    counts = [int(count) for count in torch.cat(_gather_equal(own_count))]
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    return torch.cat([part[:count] for part, count in zip(_gather_equal(padded), counts, strict=True)])


def _gather_equal(value: Tensor) -> list[Tensor]:
    """Return a tensor of each process, all of one shape."""
    parts = [torch.empty_like(value) for _ in range(processes())]
    distributed.all_gather(parts, value)
    return parts


@contextmanager
def dividing(*models: Any) -> Iterator[None]:
    """Divide measurements inside the block among the processes, all of which must enter it.

    Models whose parameters lie on several processes are left whole: a call of them is one of all processes, on the
    same rows.

    Args:
        models: those that are measured.
    """
    before = _DIVIDING.set(processes() > 1 and not any(_is_spread(each) for each in models))
    try:
        yield
    finally:
        _DIVIDING.reset(before)


def are_divided() -> bool:
    """Return whether measurements are divided here among several processes."""
    return _DIVIDING.get()


def own_part(places: Tensor) -> Tensor:
    """Return the part of this process where measurements are divided, else all; some processes may have none."""
    if not are_divided():
        return places
    return places.tensor_split(processes())[distributed.get_rank()]


def gather_parts(make: Callable[[], T]) -> list[T]:
    """Return what each process makes, in their order, on each of them; only what this one makes if none divides.

    Raises:
        Exception: that of this process; else the error of the first process that has one.
    """
    return gather_results(make) if are_divided() else [make()]


def from_first(make: Callable[[], T]) -> T:
    """Return on each process what the first one makes; the others wait for it.

    Raises:
        Exception: that of the first process.
    """
    if process_state().num_processes == 1:
        return make()
    return gather_results(lambda: make() if is_first() else None)[0]  # type: ignore[return-value]


def gather_results(make: Callable[[], T]) -> list[T]:
    """Return what each process makes, in their order, on each of them; an error of one is raised on all.

    Raises:
        Exception: that of this process; else the error of the first process that has one.
    """
    if processes() == 1:
        return [make()]
    own, error = None, None
    try:
        own = make()
    except Exception as failure:
        error = failure
    found: list[Any] = [None] * processes()
    distributed.all_gather_object(found, (own, _as_sent(error)))
    if error is not None:
        raise error
    for rank, (_, failed) in enumerate(found):
        if failed is not None:
            kind, text = failed
            raise kind(text) if kind is not None else DistillError(f"process {rank} of {len(found)} failed: {text}")
    return [each for each, _ in found]


def _as_sent(error: Exception | None) -> tuple[type[Exception] | None, str] | None:
    """Return an error as its type, if it is one of these packages, and its text."""
    if error is None:
        return None
    if isinstance(error, (DistillError, InterventionError)):
        return type(error), str(error)
    return None, f"{type(error).__name__}: {error}"


def is_first() -> bool:
    """Return whether this process is the first of its run, which speaks and writes for all."""
    return bool(process_state().is_main_process)


def may_say(text: str) -> bool:
    """Return whether this process says a text that several may come to: the first one that does says it for all.

    Before the processes know each other it is the first by number.
    """
    if processes() == 1:
        return os.environ.get("RANK", "0") == "0"
    _SAID[text] += 1
    try:
        store = distributed.distributed_c10d._get_default_store()
        return bool(store.add(f"distill: {_SAID[text]} times {text}", 1) == 1)
    except (RuntimeError, OSError):  # the process that keeps the store is gone
        return True


def _is_spread(model: Any) -> bool:
    """Return whether parameters of a model lie on several processes."""
    return isinstance(model, nn.Module) and any(isinstance(each, DTensor) for each in model.parameters())


@contextmanager
def first_error_named(last: Callable[[], Path | None]) -> Iterator[None]:
    """Let an error in the block end all processes, and name that of the first one in those that waited for it.

    All processes have to enter such blocks equally often.

    Args:
        last: returns the last checkpoint, from which the run is resumed.

    Raises:
        OtherProcessFailed: another process failed, or is gone.
    """
    if processes() == 1:
        yield
        return
    reports = _Reports(next(_RUNS))
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        waited = isinstance(error, GONE) and bool(OF_CONNECTIONS.search(str(error)))
        first, lost = reports.tell("" if waited else f"{type(error).__name__}: {in_one_line(str)(error)}")
        if not waited:
            raise
        reason = first or f"process {' and '.join(map(str, lost)) or 0} is gone without a word, as if it was killed"
        saved = last()
        where = "no checkpoint was saved yet" if saved is None else f"the last checkpoint is {saved}"
        raise OtherProcessFailed(
            f"the training ended in all {processes()} processes, since {reason}; {where}; go on with the same call and "
            "resume=True."
        ) from error
    finally:
        reports.ended.set()


class _Reports:
    """The errors that the processes tell each other in one run.

    Args:
        run: the number of the run in this process, the same in all of them.
    """

    def __init__(self, run: int) -> None:
        self.run, self.ended, self.first = run, threading.Event(), ""
        found: Any = distributed.distributed_c10d
        self.store = found.PrefixStore(f"distill {run}", found._get_default_store())
        threading.Thread(target=self._watch, daemon=True).start()

    def tell(self, error: str) -> tuple[str, list[int]]:
        """Tell the others of an error; return the first that one of them reported, and the processes that are gone.

        Args:
            error: its type and message; empty if this process waited for one that ended.
        """
        rank, ranks = distributed.get_rank(), range(processes())
        try:
            if error:
                self.store.set(f"failure {self.store.add('failures', 1)}", f"process {rank} failed: {error}")
            self.store.set(f"rank {rank}", "")
            with suppress(*GONE):  # not all of them have ended
                self.store.wait([f"rank {each}" for each in ranks], GRACE)
            if self.store.check(["failure 1"]):
                self.first = self.store.get("failure 1").decode()
            return self.first, [each for each in ranks if not self.store.check([f"rank {each}"])]
        except GONE:  # process 0, which keeps the store, is gone
            return self.first, [0]

    def _watch(self) -> None:
        """Look for an error of another process once a second, and end this one if it does not get out by itself."""
        while not self.ended.wait(1):
            try:
                if not self.store.check(["failure 1"]):
                    continue
                self.first = self.store.get("failure 1").decode()
            except GONE:
                pass
            if not self.ended.wait(PATIENCE):
                print(f"the training ends, since {self.first or 'process 0 is gone'}.", file=sys.stderr, flush=True)
                os._exit(1)
