"""Many fits, blocks, traces, measurements and files in one process: `python -m tests.soak --minutes 30`.

After each round of all of it memory, open files, threads, temporary files, hooks and objects are counted. The rounds
after the first ones are cut into windows; what is larger in the last window than it ever was in the first one grows,
and the exit status is then 1.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import linecache
import os
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import distill
from distill.alignment.alignment import Alignment
from distill.cli.report import ComparedModel, Report
from distill.errors import DistillError
from distill.tasks import Rows, Task
from distill.training.checkpoints import Checkpoints
from interventions import (
    Location,
    Rotation,
    Swap,
    Zero,
    heat_map,
    interchange,
    intervene,
    load,
    logit_difference,
    record,
    run,
    save,
    sweep,
)
from tests.distill.wired import SUM, Wired
from tests.interventions.remote import tiny

WARM = 3  # rounds before anything is counted: caches fill, libraries are loaded
LEAST = 6  # rounds that are counted, however short the time
QUIET = Console(quiet=True)


class Classifier(nn.Module):
    """A network of three layers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x).relu()).relu())


def rows() -> dict[str, torch.Tensor]:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    return {"x": x, "labels": (x[:, 0] > 0).long()}


def tokens(seed: int = 0) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(seed))}


PLACE = Location(module="second", dims=range(4))


@dataclass
class Work:
    """What is done in every round, on models that live as long as the process."""

    folder: Path
    teacher: nn.Module = field(default_factory=Classifier)
    network: Any = field(default_factory=tiny.network)
    traced: Any = field(default_factory=tiny.traced)

    def fits(self) -> None:
        settings = {"data": rows(), "objective": [distill.KD(), distill.DIITO()], "console": QUIET, "seed": 1}
        with tempfile.TemporaryDirectory(dir=self.folder) as each:
            schedule = distill.Schedule(steps=3, batch_size=16, lr=1e-3)
            result = distill.fit(
                self.teacher, Classifier(), {PLACE: PLACE}, schedule=schedule, output_dir=f"{each}/run", **settings
            )
            str(result), result._repr_html_(), result.plot()._repr_png_()

    def steps(self) -> None:
        """A run with checkpoints that is left in the middle, gone on with, and one that ends in an error."""
        with tempfile.TemporaryDirectory(dir=self.folder) as each:
            schedule = distill.Schedule(steps=4, batch_size=16, lr=1e-3)
            for resume in (False, True):
                kept = Checkpoints(Path(each) / "checkpoints", every=1, resume=resume)
                running = distill.steps(
                    self.teacher, Classifier(), {}, rows(), objective=distill.KD(), schedule=schedule, checkpoints=kept
                )
                next(running), next(running)
                running.close()
        spoilt = distill.Schedule(steps=1, batch_size=16, lr=3e38, optimizer="sgd", clip=None, warmup=0.0)
        with contextlib.suppress(DistillError):
            distill.fit(None, Classifier(), data=rows(), objective=distill.Labels(), schedule=spoilt, console=QUIET)

    def blocks(self) -> None:
        for site in ("block_output", "mlp_output", "query", "attention_pattern"):
            with intervene(self.network, Location(1, site), op=Zero(), positions=-1):
                self.network(**tokens())
            with contextlib.suppress(RuntimeError), intervene(self.network, Location(1, site), op=raising):
                self.network(**tokens())
        with record(self.network, [Location(0), Location(2)]) as kept:
            self.network(**tokens())
        assert len(kept) == 2
        with intervene(self.network, layer=1, op=Zero(), positions=-1, steps=[1, 2]):
            self.network.generate(**tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0)

    def runs(self) -> None:
        base = run(self.network, tokens(), at=[Location(1), Location(2, "query")])
        after = interchange(self.network, base, tokens(1), Location(1, subspace=Rotation(4, width=32)))
        after.logits[:, -1, 3].sum().backward()
        grid = sweep(
            self.network, tokens(), tokens(1), [Location(i) for i in range(3)],
            metric=logit_difference(3, 4), positions=[0, 5],
        )  # fmt: skip
        repr(grid), grid._repr_html_()
        heat_map(torch.eye(2), ["a", "b"], ["a", "b"])._repr_png_()

    def traces(self) -> None:
        run(self.traced, tokens(), at=[Location(1)])
        interchange(self.traced, tokens(), tokens(1), Location(1), remote="local")
        with intervene(self.traced, layer=1, op=Zero()), self.traced.trace(**tokens()):
            self.traced.output.logits.save()
        stopped, trace = contextlib.suppress(Exception), self.traced.trace(**tokens())
        with stopped, intervene(self.traced, layer=1, op=raising), trace:
            self.traced.output.logits.save()

    def measures(self) -> None:
        student = Classifier()
        evaluation = distill.evaluate(self.teacher, student, {PLACE: PLACE}, rows(), pairs=50)
        distill.metrics.calibration(student, rows())
        distill.linear_probe(student, rows(), rows())
        held = Rows.of(rows())
        task = Task("soak", held, held, ("0", "1"))
        Report("soak", task, [ComparedModel("student", 3, 2, evaluation)], {}).html()

    def files(self) -> None:
        student = Wired()
        place = Location(module="hidden", subspace=Rotation(1, width=3))
        with tempfile.TemporaryDirectory(dir=self.folder) as each:
            save(f"{each}/saved", {place: Swap()}, model=student)
            load(f"{each}/saved", student)
            found = distill.align(SUM, student, {"inner": place}, steps=2, batch_size=16, console=QUIET)
            found.save(f"{each}/alignment", student)
            Alignment.load(f"{each}/alignment", student)

    def serves(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as each:
            served = distill.Served(self.traced, cache=f"{each}/answers")
            data = {"input_ids": torch.randint(1, 50, (16, 6), generator=torch.Generator().manual_seed(0))}
            schedule = distill.Schedule(steps=2, batch_size=8, lr=1e-4)
            settings = {"objective": distill.KD(), "schedule": schedule, "console": QUIET, "eval_data": data}
            distill.fit(served, tiny.network(1), {}, data, **settings)

    @property
    def all(self) -> dict[str, Callable[[], None]]:
        """The works by name."""
        names = ("fits", "steps", "blocks", "runs", "traces", "measures", "files", "serves")
        return {name: getattr(self, name) for name in names}


def raising(base: torch.Tensor, source: Any, generator: Any) -> torch.Tensor:
    raise RuntimeError("as planned")


def counts(work: Work) -> dict[str, int]:
    """What there is, after what nobody needs any more is gone, and what libraries keep of their last so many calls."""
    for each in gc.get_objects():
        if type(each) is functools._lru_cache_wrapper and each.cache_parameters()["maxsize"] is not None:
            each.cache_clear()
    for _ in range(3):
        gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    models = (work.teacher, work.network, work.traced._module)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "memory [KB]": resident // 1024,
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "Python threads": threading.active_count(),
        "temporary files": sum(1 for _ in Path(tempfile.gettempdir()).rglob("*")),
        "hooks": sum(map(hooks, models)),
        "objects": len(gc.get_objects()),
        "tensors": sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()),
        "modules": sum(issubclass(type(each), nn.Module) for each in gc.get_objects()),
        "warning filters": len(warnings.filters),
        "sources": len(linecache.cache),
    }


