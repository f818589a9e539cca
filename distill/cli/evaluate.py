"""`distill evaluate`: students measured against their teacher on held-out rows, new pairs of base and source."""

from dataclasses import asdict
from pathlib import Path

from distill.cli.fit_command import COMMAND, FitCommand
from distill.cli.loading import drop_trained_on, load_task_and_teacher
from distill.cli.options.groups import DataOptions, InterchangeOptions
from distill.cli.report import Report, compared_model, print_report, teacher_evaluation
from distill.errors import DistillError
from distill.evaluation.evaluate import evaluate
from distill.models.pretrained import load_model
from distill.training.checks import check
from distill.training.progress import console_of


def run_evaluate(
    run: Path | None,
    source: DataOptions,
    teacher: str | None,
    student: Path | None,
    interchanges: InterchangeOptions,
    pairs: int,
    seed: int,
) -> None:
    """Measure the students of a run, or one student against its teacher, and print the table.

    Args:
        run: the folder of `distill fit`, with its own rows, models and mapping; or None, and the next four are needed.
        source: the rows.
        teacher: a classifier, by its folder or its name on the hub; None takes the one that the task has.
        student: the folder of a student.
        interchanges: the mapping and the share of positions.
        pairs: how many pairs of base and source are drawn.
        seed: draws the pairs; without a run also the rows.
    """
    console = console_of()
    if run is not None:
        _refuse_other_than_run(run, student, teacher, source, interchanges)
        if not (run / COMMAND).exists():
            raise DistillError(f"{run} holds no run of distill fit; name its folder, or give --student and --teacher.")
        command = FitCommand.read(run)
        source, teacher, interchanges = command.source, command.teacher, command.interchanges_of(run)
        folders = command.folders(run)
        data_seed = command.seed
        if not folders:
            raise DistillError(f"{run} has no finished student yet; go on with: distill fit --resume {run}.")
    elif student is not None:
        folders, data_seed = {student.name: student}, seed
    else:
        raise DistillError("nothing to evaluate was named: give the folder of a run, or --student FOLDER.")
    task, model, _ = load_task_and_teacher(
        source, teacher, data_seed, console, lambda _, task: interchanges.check(task)
    )
    for name, folder in folders.items():
        task = drop_trained_on(task, folder, f"student {name}", console)
    compared = [compared_model("teacher", model, teacher_evaluation(model, task))]
    for name, folder in folders.items():
        loaded = load_model(folder)
        check(model, loaded, task.test)
        mapping = interchanges.mapped(model, loaded)
        evaluation = evaluate(model, loaded, mapping, task, positions=interchanges.positions, pairs=pairs, seed=seed)
        if not evaluation.figures and run is None:
            raise DistillError(
                f"--student {folder}: {evaluation.note}; name a student with a head, as distill fit saves it: "
                "--student RUN/OBJECTIVE/student."
            )
        compared.append(compared_model(name, loaded, evaluation))
    print_report(Report(f"{task.name}: held-out pairs, seed {seed}", task, compared, {}), console)


def _refuse_other_than_run(
    run: Path, student: Path | None, teacher: str | None, source: DataOptions, interchanges: InterchangeOptions
) -> None:
    """Raise DistillError where data, models or a mapping are named beside a run, which has its own."""
    options = {
        "--student": student,
        "--teacher": teacher,
        **{f"--{key}": value for key, value in asdict(source).items()},
    }
    given = [name.replace("_", "-") for name, value in options.items() if value not in (None, 1.0)]
    given += [] if interchanges == InterchangeOptions() else ["--mapping or --share"]
    if given:
        raise DistillError(
            f"{run} is measured as it was trained, on its own data, and {', '.join(given)} was given too; leave that "
            "out, or the run: --student FOLDER --teacher FOLDER --data FILE."
        )
