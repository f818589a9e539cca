"""The training loop: a generator that makes one step at a time and yields its record."""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from rich.console import Console
from torch import Tensor, nn

from distill.causal.model import CausalModel
from distill.data.rows import Rows
from distill.data.task import Task
from distill.errors import DistillError, Unreachable, checked
from distill.interchange.mapping import Entry, Sides
from distill.models.inputs import (
    compiled_in_place,
    device_of,
    evaluating,
    innermost,
    is_placed,
    network_of,
    to_device,
)
from distill.models.outputs import cut_to_tokens, each_answered
from distill.models.pad_tokens import keep_pad_token
from distill.models.precision import upcast
from distill.models.trials import tried
from distill.objectives import Moment, Objective
from distill.objectives.term_weights import Weight
from distill.processes import first_error_named
from distill.teachers.passing import passing
from distill.teachers.served import Served
from distill.teachers.without_adapters import teacher_and_student
from distill.training.after_step import AfterStep, last_of, tell
from distill.training.checkpoints import Checkpoints
from distill.training.computation import alter_batch, groups_of
from distill.training.gradients import Wrapped
from distill.training.interruption import Interrupt, defer_interrupt
from distill.training.kept_answers import keeping
from distill.training.optimization.updates import clip, make_step, preparing
from distill.training.parallel.agreement import Agreement, refuse_different
from distill.training.parallel.engines import leaves_some, refuse_unfit, unused_found, with_ddp
from distill.training.parallel.half_precision import accelerator_of, computing_again
from distill.training.parallel.sharded import refuse_unfit_for_shards, shard_teacher, whole_afterwards
from distill.training.pending import Pending, steps_between_looks
from distill.training.progress import Plain, Record, show_progress
from distill.training.readings import duration, readings
from distill.training.resolve import Training, training_of
from distill.training.run_folder import hold_folder, until_done
from distill.training.schedule import Schedule, drawing
from interventions import Model


@checked
def steps(
    teacher: Model | Served | CausalModel | None,
    student: nn.Module,
    mapping: Sides | tuple[Entry, ...] | str | None = None,
    data: Any = None,
    *,
    objective: Objective | Sequence[Objective] | None = None,
    weights: Mapping[str, Weight] | None = None,
    schedule: Schedule | None = None,
    checkpoints: Checkpoints | None = None,
    accelerator: Accelerator | None = None,
    trained: nn.Module | None = None,
    answers: Any = None,
    cache: str | Path | None = None,
    top_k: int | None = None,
) -> Generator[Record, None, None]:
    """Train `student` in place and yield the record of each step; the body of the caller's loop is the callback.

    The arguments are those of `fit`; `schedule` holds the settings of duration and learning rate. `teacher=None` trains
    on labels alone. `trained` is a module to train instead of the student, e.g. the subspaces of the mapping; the
    student is then in eval mode.

    Raises:
        DistillError: before the first step, arguments that do not fit together; later, a loss that is not finite.
    """
    given, (teacher, student) = (teacher, student), teacher_and_student(teacher, student)
    answers = cut_to_tokens(teacher, student, answers)

    def run_steps() -> Generator[Record, None, None]:
        task = data if isinstance(data, Task) else None
        taught = keeping(teacher, cache, top_k, data, task, objective=objective, mapping=mapping, answers=answers)
        training = training_of(
            taught, student, mapping, data, objective=objective, weights=weights, schedule=schedule or Schedule(),
            trained=trained,
        )  # fmt: skip
        with compiled_in_place(*given), first_error_named(partial(last_of, checkpoints)):
            yield from train(replace(training, checkpoints=checkpoints), accelerator)

    yield from each_answered((teacher, student), answers, run_steps())


def train(
    training: Training, accelerator: Accelerator | None = None, interrupt: Interrupt | None = None
) -> Generator[Record, None, None]:
    """Train the modules of a training in place and yield the record of each step.

    Args:
        training: the training.
        accelerator: `Accelerator()` by default.
        interrupt: the signals that this process was sent; once a step is made, it knows of those of all processes.
    """
    schedule, learning = training.schedule, training.computation.learning
    with (
        accelerator_of(accelerator, schedule.precision) as chosen,
        computing_again(learning, wanted=schedule.gradient_checkpointing),
    ):
        yield from _train(training, chosen, interrupt or Interrupt())


