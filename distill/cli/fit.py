"""`distill fit`: students of one teacher, trained, compared with it on held-out rows, and reported."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from distill.alignment.after_kd import SEARCH, search_after_kd
from distill.alignment.mapping_search import mapping_as_text
from distill.alignment.search_mapping import CONTROLS
from distill.cli.fit_command import COMMAND, FitCommand
from distill.cli.loading import load_task_and_teacher
from distill.cli.options.config import RUN
from distill.cli.report import ComparedModel, Report, compared_model, print_report, teacher_evaluation
from distill.cli.samples import Sample, samples_of
from distill.cli.student_runs import TIMES, StudentRuns
from distill.cli.students import UNTRAINED, is_language
from distill.comparison.compare import compare
from distill.comparison.comparison import Comparison
from distill.data.task import Task
from distill.errors import DistillError
from distill.evaluation.evaluate import Evaluation
from distill.evaluation.progress import measurements_shown
from distill.interchange.kinds import USUAL as USUAL_KINDS
from distill.interchange.mapping import Sides, depth, parse_mapping
from distill.processes import from_first, is_first
from distill.publishing.push import check_repo, push_folder
from distill.results import FitResult
from distill.storage.files import clear_leftovers, read_json, remove_empty, write, write_json
from distill.storage.locks import LOCK, claim, held
from distill.teach import check_teacher
from distill.training.progress import console_of
from distill.training.run_folder import AUTO, Resume, refuse_used
from distill.training.schedule import Schedule
from interventions import InterventionError, Location

BATCH = 512
BATCH_OF_LANGUAGE = 16
"""Pairs of a forward, where students are compared."""


def run_fit(command: FitCommand, output: Path | None = None, *, timed: Path | None = None) -> Path:
    """Train the students of a command, compare them with the teacher, and return the path of the report.

    Args:
        command: the settings.
        output: a new folder; by default `runs/NAME-N` with the first number that is free.
        timed: the file in which another run keeps how long steps take, to train for as long as it did.
    """
    for plan in command.students:
        command.objectives(plan.objectives)  # raises DistillError before a folder is made
    if output is not None:
        from_first(lambda: refuse_used(output))
    with _claim_folder(command.source.name) if output is None else _make_folder(output) as folder, held(folder):
        from_first(lambda: refuse_used(folder))
        from_first(lambda: clear_leftovers(folder))
        if timed is not None and timed.exists():
            from_first(lambda: write(folder / TIMES, timed.read_bytes()))
        return _run(command, folder, resume=False)


def resume_fit(folder: Path, *, anyway: bool = False) -> Path:
    """Resume a run that was stopped, with its own settings, and return the path of the report.

    Args:
        folder: of the run.
        anyway: also where its data, its teacher or a version has changed since.
    """
    if not (folder / COMMAND).exists():
        raise DistillError(
            f"{folder} holds no run of distill fit to go on with; start one: distill fit --output {folder}."
        )
    with held(folder):
        from_first(lambda: clear_leftovers(folder))
        return _run(FitCommand.read(folder), folder, resume="anyway" if anyway else True)


def run_or_resume(
    command: FitCommand, folder: Path | None, resume: Path | None, *, anyway: bool = False, push: str | None = None
) -> Path:
    """Start a run, or go on with one, and return the path of the report.

    Args:
        command: the settings of a new run.
        folder: a new folder; None takes one in `runs/`.
        resume: the folder of the run to go on with, with its own settings; "auto" starts in `folder` or, if a run is
            there, continues it, so that a command may be started again as it is. None starts.
        anyway: as for `resume_fit`.
        push: the repository of a hub that the student is uploaded to; of several each to one with its name behind.

    Raises:
        DistillError: "auto" without a folder, or with a run of other settings in it.
    """
    if push is not None:
        from_first(lambda: check_repo(push))
        report = run_or_resume(command, folder, resume, anyway=anyway)
        from_first(lambda: _upload(report.parent, push))
        return report
    if resume is None:
        return run_fit(command, folder)
    if resume != Path(AUTO):
        return resume_fit(resume, anyway=anyway)
    if folder is None:
        raise DistillError("--resume auto needs the folder to start in or go on from; name it: --output runs/…")
    before = from_first(lambda: FitCommand.read(folder) if (folder / COMMAND).exists() else None)
    if before is None:
        return run_fit(command, folder)
    if before != command and not anyway:
        raise DistillError(
            f"{folder} was started with other options than these; start with the same, in another folder "
            f"(--output {folder}-2), or go on with those that it was started with: --resume {folder}."
        )
    return resume_fit(folder, anyway=anyway)


def _upload(run: Path, repo: str) -> None:
    """Upload the students of a run, and print where they are."""
    folders = FitCommand.read(run).folders(run)
    for folder in folders.values():
        own = folder.parent.relative_to(run).as_posix().replace("/", "-").replace("+", "-")
        address = push_folder(folder, repo if len(folders) == 1 else f"{repo}-{own}")
        console_of().print(f"uploaded: {address}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _claim_folder(name: str) -> Iterator[Path]:
    """Make `runs/NAME-N` with the first N that no other process has; remove it if nothing was written into it."""
    folder = from_first(lambda: claim(lambda number: Path("runs") / f"{name}-{number}"))
    try:
        yield folder
    finally:
        if is_first():
            remove_empty(folder)
            remove_empty(folder.parent)


@contextmanager
def _make_folder(folder: Path) -> Iterator[Path]:
    """Make a folder where there is none; remove it if nothing was written into it."""
    from_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    try:
        yield folder
    finally:
        if is_first():
            remove_empty(folder)


def _run(command: FitCommand, folder: Path, *, resume: Resume) -> Path:
    """Train and measure the students in a folder, print the table, and return the path of the report."""
    console = console_of()
    task, teacher, tokenizer = load_task_and_teacher(
        command.source, command.teacher, command.seed, console, command.check
    )
    accuracy = None if command.any_teacher else check_teacher(teacher, task)
    measured = teacher_evaluation(teacher, task) if accuracy is None else Evaluation(accuracy, None)
    smaller, schedule = command.student(teacher, task), command.timing.schedule(task, command.seed)
    with _leaving_nothing_of_a_refusal(folder):
        from_first(lambda: command.write(folder))
        mapping, found = _mapping(command, teacher, smaller, task, schedule, folder=folder, console=console)
        plans = [plan for plan in command.students if plan.suits(task)]
        pairs = command.pairs_of(task, len(mapping))
        runs = StudentRuns(
            command, folder, task, teacher, tokenizer, smaller, mapping, schedule, resume, console, pairs
        )
        console.print(runs.plan(plans), markup=False, highlight=False)
        trained = runs.train(plans)
    untrained = runs.measure(smaller)
    compared = [compared_model("teacher", teacher, measured), compared_model(UNTRAINED, smaller, untrained)]
    compared += _compared(trained, command.training_seeds)
    title = f"{task.name}: a teacher of {depth(teacher)} layers, students of {depth(smaller)}"
    settings = {**asdict(command), "schedule": schedule.to_dict(), **found}
    samples = _samples(runs, trained)
    report = Report(title, task, compared, settings, *_comparison(runs, trained, smaller), samples)
    print_report(report, console)
    path = from_first(lambda: report.save(folder))
    console.print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)
    return path


@contextmanager
def _leaving_nothing_of_a_refusal(folder: Path) -> Iterator[None]:
    """Remove the settings of a run if it is refused in the block before anything else was written into its folder."""
    try:
        yield
    except DistillError:
        settings = {COMMAND, RUN}
        if is_first() and {each.name for each in folder.iterdir()} - {LOCK} == settings:
            for name in settings:
                (folder / name).unlink()
        raise


def _mapping(
    command: FitCommand, teacher: nn.Module, student: nn.Module, task: Task, schedule: Schedule, **place: Any
) -> tuple[Sides, dict[str, str]]:
    """Return the mapping of a run, and as a setting if it was searched."""
    if command.interchanges.mapping != SEARCH:
        return command.interchanges.mapped(teacher, student), {}
    searched = _search(teacher, student, task, schedule, **place)
    return searched, {"mapping": mapping_as_text(searched)}


def _compared(trained: Mapping[str, Sequence[FitResult]], seeds: Sequence[int]) -> list[ComparedModel]:
    """Return the entries of the students in the report, of each seed where there are several."""
    return [
        compared_model(f"{title}, seed {seed}" if len(seeds) > 1 else title, each.student, each.evaluation, each)
        for title, results in trained.items()
        for seed, each in zip(seeds, results, strict=True)
    ]


def _samples(runs: StudentRuns, trained: Mapping[str, Sequence[FitResult]]) -> tuple[Sample, ...]:
    """Return what the teacher and the students of the first seed write, where they are language models."""
    if not is_language(runs.task):
        return ()
    models = {"teacher": runs.teacher, **{title: results[0].student for title, results in trained.items()}}
    return samples_of(models, runs.task.test, runs.tokenizer)


def _comparison(
    runs: StudentRuns, trained: Mapping[str, Sequence[FitResult]], untrained: nn.Module
) -> tuple[Comparison | None, str]:
    """Return the comparison of several students with the first one, under all usual kinds; or None, and why.

    Args:
        runs: what the trainings shared.
        trained: {title: the result of each seed}.
        untrained: a student as it was before its training.
    """
    students: dict[str, Any] = {title: list(results) for title, results in trained.items()}
    if len(students) < 2:
        return None, ""
    students[UNTRAINED] = [untrained] * len(runs.command.training_seeds)
    rule = runs.command.interchanges.positions
    kinds = None if is_language(runs.task) else USUAL_KINDS  # their answers are long: one kind, few pairs
    settings: dict[str, Any] = {"kinds": kinds, "positions": rule, "batch_size": BATCH, "pairs": runs.pairs}
    if is_language(runs.task):
        settings |= {"batch_size": BATCH_OF_LANGUAGE}
    if not runs.pairs:
        return None, "no interchange accuracy was measured, by which to compare students; --pairs 200 measures some."
    try:
        with measurements_shown(runs.console, "compare"):
            return compare(runs.teacher, students, runs.mapping, runs.task, **settings), ""
    except (DistillError, InterventionError) as nothing:
        return None, f"the students are not compared: {nothing}"


def _search(
    teacher: nn.Module, student: nn.Module, task: Task, schedule: Schedule, *, folder: Path, console: Console
) -> dict[tuple[Location, ...], tuple[Location, ...]]:
    """Return the mapping that a run searches: once for all its students, and read again where the run is resumed.

    Args:
        teacher: the teacher.
        student: a student as it is before its training; it is not changed.
        task: its training rows are the pairs of the search.
        schedule: of the students.
        folder: of the run; `mapping.json` and `mapping.png` there keep what was found.
        console: shows it.
    """
    kept = folder / "mapping.json"
    way_out = f"start the run anew: distill fit --output {folder}-2"
    known = from_first(lambda: read_json(kept, way_out)["mapping"] if kept.exists() else None)
    if known is not None:
        return parse_mapping(known)
    found = search_after_kd(teacher, student, task.train, schedule, controls=CONTROLS, console=console).search
    assert found is not None
    if is_first():
        found.plot().savefig(folder / "mapping.png")
        write_json(kept, found.to_dict())
    console.print(str(found), markup=False, highlight=False, soft_wrap=True)
    return found.mapping