def hooks(model: nn.Module) -> int:
    """How much stands on a model that is no part of it."""
    found = len(getattr(model, "_edits", ()))
    for each in model.modules():
        found += len(each._forward_hooks) + len(each._forward_pre_hooks) + len(each._backward_hooks)
        found += "forward" in vars(each)
    return found


ALLOWED = {"memory [KB]": 2048, "objects": 40, "tensors": 0}
"""By how much the last window may be above the first: pages of the allocator, and a few objects of libraries."""


def verdicts(samples: list[dict[str, int]]) -> Iterator[tuple[str, int, int, float, bool]]:
    """Of each count: the most in the first window, the least in the last, growth a round, and whether it grows."""
    third = max(2, len(samples) // 3)
    for name in samples[0]:
        first, last = ([each[name] for each in part] for part in (samples[:third], samples[-third:]))
        rate = (sum(last) / len(last) - sum(first) / len(first)) / max(1, len(samples) - third)
        allowed = ALLOWED.get(name, 0)
        yield name, max(first), min(last), rate, min(last) > max(first) + allowed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--only", default="", help="works, with commas")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    end = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        work = Work(Path(folder))
        chosen = {name: each for name, each in work.all.items() if not given.only or name in given.only.split(",")}
        samples: list[dict[str, int]] = []
        kinds: list[Counter[str]] = []
        rounds = 0
        while rounds < WARM + LEAST or time.monotonic() < end:
            for each in chosen.values():
                each()
            rounds += 1
            if rounds > WARM:
                samples.append(counts(work))
            if rounds == WARM or (rounds > WARM and time.monotonic() >= end):
                kinds.append(Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects()))
    found = list(verdicts(samples))
    print(f"{rounds} rounds of {', '.join(chosen)}; the first {WARM} are not counted")
    print(f"{'':16} {'first':>10} {'last':>10} {'a round':>10}")
    for name, first, last, rate, grows in found:
        print(f"{name:16} {first:10,} {last:10,} {rate:10.2f}{'  grows' if grows else ''}")
    if not any(grows for *_, grows in found):
        return 0
    print("more of:", ", ".join(f"{name} +{more}" for name, more in (kinds[-1] - kinds[0]).most_common(12)))
    return 1


if __name__ == "__main__":
    sys.exit(main())
