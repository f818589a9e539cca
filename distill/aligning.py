"""`align`: learn the subspaces of a mapping, with the network frozen."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from math import sqrt
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from distill import loop
from distill.alignments import Alignment
from distill.causal_models import CausalModel
from distill.errors import DistillError
from distill.inputs import device_of, to_device
from distill.loop import Record, Schedule
from distill.mapping import Pair, Sides, pairs_of
from distill.metrics import evaluating
from distill.objectives import DAS
from distill.progress import shown
from distill.samples import Feed
from distill.swaps import places_of
from distill.variables import variables_accuracy
from distill.wholes import refuse_wholes
from interventions import PCA, InterventionError, Location, Subspace, intervene

ALIGNING = Schedule(steps=1000, batch_size=256, warmup=0.0, weight_decay=0.0, clip=None)
TURN = 0.2  # how far a step turns a direction [radians], about
FITTED_ON = 2048  # examples whose activations a PCA is fitted on
COLDEST = 0.1


def align(
    causal_model: CausalModel,
    network: nn.Module,
    mapping: Sides,
    data: Any = None,
    *,
    positions: Any = None,
    weights: Mapping[str, float] | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    schedule: Schedule | None = None,
    coldest: float = COLDEST,
    pairs: int = 2000,
    controls: str | Sequence[str] = (),
    console: Console | None = None,
    accelerator: Accelerator | None = None,
) -> Alignment:
    """Learn, in place, the subspaces in which a frozen network holds the variables of a causal model.

    Every entry of the mapping is learned as it would be alone. `Rotation` is distributed alignment search,
    `BoundlessRotation` boundless; `Mask` is a differentiable binary mask over dims, or over the coordinates of another
    subspace; `PCA(dims)` is fitted to what the network computes, and not trained. Others, and dims, stay as they are.

    Args:
        causal_model: what the network is thought to compute.
        network: any torch model. Its weights and modes are as before afterwards.
        mapping: {variable: location or tuple of locations}, with a subspace each.
        data: {name: tensor} of the causal model's inputs; by default it samples them.
        positions: which tokens of the places, as `CausalModel.select` takes them: one choice for all, or {variable or
            location: choice}. None is all of them.
        weights: {term: weight}: `das`, and `size`, the share of the dims that masks and boundaries replace; 1 by
            default.
        steps, batch_size, lr, seed: override those of `schedule`.
        schedule: by default 1000 steps of 256 pairs, with lr = 0.2 / √width: Adam moves each entry of a direction by
            about lr in a step.
        coldest: masks and boundaries are annealed, from their own temperature to this one, linearly.
        pairs: how many held-out pairs to measure it on; 0 measures nothing.
        controls: of that measurement, as for `interchange_accuracy`.
        console: shows the progress; `rich.console.Console(quiet=True)` for none.
        accelerator: for mixed precision, several processes or trackers; `Accelerator()` by default.

    Raises:
        DistillError: nothing to learn, a subspace wider than its location, or as `fit`.

    Geiger et al. 2023 (arXiv:2303.02536); Wu et al. 2023 (arXiv:2305.08809); Mueller et al. 2025 (arXiv:2504.13151).
    """
    rate = schedule.lr if lr is None and schedule is not None else lr
    asked: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed}
    schedule = replace(schedule or ALIGNING, **{name: value for name, value in asked.items() if value is not None})
    entries = pairs_of(mapping, causal_model, network, positions)
    feed = loop.feed_of(causal_model, data, schedule)
    records = learn(
        feed,
        network,
        entries,
        data,
        schedule,
        lr=rate,
        weights=weights,
        coldest=coldest,
        console=console,
        accelerator=accelerator,
    )
    settings = {"schedule": asdict(schedule), "weights": dict(weights or {}), "mapping": list(map(str, entries))}
    measured = None
    if pairs:
        measured = variables_accuracy(
            causal_model, network, entries, data, pairs=pairs, seed=schedule.seed, controls=controls
        )
    return Alignment(entries, measured, tuple(records), settings)


def learn(
    feed: Any,
    network: nn.Module,
    entries: tuple[Pair, ...],
    data: Any,
    schedule: Schedule,
    *,
    lr: float | None = None,
    weights: Mapping[str, float] | None = None,
    coldest: float = COLDEST,
    console: Console | None = None,
    accelerator: Accelerator | None = None,
    title: str = "align",
) -> list[Record]:
    """Learn the subspaces of these entries, each as it would be alone, and leave them in eval mode.

    The arguments are those of `align`; `feed` is the causal model with what it is trained on, and `lr` that of the
    schedule if it is not None.
    """
    subspaces = [at.subspace for at in places_of(entries) if isinstance(at.subspace, nn.Module)]
    device = accelerator.device if accelerator is not None else device_of(network)
    network.to(device)
    few = to_device(feed.batch(range(min(16, len(feed)))), device)
    fitted = [_built(feed, network, pair, at, few) for pair in entries for at in pair.student]
    others = feed.sources(_rows(few), torch.Generator().manual_seed(schedule.seed), device)
    refuse_wholes(feed.model, network, entries, few, others)
    parameters = [p for each in subspaces for p in learned_of(each)]
    if not parameters and not any(fitted):
        raise DistillError(
            f"there is nothing to learn at {', '.join(map(str, places_of(entries)))}; give a place a subspace, as "
            "Location(1, subspace=Rotation(8)), or measure it as it is: interchange_accuracy(causal_model, network, "
            "mapping)."
        )
    schedule = replace(schedule, lr=_rate(parameters) if lr is None else lr)
    records: list[Record] = []
    if parameters:
        with ExitStack() as modes:
            modes.enter_context(frozen(network, subspaces, parameters))
            running = loop.steps(
                feed.model,
                network,
                entries,
                data,
                objective=DAS(),
                weights=weights,
                schedule=schedule,
                accelerator=accelerator,
                trained=nn.ModuleList(subspaces),
            )
            modes.enter_context(closing(running))
            starts: dict[Any, float] = {each: _temperature(each) for each in subspaces if _anneals(each)}
            for record in shown(running, title, console or Console()):
                records.append(record)
                for each, start in starts.items():
                    each.temperature = start + (coldest - start) * record.step / record.total
    for each in subspaces:
        each.eval()
    return records


def learned_of(subspace: nn.Module) -> list[nn.Parameter]:
    """What of a subspace is learned: as it says, or all parameters of a module of the user's own."""
    return subspace.learned() if isinstance(subspace, Subspace) else list(subspace.parameters())


