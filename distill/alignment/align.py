"""`align`: learn the subspaces of a mapping, with the network frozen."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from math import inf, sqrt
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from distill.alignment.alignment import Alignment
from distill.causal.feed import Feed, Given
from distill.causal.model import CausalModel
from distill.data.rows import Rows
from distill.errors import DistillError, checked
from distill.evaluation.interchange_accuracy import interchange_accuracy
from distill.evaluation.variable_accuracy import variables_accuracy
from distill.interchange.mapping import Pair, Sides, pairs_of
from distill.interchange.positions import Span
from distill.interchange.swap import encoded, places_of
from distill.models.inputs import device_of, evaluating, inputs_of, mask_of, to_device, uncompiled
from distill.models.outputs import answered
from distill.models.trials import translated
from distill.objectives import DAS, DIITO, Objective
from distill.tasks.loading import task_of, training_rows
from distill.training import loop
from distill.training.checks import check
from distill.training.progress import Plain, Record, shown
from distill.training.resolve import feed_of, remembered, training_of
from distill.training.schedule import Schedule
from interventions import PCA, InterventionError, Location, Subspace, intervene, run

TURN = 0.2  # how far a step turns a direction [radians], about
FITTED_ON = 2048  # examples whose activations a PCA is fitted on
COLDEST = 0.1


@checked
def align(
    causal_model: CausalModel | nn.Module,
    network: nn.Module,
    mapping: Sides,
    data: Any = None,
    *,
    positions: Any = None,
    eval_data: Any = None,
    weights: Mapping[str, float] | None = None,
    steps: int = 1000,
    batch_size: int = 256,
    lr: float | None = None,
    seed: Any = 0,
    coldest: float = COLDEST,
    pairs: int = 2000,
    controls: str | Sequence[str] = (),
    console: Console | None = None,
    accelerator: Accelerator | None = None,
    answers: Any = None,
) -> Alignment:
    """Learn, in place, the subspaces in which a frozen network holds the variables of a causal model.

    Every entry of the mapping is learned as it would be alone. `Rotation` is distributed alignment search,
    `BoundlessRotation` boundless; `Mask` is a differentiable binary mask over dims, or over the coordinates of another
    subspace; `PCA(dims)` is fitted to what the network computes, and not trained. Others, dims, and subspaces whose
    parameters take no gradient stay as they are. A search may end in a local optimum: start again with another
    `Rotation(k, seed=…)`.

    Args:
        causal_model: what the network is thought to compute. Or another network, with data: then interchanges at both
            sides of the mapping must have the same effect (`DIITO`), and `positions` is a `Span`.
        network: any torch model. Its weights and modes are as before afterwards.
        mapping: {variable: location or tuple of locations}, with a subspace each.
        data: {name: tensor} of the causal model's inputs; by default it samples them.
        positions: which tokens of the places, as `CausalModel.select` takes them: one choice for all, or {variable or
            location: choice}. None is all of them.
        eval_data: held-out rows to measure it on; by default what the causal model samples, in a stream of its own.
            Where `data` is given and these are not, it is measured on `data`, and says so.
        weights: {term: weight}: `das`, and `size`, the share of the dims that masks and boundaries replace; 1 by
            default.
        steps: how many, of `batch_size` pairs each, the learning rate falling linearly.
        lr: by default 0.2 / √width: Adam moves each entry of a direction by about lr in a step.
        seed: of what is sampled and measured.
        coldest: masks and boundaries are annealed, from their own temperature to this one, linearly.
        pairs: how many pairs to measure it on; 0 measures nothing.
        controls: of that measurement, as for `interchange_accuracy`.
        console: shows the progress; `rich.console.Console(quiet=True)` for none.
        accelerator: for mixed precision, several processes or trackers; `Accelerator()` by default.
        answers: what of the output of a network is its answer, as for `fit`.

    Raises:
        DistillError: nothing to learn, a subspace wider than its location, or as `fit`.

    Geiger et al. 2023 (arXiv:2303.02536); Wu et al. 2023 (arXiv:2305.08809); Mueller et al. 2025 (arXiv:2504.13151).
    """
    causal_model, network = uncompiled(causal_model), uncompiled(network)
    with translated():
        entries, schedule = pairs_of(mapping, causal_model, network, positions), scheduled(steps, batch_size, seed)
    learning: dict[str, Any] = {"lr": lr, "weights": weights, "coldest": coldest, "accelerator": accelerator}
    learning |= {"console": console}
    measuring: dict[str, Any] = {"pairs": pairs, "controls": controls, "eval_data": eval_data}
    with answered((causal_model, network), answers), translated(), torch.inference_mode(False):  # it learns
        if isinstance(causal_model, CausalModel):
            return _of_variables(causal_model, network, entries, data, schedule=schedule, **measuring, **learning)
        return _between(
            causal_model, network, entries, data, positions=positions, schedule=schedule, **measuring, **learning
        )


def _of_variables(
    causal_model: CausalModel,
    network: nn.Module,
    entries: tuple[Pair, ...],
    data: Any,
    *,
    schedule: Schedule,
    eval_data: Any,
    pairs: int,
    controls: str | Sequence[str],
    **learning: Any,
) -> Alignment:
    """An alignment of a causal model with a network."""
    feed = feed_of(causal_model, data, schedule)
    records = learn(feed.model, network, entries, feed, schedule, **learning)
    settings = {
        "steps": schedule.steps, "batch_size": schedule.batch_size, "seed": schedule.seed,
        "coldest": learning["coldest"], "weights": dict(learning["weights"] or {}),
        "lr": records[0].lr if records else None, "mapping": list(map(str, entries)),
    }  # fmt: skip
    seen = remembered(network, feed, schedule)
    measured = None
    if pairs:
        tested = (feed if isinstance(feed, Given) else None) if eval_data is None else eval_data
        measured = variables_accuracy(
            causal_model, network, entries, tested, pairs=pairs, seed=schedule.seed, controls=controls
        )
        if data is not None and eval_data is None:
            measured = replace(measured, overlap=1.0)
    return Alignment(entries, measured, tuple(records), settings, seen)


def scheduled(steps: int, batch_size: int, seed: Any) -> Schedule:
    """The schedule of an alignment: Adam, and a learning rate that falls linearly."""
    return Schedule(steps=steps, batch_size=batch_size, seed=seed, warmup=0.0, weight_decay=0.0, clip=None)


def _between(
    teacher: nn.Module,
    network: nn.Module,
    entries: tuple[Pair, ...],
    data: Any,
    *,
    positions: Span | None,
    eval_data: Any,
    pairs: int,
    controls: str | Sequence[str],
    schedule: Schedule,
    **learning: Any,
) -> Alignment:
    """An alignment of two networks, both frozen; what is learned is the subspaces of the second one's places."""
    taught = next((at for pair in entries for at in pair.teacher if isinstance(at.subspace, nn.Module)), None)
    if taught is not None and any(p.requires_grad for p in learned_of(taught.subspace)):
        raise DistillError(
            f"{taught} is on the teacher's side, where nothing is learned; give it dims=…, or a subspace that takes no "
            "gradient: subspace.requires_grad_(False)."
        )
    rule, task = Span(0.3) if positions is None else positions, None if data is None else task_of(data, teacher)
    rows = training_rows(data if task is None else task, teacher, schedule.seed, network)
    check(teacher, network, rows)
    seen = remembered(network, rows, schedule)
    records = learn(teacher, network, entries, rows, schedule, objective=DIITO(positions=rule), **learning)
    settings: dict[str, Any] = {"steps": schedule.steps, "batch_size": schedule.batch_size, "seed": schedule.seed}
    settings |= {"lr": records[0].lr if records else None, "mapping": list(map(str, entries)), "positions": repr(rule)}
    if not pairs:
        return Alignment(entries, None, tuple(records), settings, seen)
    tested = next(each for each in (eval_data, task, data if isinstance(data, str) else rows) if each is not None)
    measured = interchange_accuracy(
        teacher, network, entries, tested, positions=rule, pairs=pairs, seed=schedule.seed, controls=controls
    )
    if eval_data is None and task is None:
        measured = replace(measured, overlap=1.0)
    return Alignment(entries, measured, tuple(records), settings, seen)