def _train(training: Training, accelerator: Accelerator, interrupt: Interrupt) -> Generator[Record, None, None]:
    """Train the modules of a training with an accelerator; the arguments are those of `train`."""
    agreement = _agreement(training, accelerator, interrupt)
    computation, rows, schedule = training.computation, training.rows, training.schedule
    refuse_unfit(accelerator, computation)
    refuse_different(accelerator, training)
    checkpoints, processes, device = training.checkpoints, accelerator.num_processes, accelerator.device
    watch = training.watch
    (total, per_epoch), begun = duration(rows, schedule), list[nn.Module]()
    loss = training.loss
    with ExitStack() as modes:
        modes.callback(_keep_pad_tokens, begun)
        modes.callback(training.rewind)
        for model in (*computation.still, *computation.learning):
            modes.enter_context(evaluating(model))
        _move(device, computation)
        with upcast(computation, computation.still) if schedule.param_dtype == "float32" else nullcontext():
            leaves = _try_out(training, total / per_epoch, learns=with_ddp(accelerator))
            modes.enter_context(preparing(accelerator))
            wrapped, optimizer = _wrap(computation, schedule, accelerator, modes, leaves=leaves)
            done = 0 if checkpoints is None else checkpoints.begin(accelerator, training.writing, training.stream)
            if watch is not None:
                watch.begin(agreement, checkpoints)
        wrapping = Wrapped(training, wrapped, loss, agreement)
        begun += [each for each in computation.learning if any(p.requires_grad for p in each.parameters())]
        wrapped.train()
        pending = Pending(checkpoints, partial(tell, accelerator, watch))
        after_step = AfterStep(wrapped, agreement, pending, steps_between_looks(device), checkpoints, watch)
        clipped = [list(each.parameters()) for each in computation.clipped or (wrapped,)]
        numbers = range(done, done if watch is not None and watch.ended else total)
        share = accelerator.process_index, processes
        for number, read in zip(numbers, readings(rows, schedule, numbers, per_epoch, share), strict=True):
            _set_rate(optimizer, rate := schedule.rate(number, total))
            batch = to_device(read.batch, device)
            own = None if read.rows is None else to_device({"rows": read.rows}, device)["rows"]
            moment = Moment(own, number / per_epoch, total / per_epoch)
            try:
                value, terms = wrapping.backward(batch, moment, number, empty=read.empty)
            except Unreachable:
                pending.look()
                # Other processes do not save, and a stream is beyond the rows of this step.
                if checkpoints is not None and done < number and processes == 1 and training.stream is None:
                    checkpoints.save(number)
                raise
            if number == done:
                _check_learns(optimizer, terms)
            for each in clipped:
                clip(accelerator, each, schedule.clip)
            make_step(accelerator, optimizer)
            record = pending.add(number + 1, total, value, terms, lr=rate)
            after_step(record)
            yield record
            if record.stop is not None:
                break
        if watch is not None:
            watch.end()


def _agreement(training: Training, accelerator: Accelerator, interrupt: Interrupt) -> Agreement:
    """Return what the processes agree on: to stop, and when it is time for a checkpoint or an evaluation."""
    kept, watch = training.checkpoints, training.watch
    return Agreement(
        accelerator, interrupt, bool if kept is None else kept.is_overdue, bool if watch is None else watch.is_overdue
    )


def _wrap(
    computation: Any, schedule: Schedule, accelerator: Accelerator, after: ExitStack, *, leaves: bool
) -> tuple[Any, Any]:
    """Return a computation and its optimizer as accelerate wraps them; `after` undoes it.

    Args:
        computation: all runs of a step.
        schedule: makes the optimizer.
        accelerator: wraps both.
        after: is left when the training ends.
        leaves: whether some trained parameters get no gradient.
    """
    optimizer = schedule.optimizes(groups_of(computation, schedule), computation)
    computation.sharded = accelerator.distributed_type == DistributedType.FSDP
    if computation.sharded:
        refuse_unfit_for_shards(accelerator, computation)
        for teacher in (each for each in computation.still if each not in computation.learning):
            after.enter_context(shard_teacher(teacher, accelerator))
        whole = after.enter_context(whole_afterwards(computation))
    with unused_found(accelerator, some=leaves):
        wrapped, optimizer = accelerator.prepare(computation, optimizer)
    if computation.sharded:
        whole.let_go()
    optimizer.zero_grad()  # gradients that the caller left on the student
    after.callback(optimizer.zero_grad)
    return wrapped, optimizer


