"""`fit`: a training run to its end, with checkpoints, evaluation, and everything saved."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from distill.alignment.after_kd import SEARCH, FoundMapping, mapping_for
from distill.causal.model import CausalModel
from distill.data.classes import Ranked
from distill.data.draws import batch_size_of
from distill.data.rows import Rows
from distill.data.task import Task
from distill.errors import checked
from distill.evaluation.progress import measurements_shown
from distill.interchange.mapping import Entry, Sides
from distill.models.class_names import name_classes, real_names
from distill.models.inputs import compiled_in_place
from distill.models.numbering import numbered_as
from distill.models.outputs import answered, cut_to_tokens
from distill.models.preprocessors import given_preprocessors, preprocessors_for, tokenizer_among
from distill.models.pretrained import save_model
from distill.monitoring.held_out import read_held_out
from distill.monitoring.monitor import EVAL_ROWS, Watched, best_after, finishing, known_of, monitor_of, watched_by
from distill.objectives import Objective
from distill.objectives.term_weights import Weight, describe_function
from distill.processes import is_first
from distill.results import FitResult
from distill.tasks.loading import task_of
from distill.tasks.named import texts_read, tokenizer_of
from distill.tasks.streams import streamed
from distill.teachers.served import Served
from distill.teachers.without_adapters import teacher_and_student
from distill.training import loop
from distill.training.checkpoints import KEPT, STEPS
from distill.training.kept_answers import keeping
from distill.training.progress import Plain
from distill.training.resolve import Training, rows_for, training_of
from distill.training.run_folder import AT_START, STUDENT, Resume, refuse_used_unless_resumed
from distill.training.schedule import Schedule
from distill.writing.generation import reads_by_encoder
from distill.writing.prompts import as_tokens
from distill.writing.written import Written, data_of, over
from interventions import Model, renamed


@renamed(save_steps="every")
@checked
def fit(
    teacher: Model | Served | CausalModel | None,
    student: nn.Module,
    mapping: Sides | tuple[Entry, ...] | str | None = None,
    data: Any = None,
    *,
    objective: Objective | Sequence[Objective] | None = None,
    weights: Mapping[str, Weight] | None = None,
    eval_data: Any = None,
    epochs: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: Any = None,
    schedule: Schedule | None = None,
    output_dir: str | Path | None = None,
    resume: Resume = False,
    every: int | str = STEPS,
    console: Console | None = None,
    title: str = "fit",
    accelerator: Accelerator | None = None,
    answers: Any = None,
    tokenizer: Any = None,
    cache: str | Path | None = None,
    top_k: int | None = None,
    keep: int = KEPT,
    eval_every: int | str | None = None,
    eval_rows: int = EVAL_ROWS,
    pairs: int | None = None,
    save_best: bool | str = False,
    early_stopping: int | None = None,
    callbacks: Any = (),
    track: Any = (),
) -> FitResult:
    """Train `student` in place to compute like `teacher`, and measure how far it does.

    Args:
        teacher: any torch model; its weights, buffers and modes are as before afterwards. None trains on labels alone.
            A model of nnsight runs on this machine; `Served` calls one on another machine, and keeps its answers.
            Or a causal model, which samples its own inputs: `fit(causal_model, network, mapping)` is interchange
            intervention training.
        student: any torch model with the same inputs and classes.
        mapping: {teacher side: student side}, "full", "middle", "late" or "single"; "full" by default. {} interchanges
            nothing, and measures no interchange accuracy. "search" takes the best one that `search_mapping` finds with
            a copy of the student after its first steps (at most 200) by KD alone; a resumed run keeps what it found.
        data: a Task or the name of one ("pvr", "agreement", …), a file, rows in any form that `Rows.of` takes, or
            "random". Labels that have names are numbered as the teacher, or else the student, numbers its classes
            (`config.id2label`); a student without names gets those that it learned. For a causal model {name: tensor}
            of its inputs; columns of other variables are checked.
        objective: one or several; by default `[KD(), DIITO()]`, with `mapping={}` `KD()`, for a causal model `IIT()`.
        weights: {term: weight}, a number or a function of the share of the training that is done, as `Ramp(4, 1)`. A
            term that is not named has the weight of its method: 1 for most (`distill objectives` lists the others).
        eval_data: held-out rows, a file of them or a Task; by default the test rows of `data`, if that is a task, or
            examples that a causal model samples.
        epochs, steps, batch_size, lr, seed: override those of `schedule`.
        schedule: steps, batches and learning rate (see `Schedule`); by default that of an embedded task, else
            `Schedule()`.
        output_dir: a new folder for the student, checkpoints, log and result; None saves nothing.
        resume: go on from the newest whole checkpoint in `output_dir`, or anew where there is none; the result is that
            of an uninterrupted run, also with another number of processes. Data, models, settings and versions must be
            those that it was started with;
            `resume="anyway"` accepts others too, and warns of them. `resume="auto"` starts where the folder is new, and
            continues where it is not, so that a command may be started again as it is.
        every: the interval between two checkpoints, a number of steps or a time as "10 minutes". The last step has one
            too.
        console: shows the progress; `rich.console.Console(quiet=True)` shows none.
        title: of the progress bar.
        accelerator: for mixed precision, several processes or trackers; `Accelerator()` by default.
        answers: which part of a model's output is its answer: a name, an index or a function from the output to a
            tensor; for teacher and student apart a tuple of two or {"teacher": …, "student": …}. None is
            `output.logits`, the output itself if it is a tensor, or the only tensor in it that is no scalar, as in
            (logits, loss). Objectives that compare features alone, as `FitNets`, need no answer.
        tokenizer: the preprocessor of the data (a tokenizer, image processor, feature extractor or processor, or
            several), saved beside the student; by default that of the task, else the one saved with the teacher.
        cache: a folder in which the teacher's answers are kept, so that it answers each row once: the epochs after the
            first, resumed and repeated runs read them (see `Served`). In the first epoch the student is that of a
            training without it, bit for bit where all logits are kept; later, up to the rounding of the teacher in
            batches of other rows. Counterfactuals (`DIITO`) and activations (`FitNets`, …) need the teacher in each
            step. The evaluation is by the teacher itself.
        top_k: how many of the largest logits are kept in the cache, by the temperature of the first objective that has
            one; the probability of the others is spread evenly among them. None keeps all.
        keep: how many of the newest checkpoints stay; that of the best step stays beside them.
        eval_every: the interval between two evaluations on held-out rows, a number of steps or a time as "10 minutes",
            and after the last step; None evaluates the trained student alone. Evaluations change no bit of the
            training. They are in the records, in the log, in `result.history`, and on the console.
        eval_rows: the number of held-out rows that these evaluations take at most, the same in all of them; with a
            mapping at most 100 pairs are interchanged.
        pairs: how many pairs of base and source the trained student is measured on; 0 measures no interchange accuracy.
            None chooses 100 to 2,000 by the rows of all steps and the number of mapped places, so that measuring takes
            about a third of the training at most, and none where neither an objective interchanges nor a mapping was
            given.
        save_best: train to the end and return the student of the best evaluation; its checkpoint stays. The name of the
            figure to compare, "perplexity", "kl", "mse" or "error" (lower is better), "accuracy", "micro_f1",
            "macro_f1", "exact_match", "pearson", "spearman", "agreement" or "iia" (higher); True takes the first of
            perplexity, accuracy, micro_f1, mse, kl, iia and error that there is. Among equal ones
            the first is the best, and one that is no number never is.
        early_stopping: end the training after so many evaluations in a row that were not better than the best one.
        callbacks: functions, or objects with `__call__`, that are called with the record of each step, in each
            process. One that returns "stop" or raises StopIteration ends the training; any other error is raised
            after the state was saved in `output_dir`.
        track: names of trackers that accelerate knows, as ["tensorboard", "wandb", "mlflow"], or objects with the
            methods of `accelerate.tracking.GeneralTracker`. They are given the settings, each record, each evaluation
            and the final figures.

    Raises:
        DistillError: before the first step, arguments that do not fit together, or a folder that another run writes
            to; later, a loss that is not finite.
        Interrupted: Ctrl-C, after the state was saved in `output_dir`.
    """
    given_models, networks = (teacher, student), teacher_and_student(teacher, student)
    teacher, student = networks
    overrides: dict[str, Any] = {"epochs": epochs, "steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed}
    wanted = Watched(eval_every, eval_rows, save_best, early_stopping)
    refuse_used_unless_resumed(output_dir, resume)
    with answered(networks, answers := cut_to_tokens(*networks, answers, tokenizer)):
        task, read = _read(teacher, student, data, tokenizer)
        schedule = choose_schedule(schedule, overrides, teacher, data_of(read))
        taught = keeping(teacher, cache, top_k, read, task, objective=objective, mapping=mapping, answers=answers)
        read, mapping, found = _search(mapping, networks, read, schedule, known=resume and output_dir, console=console)
        training = training_of(taught, student, mapping, read, objective=objective, weights=weights, schedule=schedule)
        tested = read_held_out(training, networks, eval_data, data, task,
                               mapping=mapping, answers=answers, tokenizer=tokenizer, pairs=pairs)  # fmt: skip
    watch = monitor_of(wanted, tested, callbacks, track, title=title, folder=output_dir, resume=resume)
    training = watched_by(watch, training.kept(
        output_dir, _settings(training, answers, found, wanted) | _kept_by(taught, top_k), _networks(teacher, student),
        tokenizer=None if task is None else task.tokenizer, resume=resume, every=every, keep=keep))  # fmt: skip
    trained_on, place = training.seen, None if training.folder is None else training.folder.path
    running = loop.run_to_end(training, networks, answers, accelerator=accelerator, title=title, console=console)
    with finishing(watch), compiled_in_place(*given_models), running as (records, seconds):
        _name_and_save(training, teacher, student, place, partial(preprocessors_for, tokenizer, task, *networks))
        with measurements_shown(console or Plain(), title):
            evaluation = tested.measure(known=known_of(watch)).evaluation.marked(training.settings["kinds"])
        best = best_after(watch, evaluation)
        result = FitResult(student, records, evaluation, training.settings, seconds, place, trained_on, best)
        return _saved(result, teacher, training)


def read_task(teacher: Any, student: nn.Module, data: Any, tokenizer: Any) -> Task | None:
    """Return the task that the data is or names, with labels numbered as the models' classes; None for other data.

    That of `Written` is the task of its prompts.
    """
    data = data_of(data)
    if data is None or isinstance(teacher, CausalModel):
        return None
    known = student if teacher is None else teacher
    reads = tokenizer_among(given_preprocessors(tokenizer))
    task = task_of(data, known, reads)
    return None if task is None else numbered_as(task, known, student)


def _read(teacher: Any, student: nn.Module, data: Any, tokenizer: Any) -> tuple[Task | None, Any]:
    """Return the task that the data is, if it is one, and what is trained on: the task, or data with its texts read."""
    data = _read_prompts(teacher, student, data, tokenizer)
    task = read_task(teacher, student, data, tokenizer)
    return task, _read_texts(teacher, student, data, tokenizer) if task is None else over(data, task)


def _read_texts(teacher: Any, student: nn.Module, data: Any, tokenizer: Any) -> Any:
    """Return texts and chats in memory as the rows that a language model reads; other data as it is."""
    if isinstance(teacher, CausalModel):
        return data
    reads, known = tokenizer_among(given_preprocessors(tokenizer)), student if teacher is None else teacher
    return over(data, texts_read(streamed(data_of(data), known, reads), known, reads))


def _read_prompts(teacher: Any, student: nn.Module, data: Any, tokenizer: Any) -> Any:
    """Return `Written` over prompts that are texts alone as over rows of tokens; other data as it is."""
    if not isinstance(data, Written) or isinstance(teacher, CausalModel):
        return data
    reads, known = tokenizer_among(given_preprocessors(tokenizer)), student if teacher is None else teacher
    by_encoder = reads_by_encoder(student)
    return over(data, as_tokens(data_of(data), lambda: reads or tokenizer_of(known), by_encoder=by_encoder))


def choose_schedule(schedule: Schedule | None, overrides: Mapping[str, Any], teacher: Any, data: Any) -> Schedule:
    """Return the schedule of the caller, or the default one of the data, with single settings overridden.

    Args:
        schedule: of the caller; None takes the default.
        overrides: {name of a setting: value}; None leaves the setting.
        teacher: a causal model has a default schedule of its own.
        data: a Task has a schedule, a DataLoader a batch size.
    """
    changes = dict(overrides)
    if isinstance(data, DataLoader) and schedule is None:
        changes["batch_size"] = overrides["batch_size"] or batch_size_of(data)
    if schedule is None and isinstance(teacher, CausalModel):
        schedule = Schedule(batch_size=256, lr=1e-3)
    schedule = schedule or default_schedule(data if isinstance(data, Task) else None)
    if overrides["epochs"] is not None and overrides["steps"] is None:
        schedule = replace(schedule, steps=None)
    return replace(schedule, **{name: value for name, value in changes.items() if value is not None})


def _search(
    mapping: Any, networks: Sequence[Any], data: Any, schedule: Schedule, *, known: Any, console: Console | None
) -> tuple[Any, Any, FoundMapping | None]:
    """Return the data, the mapping, and what a search found on the data where the mapping is searched.

    Args:
        mapping: as `fit` takes it.
        networks: teacher and student.
        data: as it was read.
        schedule: of the training.
        known: a folder that may hold what was found before; else false.
        console: shows the search.
    """
    if not isinstance(mapping, str) or mapping != SEARCH:
        return data, mapping, None
    teacher, student = networks
    rows = over(data, rows_for(teacher, student, data, schedule))
    folder = Path(known) if known else None
    found = mapping_for(teacher, student, rows, schedule, resumed=folder, console=console)
    return rows, found.sides, found


def _saved(result: FitResult, teacher: Any, training: Training) -> FitResult:
    """Write the result of a training into its folder, if it has one, and return it; the first process writes."""
    if result.output_dir is not None and is_first():
        rows = len(training.rows) if isinstance(training.rows, Rows) and training.rows.stream is None else None
        result.save(result.output_dir, teacher=teacher, rows=rows)
    return result


def _settings(training: Training, answers: Any, found: FoundMapping | None, wanted: Watched) -> dict[str, Any]:
    """Return the settings of a training as plain data, which its folder keeps."""
    settings = {
        "schedule": training.schedule.to_dict(),
        "objective": [repr(each) for each in training.objectives],
        "weights": training.weights_as_text,
        "mapping": [str(entry) for entry in training.entries],
        **({} if found is None else {SEARCH: found.settings}),
        **({} if training.writing is None else {"written": training.written_as_text}),
        "evaluations": wanted.settings,
        "kinds": [repr(kind) for each in training.objectives for kind in getattr(each, "kinds", ())],
    }
    return (
        settings
        if answers is None
        else settings | {"answers": json.loads(json.dumps(answers, default=describe_function))}
    )


def _name_and_save(
    training: Training, teacher: Any, student: nn.Module, place: Path | None, reads: Callable[[], Any]
) -> None:
    """Name the classes that the student learned; save it, where there is a place, with what makes its inputs."""
    rows = training.rows if isinstance(training.rows, Rows) else None
    if rows is not None:
        name_classes(student, _names(teacher, rows))
    if place is not None and is_first():
        save_model(student, place / STUDENT, reads(), None if rows is None else training.seen)


def _kept_by(teacher: Any, top_k: int | None) -> dict[str, Any]:
    """Return the settings of the answers that a training with a cache learns from, if they are not all logits."""
    return {} if top_k is None else {"top_k": top_k, "kept at temperature": teacher.keep.temperature}


def _networks(teacher: Any, student: nn.Module) -> dict[str, Any]:
    """Return the networks by which a folder recognizes its run; a causal teacher is recognized with its data."""
    if isinstance(teacher, CausalModel):
        return {}
    return {"teacher": teacher, f"student {AT_START}": student}


def _names(teacher: Any, rows: Rows) -> tuple[str, ...] | None:
    """Return the names of the classes that a student learned; None where they have none."""
    names = None if teacher is None else real_names(teacher)
    return names if names is not None or isinstance(rows.classes, Ranked) else rows.classes


def default_schedule(task: Task | None) -> Schedule:
    """Return the schedule of an embedded task's student; for other data three epochs."""
    return Schedule() if task is None or task.network is None else Schedule.of(task.student or task.recipe)
