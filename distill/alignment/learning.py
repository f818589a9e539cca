"""The training of subspaces while the network is frozen: only their parameters take gradients."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from math import inf, sqrt
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from distill.alignment.fitting import fit_to_examples, fit_to_rows
from distill.causal.feed import Feed
from distill.causal.model import CausalModel
from distill.data.rows import Rows
from distill.errors import DistillError
from distill.interchange.mapping import Entry
from distill.interchange.swap import places_of
from distill.models.inputs import device_of, evaluating
from distill.objectives import DAS, Objective
from distill.training import loop
from distill.training.checks import check
from distill.training.progress import Plain, Record, show_progress
from distill.training.resolve import training_of
from distill.training.schedule import Schedule
from interventions import Subspace

TURN = 0.2  # how far a step turns a direction [radians], about
COLDEST = 0.1  # the last temperature of masks and boundaries


def schedule_of(steps: int, batch_size: int, seed: Any) -> Schedule:
    """Return the schedule of an alignment: Adam without weight decay, and a learning rate that falls linearly."""
    return Schedule(steps=steps, batch_size=batch_size, seed=seed, warmup=0.0, weight_decay=0.0, clip=None)


def learn(
    teacher: CausalModel | nn.Module,
    network: nn.Module,
    entries: tuple[Entry, ...],
    feed: Feed | Rows,
    schedule: Schedule,
    *,
    objective: Objective | None = None,
    lr: float | None = None,
    weights: Mapping[str, float] | None = None,
    coldest: float = COLDEST,
    console: Console | None = None,
    accelerator: Accelerator | None = None,
    title: str = "align",
) -> list[Record]:
    """Train the subspaces of these entries, each as it would be alone, and leave them in eval mode.

    Args:
        teacher: the causal model, or a network.
        network: holds the places; it is frozen.
        entries: of the mapping.
        feed: examples of the causal model, or rows of data.
        schedule: of the training; a learning rate of None is chosen by the width of the subspaces.
        objective: `DAS()` by default.
        lr, weights, coldest, console, accelerator: as for `align`.
        title: of the progress bar.

    Returns:
        A record for each step; none where only PCAs had to be fitted.

    Raises:
        DistillError: nothing to learn, a subspace that is no module or does not fit its place; and as `fit`.
    """
    if not 0 < coldest < inf:
        raise DistillError(f"coldest={coldest} is the last temperature, by which is divided; use e.g. coldest=0.1.")
    subspaces = [at.subspace for at in places_of(entries) if at.subspace is not None]
    wrong = next((each for each in subspaces if not isinstance(each, nn.Module)), None)
    if wrong is not None:
        raise DistillError(f"subspace={wrong!r} is no module; make one, as Location(1, subspace=Rotation(8)).")
    home = device_of(network)
    with torch.inference_mode(False), torch.enable_grad(), evaluating(network):
        try:
            if isinstance(feed, Rows):
                fitted = fit_to_rows(feed, network, entries)
            else:
                fitted = fit_to_examples(feed, network, entries)
            parameters = [p for each in subspaces for p in learned_of(each) if p.requires_grad]
            if not parameters and not fitted:
                raise DistillError(
                    f"there is nothing to learn at {', '.join(map(str, places_of(entries)))}: a PCA that is fitted and "
                    "a SparseCoder are given, and dims are chosen; give a place a subspace that is learned, as "
                    "Location(1, subspace=Rotation(8)), or measure it as it is: interchange_accuracy(causal_model, "
                    "network, mapping)."
                )
            if not parameters:
                check(teacher, network, feed, entries)
                return []
            schedule = replace(schedule, lr=_learning_rate(parameters) if lr is None else lr)
            with frozen(network, subspaces, parameters):
                training = training_of(
                    teacher, network, entries, feed, objective=objective or DAS(), weights=weights, schedule=schedule,
                    trained=nn.ModuleList(subspaces),
                )  # fmt: skip
                with closing(loop.train(training, accelerator)) as running:
                    return list(_anneal(show_progress(running, title, console or Plain()), subspaces, coldest))
        finally:
            for each in subspaces:
                each.eval().to(home)
            if device_of(network) != home:
                network.to(home)


def _anneal(records: Iterator[Record], subspaces: Sequence[Any], coldest: float) -> Iterator[Record]:
    """Yield the records, and lower the temperatures of masks and boundaries linearly from step to step."""
    starts = {each: float(each.temperature) for each in subspaces if hasattr(each, "temperature")}
    for record in records:
        yield record
        for each, start in starts.items():
            each.temperature = start + (coldest - start) * record.step / record.total


def learned_of(subspace: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a subspace that are trained: all of them, where it is a module of the user's own."""
    return subspace.learned() if isinstance(subspace, Subspace) else list(subspace.parameters())


def _learning_rate(parameters: Sequence[nn.Parameter]) -> float:
    """Return a learning rate with which a step turns directions of this width by about `TURN`."""
    return TURN / sqrt(max((len(each) for each in parameters if each.ndim), default=1))


@contextmanager
def frozen(network: nn.Module, subspaces: Sequence[nn.Module], learned: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let only the `learned` parameters take gradients inside the block; afterwards each does as before."""
    everything = [*network.parameters(), *(p for each in subspaces for p in each.parameters())]
    before = [(parameter, parameter.requires_grad) for parameter in everything]
    kept = {id(parameter) for parameter in learned}
    try:
        for parameter in everything:
            parameter.requires_grad_(id(parameter) in kept)
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
            if id(parameter) in kept:
                parameter.grad = None