def _rate(parameters: Sequence[nn.Parameter]) -> float:
    """A learning rate for directions of this width."""
    return TURN / sqrt(max((len(each) for each in parameters if each.ndim), default=1))


def _anneals(subspace: nn.Module) -> bool:
    return hasattr(subspace, "temperature")


def _temperature(subspace: Any) -> float:
    return float(subspace.temperature)


def _rows(values: Mapping[str, Tensor]) -> int:
    return len(next(iter(values.values())))


@contextmanager
def frozen(network: nn.Module, subspaces: Sequence[nn.Module], learned: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside the block only the `learned` parameters take gradients; afterwards each does as before."""
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


def _built(feed: Feed, network: nn.Module, pair: Pair, at: Location, few: Mapping[str, Tensor]) -> bool:
    """Give a subspace its width, and a PCA its directions; whether that was learned here."""
    subspace: Any = at.subspace
    if subspace is None:
        return False
    fits = [each for each in subspace.modules() if isinstance(each, PCA) and not each.fitted]
    device = next(iter(few.values())).device
    values = feed.sources(FITTED_ON, torch.Generator().manual_seed(0), device) if fits else few
    vectors = vectors_at(feed.model, network, pair, at, values)
    try:
        for each in fits:
            each.fit_to(vectors)
        subspace.to(vectors.device)
        with torch.no_grad():
            subspace.coordinates(vectors[:1])
    except InterventionError as error:
        raise DistillError(f"{'+'.join(pair.teacher)} does not fit at {at}: {error}") from error
    return bool(fits)


def vectors_at(
    model: CausalModel, network: nn.Module, pair: Pair, at: Location, values: Mapping[str, Tensor]
) -> Tensor:
    """What a subspace of a place is given, `[n, width]`: the vectors there, of the tokens of the pair."""
    kept: list[Tensor] = []

    def keep(base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        kept.append(base.reshape(-1, base.shape[-1]))
        return base

    tokens = model.select(pair.positions[pair.student.index(at)], values)
    call: Callable[..., Any] = network
    inputs = model.encode(values)
    with (
        evaluating(network),
        torch.no_grad(),
        intervene(network, replace(at, subspace=None), op=keep, positions=tokens),
    ):
        call(**inputs) if isinstance(inputs, dict) else call(inputs)
    return torch.cat(kept)