def _set_rate(optimizer: Any, rate: float) -> None:
    """Set the learning rate of each group of parameters to its own multiple of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


@contextmanager
def run_to_end(
    training: Training,
    networks: Sequence[Any],
    answers: Any,
    *,
    accelerator: Accelerator | None,
    title: str,
    console: Console | None,
) -> Iterator[tuple[tuple[Record, ...], float]]:
    """Run a training to its end and yield its records and duration [s]; its folder stays locked in the block.

    Args:
        training: the training; its folder holds the log and the checkpoints.
        networks: the networks that `answers` is for, as `answered` takes them.
        answers: the rule that takes the answer from the output of each network.
        accelerator: `Accelerator()` by default.
        title: the title of the progress.
        console: shows the progress.
    """
    began = time.monotonic()
    with ExitStack() as folder:
        with defer_interrupt() as interrupt, first_error_named(partial(last_of, training.checkpoints)):
            folder.enter_context(hold_folder(training.folder))
            with closing(each_answered(networks, answers, train(training, accelerator, interrupt))) as records:
                done = until_done(show_progress(records, title, console or Plain()), training.folder, interrupt)
        yield tuple(done), time.monotonic() - began


def _keep_pad_tokens(trained: Sequence[nn.Module]) -> None:
    """Keep the pad token of each trained model in its configuration."""
    for model in trained:
        keep_pad_token(innermost(model))


def _move(device: torch.device, computation: Any) -> None:
    """Move the models to a device, but for those that are there, are elsewhere, or were placed by accelerate."""
    for model in (*computation.still, computation):
        is_elsewhere = isinstance(model, Served) and not (isinstance(model.model, nn.Module) and not model.remote)
        if not is_elsewhere and device_of(model) != device and not is_placed(model):
            network_of(model).to(device)


def _try_out(training: Training, epochs: float, *, learns: bool) -> bool:
    """Let the objectives prepare, then compute one step without learning, so that errors come before the training.

    Returns:
        Whether some trained parameters get no gradient; looked for if `learns` is set, else False.
    """
    computation, rows, seed = training.computation, training.rows, training.schedule.seed
    few, device = torch.arange(min(2, len(rows))), device_of(computation)
    batch: Mapping[str, Tensor] = to_device(rows.batch(few), device)
    moment = Moment(few.to(device) if isinstance(rows, Rows) else None, epochs=epochs)
    trial = tried("the trial step", given=batch)
    fresh = training.writing is not None and training.writing.is_fresh(-1, 0.0, is_trial=True)
    with (
        trial,
        passing(samples=fresh),
        evaluating(computation),
        torch.no_grad(),
        drawing(seed, -1, device) as generator,
    ):
        if training.writing is not None:
            batch = training.writing.write(batch, few, -1, 0.0, is_trial=True)
        batch = alter_batch(computation.objectives, batch, generator)
        computation.prepare(batch, generator, rows, moment)
        computation.objectives.to(device)
        with torch.set_grad_enabled(learns):
            value = training.loss(computation(batch, generator, moment))
            return learns and leaves_some(computation, value)


def _check_learns(optimizer: Any, terms: Mapping[str, Tensor]) -> None:
    """Raise DistillError if the loss depends on none of the trained parameters."""
    if all(parameter.grad is None for group in optimizer.param_groups for parameter in group["params"]):
        raise DistillError(
            f"none of the parameters that are trained has a gradient, as the loss ({', '.join(terms)}) does not depend "
            "on them; train what the student computes with: trained=None, or the subspaces of the mapping."
        )
