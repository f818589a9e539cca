"""`distill fit`: students of one teacher, trained, compared with it on held-out rows, and reported."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from distill.alignment.after_kd import SEARCH, search_after_kd
from distill.alignment.mapping_search import mapping_as_text
from distill.alignment.search_mapping import CONTROLS
from distill.cli.fit_command import COMMAND, FitCommand, folder_of
from distill.cli.loading import load_task_and_teacher
from distill.cli.report import Report, compared_model, print_report, teacher_evaluation
from distill.data.seen_rows import SeenRows
from distill.data.task import Task
from distill.errors import DistillError
from distill.evaluation.evaluate import Evaluation, evaluate
from distill.fit import fit
from distill.interchange.mapping import Sides, depth, parse_mapping
from distill.interchange.positions import Span
from distill.models.pretrained import load_classifier
from distill.results import FitResult
from distill.storage.files import check_folder_whole, clear_leftovers, read_json, remove_empty, write_json
from distill.storage.locks import claim, locked
from distill.teach import check_teacher
from distill.training.progress import console_of
from distill.training.run_folder import RESULT, STUDENT, Interrupted, Resume, read_log, refuse_used
from distill.training.schedule import Schedule
from interventions import Location


def run_fit(command: FitCommand, output: Path | None = None) -> Path:
    """Train the students of a command, compare them with the teacher, and return the path of the report.

    Args:
        command: the settings.
        output: a new folder; by default `runs/NAME-N` with the first number that is free.
    """
    for student in command.students:
        command.objectives(student)  # raises DistillError before a folder is made
    if output is not None:
        refuse_used(output)
    with _claim_folder(command.source.name) if output is None else _make_folder(output) as folder, locked(folder):
        refuse_used(folder)
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
    with locked(folder):
        clear_leftovers(folder)
        return _run(FitCommand.read(folder), folder, resume="anyway" if anyway else True)


@contextmanager
def _claim_folder(name: str) -> Iterator[Path]:
    """Make `runs/NAME-N` with the first N that no other process has; remove it if nothing was written into it."""
    folder = claim(lambda number: Path("runs") / f"{name}-{number}")
    try:
        yield folder
    finally:
        remove_empty(folder)
        remove_empty(folder.parent)


@contextmanager
def _make_folder(folder: Path) -> Iterator[Path]:
    """Make a folder where there is none; remove it if nothing was written into it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        remove_empty(folder)


def _run(command: FitCommand, folder: Path, *, resume: Resume) -> Path:
    """Train and measure the students in a folder, print the table, and return the path of the report."""
    console = console_of()
    task, teacher, tokenizer = load_task_and_teacher(
        command.source, command.teacher, command.seed, console, command.check
    )
    accuracy = None if command.any_teacher else check_teacher(teacher, task)
    measured = teacher_evaluation(teacher, task) if accuracy is None else Evaluation(accuracy, None)
    smaller = command.student(teacher)
    schedule = command.timing.schedule(task, command.seed)
    command.write(folder)
    mapping: Sides
    found: dict[str, str] = {}
    if command.interchanges.mapping == SEARCH:
        mapping = searched = _search(teacher, smaller, task, schedule, folder=folder, console=console)
        found = {"mapping": mapping_as_text(searched)}
    else:
        mapping = command.interchanges.mapped(teacher, smaller)
    compared = [compared_model("teacher", teacher, measured)]
    for objectives, title in command.students.items():
        result = _fit_and_evaluate(
            teacher,
            command.student(teacher),
            mapping,
            task,
            objective=command.objectives(objectives, words_of(tokenizer)),
            schedule=schedule,
            output_dir=folder_of(folder, objectives),
            resume=resume,
            console=console,
            title=title,
            positions=command.interchanges.positions,
            tokenizer=tokenizer,
        )
        compared.append(compared_model(title, result.student, result.evaluation, result))
    title = f"{task.name}: a teacher of {depth(teacher)} layers, students of {depth(smaller)}"
    report = Report(title, task, compared, {**asdict(command), "schedule": asdict(schedule), **found})
    print_report(report, console)
    path = report.save(folder)
    console.print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)
    return path


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
    if kept.exists():
        return parse_mapping(read_json(kept, f"start the run anew: distill fit --output {folder}-2")["mapping"])
    found = search_after_kd(teacher, student, task.train, schedule, controls=CONTROLS, console=console).search
    assert found is not None
    found.plot().savefig(folder / "mapping.png")
    write_json(kept, found.to_dict())
    console.print(str(found), markup=False, highlight=False, soft_wrap=True)
    return found.mapping


def _fit_and_evaluate(
    teacher: nn.Module,
    student: nn.Module,
    mapping: Sides,
    task: Task,
    *,
    positions: Span,
    output_dir: Path,
    **settings: Any,
) -> FitResult:
    """Train and measure one student; the same rule of positions measures students of all objectives."""
    result = _fit_or_read(teacher, student, mapping, task, output_dir=output_dir, **settings)
    result = replace(result, evaluation=evaluate(teacher, student, mapping, task, positions=positions))
    result.save(output_dir)
    return result


def _fit_or_read(
    teacher: nn.Module,
    student: nn.Module,
    mapping: Sides,
    task: Task,
    *,
    output_dir: Path,
    resume: Resume,
    **settings: Any,
) -> FitResult:
    """Train one student; in a resumed run, read one that is finished, and start one that was not started."""
    if resume and (output_dir / RESULT).exists():
        try:
            with locked(output_dir):
                clear_leftovers(output_dir)
                return _read_finished(student, output_dir)
        except DistillError as error:
            warnings.warn(f"{error} The student is resumed from its last checkpoint.", stacklevel=2)
    resume = resume if output_dir.exists() else False
    try:
        return fit(teacher, student, mapping, task.train, output_dir=output_dir, resume=resume, **settings)
    except Interrupted as stop:
        raise Interrupted(
            f"{str(stop).split('; go on')[0]}; go on with: distill fit --resume {output_dir.parent}"
        ) from None


def _read_finished(student: nn.Module, folder: Path) -> FitResult:
    """Return the result of a student that is finished, with the saved weights put into the student.

    Raises:
        DistillError: a file is damaged.
    """
    saved_result, trained_on = read_json(folder / RESULT, "it is made again"), SeenRows.load(folder / STUDENT)
    check_folder_whole(folder / STUDENT, "it is made again")
    saved = load_classifier(folder / STUDENT)
    student.to(next(saved.parameters()).dtype).load_state_dict(saved.state_dict())
    settings, seconds = saved_result["settings"], saved_result["seconds"]
    return FitResult(student, tuple(read_log(folder)), Evaluation(None, None), settings, seconds, folder, trained_on)


def words_of(tokenizer: Any) -> Tensor | None:
    """Return the ids of whole words, for in-context sources; None without a tokenizer."""
    if tokenizer is None:
        return None
    special = set(tokenizer.all_special_ids)
    words = [
        i for word, i in tokenizer.get_vocab().items() if i not in special and not word.startswith(("##", "[unused"))
    ]
    return torch.tensor(sorted(words))
