"""Deep mutual learning: networks that train together, each on the answers of the others at the time.

The loss of network i is its own loss, cross-entropy by default, plus the mean over its teachers j of the loss that
compares the two, KL divergence by default:

    L_i = CE(z_i, y) + 1/(n − 1) Σ_j KL(p_j ‖ p_i).

Zhang, Xiang, Hospedales, Lu 2017 (arXiv:1706.00384), sections 2.2 and 2.3.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from distill.data.classes import Ranked
from distill.data.rows import Rows
from distill.errors import DistillError, checked
from distill.evaluation.evaluate import Evaluation, evaluate
from distill.fit import default_schedule
from distill.interchange.mapping import Entry, Sides, as_mapping, depth, entries_of, layer_mapping
from distill.models.class_labels import has_classes
from distill.models.class_names import name_classes
from distill.models.inputs import TEACHERS, uncompiled
from distill.models.numbering import numbered_as
from distill.models.outputs import answered
from distill.models.preprocessors import given_preprocessors, preprocessors_for, tokenizer_among
from distill.models.pretrained import save_model
from distill.monitoring.held_out import HeldOut
from distill.monitoring.monitor import Monitor, Watched, finishing, monitor_of, watched_by
from distill.objectives import KD, Labels, Moment, Objective
from distill.objectives.term_weights import Weight
from distill.processes import is_first
from distill.results import FitResult
from distill.storage.files import write, write_json
from distill.tasks.loading import rows_to_measure, task_of, training_rows
from distill.tasks.named import texts_read
from distill.teachers.without_adapters import refuse_shared
from distill.training import loop
from distill.training.checkpoints import LOG, STEPS, lines_of
from distill.training.checks import check, check_together
from distill.training.mutual_computation import Edge, Together
from distill.training.progress import Record
from distill.training.resolve import Training, keep_supported, objectives_of, resolve_mapping
from distill.training.run_folder import AT_START, SETTINGS, STUDENT, Resume
from distill.training.schedule import Schedule, weigh
from interventions import renamed
from interventions import shown as shown_value

_ANEW = "networks that learn together answer anew in each step, and nothing of it comes back; leave it out"
_NO_BEST = (
    "there are several students, and no one evaluation is the best for all; measure them in a callback, "
    "callbacks=[lambda record: …], or after the training: evaluate(None, network, None, rows)"
)
OTHERS = {
    **dict.fromkeys(("cache", "top_k"), _ANEW),
    **dict.fromkeys(("eval_every", "eval_rows", "save_best", "early_stopping"), _NO_BEST),
    **dict.fromkeys(("epochs", "steps", "batch_size", "lr", "seed"), "say it in the schedule: schedule=Schedule(…)"),
}
"""Arguments of `fit` that `mutual` refuses, and why."""


@renamed(save_steps="every")
@checked
def mutual(
    networks: Sequence[Any],
    data: Any = None,
    *,
    objective: Objective | Sequence[Objective] | None = None,
    own: Objective | Sequence[Objective] | None = None,
    edges: Iterable[Edge] | None = None,
    mapping: Sides | Mapping[Edge, Sides | str] | str | None = None,
    weights: Mapping[str, Weight] | None = None,
    eval_data: Any = None,
    schedule: Schedule | None = None,
    output_dir: str | Path | None = None,
    resume: Resume = False,
    every: int | str = STEPS,
    console: Console | None = None,
    title: str = "mutual",
    accelerator: Accelerator | None = None,
    answers: Any = None,
    tokenizer: Any = None,
    callbacks: Any = (),
    track: Any = (),
    **others: Any,
) -> tuple[FitResult, ...]:
    """Train networks together, in place: each on its own objectives and on the answers of its teachers among them.

    The loss of network i is Σ own terms + the mean over its teachers j of the terms of `objective`, with the run of j
    on the same batch, detached, as that of the teacher. By default CE(z_i, y) + 1/(n − 1) Σ_j KL(p_j ‖ p_i). All
    networks are in train mode, run once a step, and step at the same time; the paper's algorithm 1 lets them step in
    turn, each after a new run. One optimizer holds all parameters, which is as one each: AdamW, Adam and SGD treat
    every parameter by itself, and gradients are clipped network by network.

    Zhang, Xiang, Hospedales, Lu 2017 (deep mutual learning, arXiv:1706.00384), sections 2.2 and 2.3.

    Args:
        networks: of the same inputs and classes.
        data: as `fit` takes it, for networks.
        objective: compares a network with a teacher; `KD(1.0)` by default. An objective with parameters or a memory of
            its own is copied for each edge.
        own: objectives of each network without a teacher; `Labels()` by default, `[]` for none.
        edges: pairs (teacher, student) of numbers of networks; all ordered pairs by default. `[(0, 1)]` is a teacher
            that is trained on the labels while the student learns from it.
        mapping: for objectives that interchange: as `fit` takes it, or one for each edge, `{(0, 1): "full"}`. By
            default "full", from whichever of the two is deeper.
        weights: {term: weight}: "kd" weighs it in all networks, "kd.1" in network 1 alone.
        eval_data: held-out rows or a Task; by default the test rows of `data`, if that is a task.
        schedule: as `fit` takes it.
        output_dir: a new folder for checkpoints and log, with one in it for each network: `0`, `1`, …
        resume: resume from the newest checkpoint in `output_dir`, as `fit` does.
        every: the interval between two checkpoints, as for `fit`.
        console, title, accelerator, tokenizer: as `fit` takes them.
        answers: which part of the output of a network is its answer, as `fit` takes it; a list has one for each
            network.
        callbacks, track: as `fit` takes them; the numbers are those of all networks.
        others: other arguments of `fit`, which are refused.

    Returns:
        A result for each network, its terms by their plain names.

    Raises:
        DistillError: before the first step, arguments that do not fit together; later, a loss that is not finite.
        Interrupted: Ctrl-C, after the state was saved in `output_dir`.
    """
    networks = [uncompiled(each) for each in networks]
    _check_networks(networks, others)
    with answered(networks, answers):
        reads = tokenizer_among(given_preprocessors(tokenizer))
        task = None if data is None else task_of(data, networks[0], reads)
        schedule = schedule or default_schedule(task)
        task = None if task is None else numbered_as(task, *networks)
        read = texts_read(data, networks[0], reads) if task is None else task
        rows = training_rows(read, networks[0], schedule.seed, *networks[1:])
        training = _training(
            networks, rows, objective, own, _edges(edges, len(networks)), mapping=mapping, weights=weights,
            schedule=schedule,
        )  # fmt: skip
        tested = rows_to_measure(eval_data, data, task, rows, *networks, tokenizer=reads)
        if tested is not None and has_classes(tested):
            for network in networks:
                check(None, network, tested)
    started = {f"network {number} {AT_START}": each for number, each in enumerate(networks)}
    training = training.kept(
        output_dir, training.settings, started, tokenizer=None if task is None else task.tokenizer, resume=resume,
        every=every,
    )  # fmt: skip
    watch = _watch(training, networks[0], (callbacks, track), title=title, folder=output_dir, resume=resume)
    trained_on, training = training.seen, watched_by(watch, training)
    running = loop.run_to_end(training, networks, answers, accelerator=accelerator, title=title, console=console)
    with finishing(watch), running as (records, seconds):
        names, results = None if isinstance(rows.classes, Ranked) else rows.classes, []
        for number, network in enumerate(networks):
            place = None if training.folder is None else training.folder.path / str(number)
            name_classes(network, names)
            evaluation = _evaluate(network, tested, networks, answers)
            own_records = _own(records, number, training)
            results.append(FitResult(network, own_records, evaluation, training.settings, seconds, place, trained_on))
        if is_first():
            for result in results:
                _save(result, preprocessors_for(tokenizer, task, result.student, networks[0]))
    return tuple(results)


def _watch(training: Training, network: nn.Module, called: tuple[Any, Any], **settings: Any) -> Monitor | None:
    """Return the monitor of a training, which measures nothing; `called` are the callbacks and trackers of a call."""
    unmeasured = HeldOut(training, None, network, None, {}, None)
    return monitor_of(Watched(), unmeasured, *called, **settings)


def _refuse_others(others: Mapping[str, Any]) -> None:
    """Raise DistillError for arguments of `fit` that networks which learn together have no use for, TypeError else."""
    for name in others:
        if name in OTHERS:
            raise DistillError(f"mutual(…, {name}=…): {OTHERS[name]}.")
        raise TypeError(f"mutual() got an unexpected keyword argument {name!r}")


def _training(
    networks: Sequence[nn.Module],
    rows: Rows,
    objective: Objective | Sequence[Objective] | None,
    own: Objective | Sequence[Objective] | None,
    arrows: tuple[Edge, ...],
    *,
    mapping: Sides | Mapping[Edge, Sides | str] | str | None,
    weights: Mapping[str, Weight] | None,
    schedule: Schedule,
) -> Training:
    """Return the training of networks that learn together, checked, with its settings as plain data.

    Args:
        networks: those that learn.
        rows: the data.
        objective, own, mapping, weights: as for `mutual`.
        arrows: the pairs (teacher, student).
        schedule: of the training.
    """
    lessons, mine, left_out = _objectives(objective, own, rows)
    pairs = {edge: _pairs(networks, edge, mapping, lessons) for edge in arrows}
    _check(networks, rows, pairs)
    idle = next((n for n in range(len(networks)) if not mine and n not in {student for _, student in arrows}), None)
    if idle is not None:
        raise DistillError(
            f"network {idle} has no teacher and no objective of its own, so it learns nothing; give own=[Labels()], or "
            "use fit with it as the teacher."
        )
    for_all = {name: weight for name, weight in (weights or {}).items() if not _is_numbered(name)}
    gone = [f"{name}.{number}" for name in left_out for number in range(len(networks))]
    computation = Together(networks, lessons, mine, pairs, {n: w for n, w in for_all.items() if n not in left_out})
    training = Training(
        computation, rows, schedule, [*lessons, *mine], weights=dict(weights or {}), left_out=[*gone, *for_all]
    )
    settings = {
        "networks": len(networks),
        "schedule": schedule.to_dict(),
        "objective": [repr(each) for each in lessons],
        "own": [repr(each) for each in mine],
        "edges": [list(edge) for edge in arrows],
        "weights": training.weights_as_text,
        "mapping": {f"{j} to {i}": [str(pair) for pair in found] for (j, i), found in pairs.items()},
    }
    return replace(training, settings=settings)


def _evaluate(network: nn.Module, tested: Rows | None, networks: Sequence[nn.Module], answers: Any) -> Evaluation:
    """Evaluate a network on held-out rows, if there are any; where that fails, the note says why."""
    if tested is None:
        return Evaluation(None, None)
    with answered(networks, answers):
        try:
            return evaluate(None, network, None, tested)
        except DistillError as nothing:
            return Evaluation(None, None, f"nothing was measured: {nothing}")


def _check_networks(networks: Sequence[Any], others: Mapping[str, Any]) -> None:
    """Raise DistillError where there are no networks, one is none, one is there twice, or two share weights.

    Args:
        networks: those that learn.
        others: arguments that are refused first.
    """
    _refuse_others(others)
    wrong = next((each for each in networks if not isinstance(each, nn.Module)), None)
    if wrong is not None or not networks:
        what = "no networks" if not networks else f"{type(wrong).__name__}, which is no network"
        raise DistillError(f"mutual was given {what}; give torch modules, e.g. mutual([one, other], data).")
    if len({id(each) for each in networks}) < len(networks):
        raise DistillError(
            "mutual was given one network twice, which would teach itself; make another, e.g. copy.deepcopy(network)."
        )
    refuse_shared(networks, "mutual")


def _objectives(
    objective: Objective | Sequence[Objective] | None, own: Objective | Sequence[Objective] | None, rows: Rows
) -> tuple[list[Objective], list[Objective], tuple[str, ...]]:
    """Return the objectives with a teacher, those without, and the terms that the data has too few columns for."""
    lessons = objectives_of(KD(1.0) if objective is None else objective, None)
    mine = [] if isinstance(own, list | tuple) and not own else objectives_of(Labels() if own is None else own, None)
    kept, left_out = keep_supported([*lessons, *mine], rows)
    known = {id(each) for each in kept}
    return [e for e in lessons if id(e) in known], [e for e in mine if id(e) in known], left_out


def _edges(edges: Iterable[Edge] | None, count: int) -> tuple[Edge, ...]:
    """Return the pairs (teacher, student) as tuples; all ordered pairs for None.

    Raises:
        DistillError: a pair that is none, is there twice, or has a number that no network has.
    """
    if edges is None:
        return tuple(permutations(range(count), 2))
    if not isinstance(edges, Iterable) or isinstance(edges, str | nn.Module | torch.Tensor):
        raise DistillError(f"mutual(edges={shown_value(edges)}) are no pairs of networks; give e.g. edges=[(0, 1)].")
    found = [tuple(edge) if isinstance(edge, tuple | list) else (edge,) for edge in edges]
    for edge in found:
        known = _is_edge(edge) and all(0 <= end < count for end in edge)
        if not known or edge[0] == edge[1] or found.count(edge) > 1:
            raise DistillError(
                f"edges={found}: {edge} is no pair (teacher, student) of two different networks from 0 to "
                f"{count - 1}, each pair once; e.g. edges=[(0, 1)]."
            )
    return tuple((teacher, student) for teacher, student in found)


def _pairs(
    networks: Sequence[nn.Module],
    edge: Edge,
    mapping: Sides | Mapping[Edge, Sides | str] | str | None,
    objectives: Sequence[Objective],
) -> tuple[Entry, ...]:
    """Return the mapping of an edge; the full one maps the layers of the deeper network onto the other."""
    teacher, student = (networks[number] for number in edge)
    own: Any = mapping
    if isinstance(mapping, Mapping) and all(isinstance(key, tuple) and _is_edge(key) for key in mapping):
        own = mapping.get(edge)
    if own is None and not any(each.interchanges for each in objectives):
        return ()
    if own in (None, "full") and depth(teacher) < depth(student):
        sides = as_mapping(entries_of(layer_mapping(student, teacher, "full"), student, teacher))
        return entries_of({shallow: deep for deep, shallow in sides.items()}, teacher, student)
    return resolve_mapping(teacher, student, own, objectives)


def _is_edge(key: tuple[Any, ...]) -> bool:
    """Return whether it is a pair of whole numbers."""
    return len(key) == 2 and all(isinstance(end, int) for end in key)


def _check(networks: Sequence[nn.Module], rows: Rows, pairs: Mapping[Edge, tuple[Entry, ...]]) -> None:
    """Raise DistillError where the networks and the data do not fit together."""
    apart = next((name for name in rows.columns if name.startswith(TEACHERS)), None)
    if apart is not None:
        raise DistillError(
            f"the data has {apart!r}, a column for a teacher alone, and networks that learn together read the same; "
            "leave it out."
        )
    check_together(networks, pairs, rows)


def _is_numbered(name: str) -> bool:
    """Return whether a term is that of one network, as "kd.1"."""
    return name.rpartition(".")[2].isdigit() and "." in name


def _own(records: Sequence[Record], number: int, training: Training) -> tuple[Record, ...]:
    """Return the records of one network: its terms by their plain names, and its loss."""
    per_epoch = training.schedule.per_epoch(len(training.rows))
    numbered = {name: weight for name, weight in training.weights.items() if _is_numbered(name)}
    weights = {**training.computation.objectives[number].weights, **numbered}
    return tuple(_part(record, number, weights, per_epoch) for record in records)


def _part(record: Record, number: int, weights: Mapping[str, Weight], per_epoch: int) -> Record:
    """Return the part of a record that is about one network."""
    mine = {name: torch.tensor(value) for name, value in record.terms.items() if name.endswith(f".{number}")}
    progress = Moment(None, (record.step - 1) / per_epoch, record.total / per_epoch).progress
    loss = weigh(mine, {name: weight for name, weight in weights.items() if name in mine}, progress)
    terms = {name.rpartition(".")[0]: record.terms[name] for name in mine}
    return replace(record, loss=loss.item(), terms=terms)


def _save(result: FitResult, preprocessors: Sequence[Any]) -> None:
    """Save one network as `fit` does: the network, its log, the settings and the result."""
    folder = result.output_dir
    if folder is None:
        return
    save_model(result.student, folder / STUDENT, preprocessors, result.seen)
    write_json(folder / SETTINGS, result.settings)
    write(folder / LOG, lines_of(list(result.records)))
    result.save(folder)
