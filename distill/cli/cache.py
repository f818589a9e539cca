"""`distill cache`: the answers of a teacher to the training rows of a task or file, fetched before a training."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from distill.cli.loading import load_task_and_teacher, warnings_as_notes
from distill.cli.options.groups import DataOptions
from distill.errors import DistillError
from distill.processes import dividing, gather_results, process_state
from distill.teachers.fetching import fetch_each
from distill.teachers.served import SAMPLES, Served
from distill.training.progress import LINES, console_of


def run_cache(
    source: DataOptions, teacher: str | None, seed: int, output: Path, *, batch_size: int, **settings: Any
) -> None:
    """Fetch the answers to all training rows, each process a part of them, and print how many are kept.

    Args:
        source: the rows.
        teacher: as for `distill fit`.
        seed: of the rows, and of a teacher that is trained.
        output: the folder of the cache; what is there is not computed again.
        batch_size: the rows of a batch.
        settings: `top_k` and `temperature` of `Served`.
    """
    if batch_size < 1:
        raise DistillError(f"--batch-size {batch_size} is no number of rows; use 1 or more, e.g. --batch-size 64.")
    console, state = console_of(), process_state()
    task, model, tokenizer = load_task_and_teacher(source, teacher, seed, console, lambda *_: None)
    with warnings_as_notes(console):
        served = Served(model.to(state.device), cache=output, tokenizer=tokenizer, **settings)

    def fetch() -> None:
        _shown(fetch_each(served, task.train, batch_size), console)

    with dividing(model):
        gather_results(fetch)
    console.print(
        f"answers to {served.cache.count(SAMPLES)} samples: {output}", markup=False, highlight=False, soft_wrap=True
    )


def _shown(batches: Iterable[tuple[int, int]], console: Console) -> None:
    """Carry out all batches; print how many are done, a few times."""
    began = time.monotonic()
    for done, total in batches:
        if done * LINES // total > (done - 1) * LINES // total:
            left = (time.monotonic() - began) / done * (total - done)
            console.print(f"cache: batch {done}/{total}  {left:.0f} s left", markup=False, highlight=False)