def learn(
    teacher: CausalModel | nn.Module,
    network: nn.Module,
    entries: tuple[Pair, ...],
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
    """Learn the subspaces of these entries, each as it would be alone, and leave them in eval mode.

    The arguments are those of `align`; `feed` is what it is trained on, `objective` is `DAS()` by default.
    """
    if not 0 < coldest < inf:
        raise DistillError(f"coldest={coldest} is the last temperature, by which is divided; use e.g. coldest=0.1.")
    subspaces = [at.subspace for at in places_of(entries) if at.subspace is not None]
    odd = next((each for each in subspaces if not isinstance(each, nn.Module)), None)
    if odd is not None:
        raise DistillError(f"subspace={odd!r} is no module; make one, as Location(1, subspace=Rotation(8)).")
    home = device_of(network)
    with torch.inference_mode(False), torch.enable_grad(), evaluating(network):
        try:
            fitted = _sized(network, entries, feed) if isinstance(feed, Rows) else _built(feed, network, entries)
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
            schedule = replace(schedule, lr=_rate(parameters) if lr is None else lr)
            with frozen(network, subspaces, parameters):
                training = training_of(
                    teacher, network, entries, feed, objective=objective or DAS(), weights=weights, schedule=schedule,
                    trained=nn.ModuleList(subspaces),
                )  # fmt: skip
                with closing(loop.train(training, accelerator)) as running:
                    return list(_annealed(shown(running, title, console or Plain()), subspaces, coldest))
        finally:
            for each in subspaces:
                each.eval().to(home)
            if device_of(network) != home:
                network.to(home)


def _built(feed: Feed, network: nn.Module, entries: tuple[Pair, ...]) -> bool:
    """Give the subspaces their widths, and PCAs their directions; whether there were such."""
    few = to_device(feed.batch(range(min(16, len(feed)))), device_of(network))
    fitted = [_fitted(feed, network, pair, at, few) for pair in entries for at in pair.student]
    return any(fitted)


def _sized(network: nn.Module, entries: tuple[Pair, ...], rows: Rows) -> bool:
    """Give the subspaces their widths, and PCAs their directions, from rows of data; whether there were such."""
    batch = to_device(rows.batch(range(min(64, len(rows)))), device_of(network))
    fitted = False
    for at in (at for at in places_of(entries) if at.subspace is not None):
        subspace: Any = at.subspace
        with torch.no_grad():
            vectors = run(network, inputs_of(network, batch)).vectors(replace(at, subspace=None))
        mask = mask_of(batch)
        flat = vectors[mask.bool()] if mask is not None and mask.shape == vectors.shape[:2] else vectors
        try:
            for each in subspace.modules():
                if isinstance(each, PCA) and not each.fitted:
                    each.fit_to(flat.reshape(-1, flat.shape[-1]))
                    fitted = True
            with torch.no_grad():
                subspace.to(flat.device).coordinates(flat.reshape(-1, flat.shape[-1])[:1])
        except InterventionError as error:
            raise DistillError(f"the subspace of {at} does not fit: {error}") from error
    return fitted


def _annealed(records: Iterator[Record], subspaces: Sequence[Any], coldest: float) -> Iterator[Record]:
    """The records, the temperatures of masks and boundaries falling from step to step."""
    starts = {each: float(each.temperature) for each in subspaces if hasattr(each, "temperature")}
    for record in records:
        yield record
        for each, start in starts.items():
            each.temperature = start + (coldest - start) * record.step / record.total


def learned_of(subspace: nn.Module) -> list[nn.Parameter]:
    """What of a subspace is learned: as it says, or all parameters of a module of the user's own."""
    return subspace.learned() if isinstance(subspace, Subspace) else list(subspace.parameters())


def _rate(parameters: Sequence[nn.Parameter]) -> float:
    """A learning rate for directions of this width."""
    return TURN / sqrt(max((len(each) for each in parameters if each.ndim), default=1))


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


def _fitted(feed: Feed, network: nn.Module, pair: Pair, at: Location, few: Mapping[str, Tensor]) -> bool:
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

    tokens = model.select(pair.positions[pair.student.index(at)], values)
    call: Callable[..., Any] = network
    inputs = encoded(model, network, values)
    mask = mask_of(inputs) if tokens is None else None

    def keep(base: Tensor, source: Tensor | None, generator: torch.Generator | None) -> Tensor:
        real = base if mask is None or mask.shape != base.shape[:2] else base[mask.bool()]
        kept.append(real.reshape(-1, base.shape[-1]))
        return base

    with (
        evaluating(network),
        torch.no_grad(),
        intervene(network, replace(at, subspace=None), op=keep, positions=tokens),
    ):
        call(**inputs) if isinstance(inputs, dict) else call(inputs)
    return torch.cat(kept)
