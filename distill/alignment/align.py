"""Distributed alignment search: the subspaces in which a frozen network holds the variables of a causal model.

For a variable at a location with activations h, an orthonormal R of k columns is learned so that, if the part of the
base's h in the subspace of R is replaced with that of the source's,

    h ← h_base − R Rᵀ h_base + R Rᵀ h_source,

the network answers as the causal model does when the variable takes the value that it has for the source. The loss is
the cross-entropy of the network's counterfactual answers to those of the causal model, averaged over pairs of base and
source; R alone is trained. Masks and boundaries choose the coordinates of a fixed or learned basis instead.

Geiger et al. 2023 (arXiv:2303.02536); boundless: Wu et al. 2023 (arXiv:2305.08809).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from distill.alignment.alignment import Alignment
from distill.alignment.learning import COLDEST, learn, learned_of, schedule_of
from distill.causal.feed import Given
from distill.causal.model import CausalModel
from distill.errors import DistillError, checked
from distill.evaluation.interchange_accuracy import interchange_accuracy
from distill.evaluation.variable_accuracy import variables_accuracy
from distill.interchange.mapping import Entry, Sides, entries_of
from distill.interchange.positions import PositionRule, Span
from distill.models.inputs import uncompiled
from distill.models.outputs import answered
from distill.models.trials import translated
from distill.objectives import DIITO
from distill.tasks.loading import task_of, training_rows
from distill.training.checks import check
from distill.training.resolve import feed_of, rows_seen_by
from distill.training.schedule import Schedule


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
    """Train, in place, the subspaces in which a frozen network holds the variables of a causal model.

    Every entry of the mapping is learned as it would be alone. `Rotation` is distributed alignment search,
    `BoundlessRotation` boundless; `Mask` is a differentiable binary mask over dims, or over the coordinates of another
    subspace; `PCA(dims)` is fitted to what the network computes, and not trained. Others, dims, and subspaces whose
    parameters take no gradient stay as they are. A search may end in a local optimum: start again with another
    `Rotation(k, seed=…)`.

    Args:
        causal_model: the hypothesis about what the network computes. Or another network, with data: then interchanges
            at both sides of the mapping must have the same effect (`DIITO`), and `positions` is a rule, as for `DIITO`.
        network: any torch model. Its weights and modes are as before afterwards.
        mapping: {variable: location or tuple of locations}, each location with a subspace.
        data: {name: tensor} of the causal model's inputs; by default it samples them.
        positions: which tokens of the locations, as `CausalModel.select` takes them: one choice for all, or {variable
            or location: choice}. None is all of them.
        eval_data: held-out rows to measure it on; by default examples that the causal model samples from another seed.
            Where `data` is given and these are not, it is measured on `data`, and its `overlap` is 1.
        weights: {term: weight}: `das`, and `size`, the share of the dims that masks and boundaries replace; 1 by
            default.
        steps: how many, of `batch_size` pairs of base and source each; the learning rate falls linearly.
        lr: by default 0.2 / √width: Adam moves each entry of a direction by about lr in a step.
        seed: of the examples that are trained and measured on.
        coldest: masks and boundaries are annealed, from their own temperature to this one, linearly.
        pairs: how many pairs to measure it on; 0 measures nothing.
        controls: of that measurement, as for `interchange_accuracy`.
        console: shows the progress; `rich.console.Console(quiet=True)` for none.
        accelerator: for mixed precision, several processes or trackers; `Accelerator()` by default.
        answers: which part of the output of a network is its answer, as for `fit`.

    Raises:
        DistillError: nothing to learn, a subspace wider than its location, or as `fit`.

    Geiger et al. 2023 (arXiv:2303.02536); Wu et al. 2023 (arXiv:2305.08809); Mueller et al. 2025 (arXiv:2504.13151).
    """
    causal_model, network = uncompiled(causal_model), uncompiled(network)
    with translated():
        entries, schedule = entries_of(mapping, causal_model, network, positions), schedule_of(steps, batch_size, seed)
    learning: dict[str, Any] = {"lr": lr, "weights": weights, "coldest": coldest, "accelerator": accelerator}
    learning |= {"console": console}
    measuring: dict[str, Any] = {"pairs": pairs, "controls": controls, "eval_data": eval_data}
    with answered((causal_model, network), answers), translated(), torch.inference_mode(False):  # it learns
        if isinstance(causal_model, CausalModel):
            return _align_variables(causal_model, network, entries, data, schedule=schedule, **measuring, **learning)
        return _align_networks(
            causal_model, network, entries, data, positions=positions, schedule=schedule, **measuring, **learning
        )


def _align_variables(
    causal_model: CausalModel,
    network: nn.Module,
    entries: tuple[Entry, ...],
    data: Any,
    *,
    schedule: Schedule,
    eval_data: Any,
    pairs: int,
    controls: str | Sequence[str],
    **learning: Any,
) -> Alignment:
    """Align a causal model with a network; the arguments are those of `align`."""
    feed = feed_of(causal_model, data, schedule)
    records = learn(feed.model, network, entries, feed, schedule, **learning)
    settings = {
        "steps": schedule.steps, "batch_size": schedule.batch_size, "seed": schedule.seed,
        "coldest": learning["coldest"], "weights": dict(learning["weights"] or {}),
        "lr": records[0].lr if records else None, "mapping": list(map(str, entries)),
    }  # fmt: skip
    seen = rows_seen_by(network, feed, schedule)
    measured = None
    if pairs:
        tested = (feed if isinstance(feed, Given) else None) if eval_data is None else eval_data
        measured = variables_accuracy(
            causal_model, network, entries, tested, pairs=pairs, seed=schedule.seed, controls=controls
        )
        if data is not None and eval_data is None:
            measured = replace(measured, overlap=1.0)
    return Alignment(entries, measured, tuple(records), settings, seen)


def _align_networks(
    teacher: nn.Module,
    network: nn.Module,
    entries: tuple[Entry, ...],
    data: Any,
    *,
    positions: PositionRule | None,
    eval_data: Any,
    pairs: int,
    controls: str | Sequence[str],
    schedule: Schedule,
    **learning: Any,
) -> Alignment:
    """Align two networks, both frozen: learn the subspaces at the second one's locations.

    The arguments are those of `align`.
    """
    taught = next((at for pair in entries for at in pair.teacher if isinstance(at.subspace, nn.Module)), None)
    if taught is not None and any(p.requires_grad for p in learned_of(taught.subspace)):
        raise DistillError(
            f"{taught} is on the teacher's side, where nothing is learned; give it dims=…, or a subspace that takes no "
            "gradient: subspace.requires_grad_(False)."
        )
    rule, task = Span(0.3) if positions is None else positions, None if data is None else task_of(data, teacher)
    rows = training_rows(data if task is None else task, teacher, schedule.seed, network)
    check(teacher, network, rows)
    seen = rows_seen_by(network, rows, schedule)
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
