"""The frame of both command lines: start and exit, the folder of results, and reports to wandb."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from distill.errors import DistillError
from distill.processes import process_state
from distill.results import FitResult
from interventions import InterventionError, printable


@dataclass(frozen=True)
class Tracking:
    """The settings of reports to wandb.

    Attributes:
        project, entity, run: as wandb calls them; None is wandb's own default.
        every: steps between two reports.
        names: {term of this library: its name in the original}.
        flags: all flags of the run, which wandb keeps.
    """

    project: str
    entity: str | None
    run: str
    every: int
    names: Mapping[str, str]
    flags: Mapping[str, Any] = field(default_factory=dict)


def start(command: Callable[[Sequence[str]], None], program: str) -> None:
    """Run a command line: bad input is one line and exit status 2, Ctrl-C is 130."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        command(sys.argv[1:])
    except (DistillError, InterventionError) as error:
        print(" ".join(f"{program}: {error}".split()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        message = str(stop).split("; go on")[0] or "stopped"  # fit says how to resume it, and these commands cannot
        print(printable(f"\n{program}: {message}."), file=sys.stderr)
        raise SystemExit(130) from None


def print_lines(*lines: str) -> None:
    """Print lines without buffering."""
    for line in lines:
        print(printable(line), flush=True)


def next_run(folder: Path) -> Path:
    """Return `folder-run-N` with the first N from 1 that is free, as the original numbers its runs."""
    number = 1
    while (found := folder.with_name(f"{folder.name}-run-{number}")).exists() and any(found.iterdir()):
        number += 1
    return found


def accelerator_of(fp16: bool, tracking: Tracking | None) -> Accelerator:
    """Return the accelerator of a run; where wandb is requested and not installed, print so and send nothing.

    Raises:
        DistillError: half precision without a GPU.
    """
    if fp16 and not torch.cuda.is_available():
        raise DistillError("--fp16 True needs a GPU, and there is none; leave it out, or give --fp16 False.")
    if tracking is not None and find_spec("wandb") is None:
        print_lines("warning: --is_wandb asks for wandb, which is not installed: nothing is sent (pip install wandb).")
        tracking = None
    process_state()  # whose device and processes the accelerator takes
    accelerator = Accelerator(
        mixed_precision="fp16" if fp16 else None, log_with=None if tracking is None else "wandb"
    )  # fmt: skip
    if tracking is not None:
        settings = {"wandb": {"entity": tracking.entity, "name": tracking.run}}
        accelerator.init_trackers(tracking.project, config=dict(tracking.flags), init_kwargs=settings)
        accelerator.trackers = [Renamed(each, tracking) for each in accelerator.trackers]
    return accelerator


@dataclass(frozen=True)
class Renamed:
    """A tracker that logs the figures of every so many steps, under the original's names."""

    tracker: Any
    tracking: Tracking

    @property
    def name(self) -> str:
        """The name of the tracker."""
        return self.tracker.name

    def log(self, values: Mapping[str, Any], step: int, **settings: Any) -> None:
        """Log the figures of a step, if its number is a multiple of `every`."""
        if step % self.tracking.every == 0:
            names = {"lr": "learning_rate", **self.tracking.names}
            renamed = {f"train/{names.get(name, name)}": value for name, value in values.items()}
            self.tracker.log(renamed, step=step, **settings)

    def finish(self) -> None:
        """End the run of the tracker."""
        self.tracker.finish()


def send(accelerator: Accelerator, tracking: Tracking | None, result: FitResult) -> None:
    """Send the accuracy of a finished run to the trackers of an accelerator, if it has any, and end them."""
    if tracking is None or not accelerator.trackers:
        return
    for renamed in accelerator.trackers:
        if result.accuracy is not None and result.records:
            renamed.tracker.log({"epoch/eval_acc": result.accuracy}, step=result.records[-1].step)
    accelerator.end_training()


def formula(weights: Mapping[str, float]) -> str:
    """Return the loss as a formula on one line.

    >>> formula({"kd": 0.7, "labels": 0.3, "kd_cf": 1.0})
    'loss = 0.7 kd + 0.3 labels + 1 kd_cf'
    """
    return "loss = " + " + ".join(f"{weight:g} {name}" for name, weight in weights.items())
