"""`distill compare`: the students of one or several runs of `distill fit`, compared over the same rows and pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from distill.cli.fit_command import COMMAND, FitCommand
from distill.cli.loading import drop_trained_on, load_task_and_teacher
from distill.comparison.compare import compare
from distill.comparison.comparison import Comparison
from distill.data.seen_rows import SeenRows
from distill.errors import DistillError
from distill.evaluation.evaluate import Evaluation
from distill.interchange.kinds import USUAL
from distill.models.pretrained import load_model
from distill.processes import from_first
from distill.results import FitResult
from distill.storage.files import read_json, write, write_json
from distill.training.progress import console_of
from distill.training.run_folder import RESULT, STUDENT

Folders = dict[str, list[Path]]
"""The folders of the runs of each student, by its name."""


def run_compare(runs: Sequence[Path], pairs: int, seed: int, effective_only: bool, output: Path | None) -> None:
    """Compare the students of runs with the first one, and print what was found; write it where a folder is named.

    Students of one title in runs that differ in their seed alone are one student of several seeds.

    Args:
        runs: the folders of `distill fit`.
        pairs: how many pairs of base and source are drawn.
        seed: draws the pairs.
        effective_only: take only pairs whose interchange changes the teacher's answer.
        output: a new folder for `compare.json` and `compare.png`.

    Raises:
        DistillError: what is no run, runs of other data or teachers, or fewer than two students.
    """
    if from_first(lambda: output is not None and output.exists()):
        raise DistillError(f"--output {output} exists; choose a new folder for compare.json and compare.png.")
    commands = {run: _command(run) for run in dict.fromkeys(runs)}
    first = next(iter(commands.values()))
    interchanges = first.interchanges_of(next(iter(commands)))
    _refuse_others(commands)
    folders, console = students_of_runs(commands), console_of()
    task, teacher, _ = load_task_and_teacher(
        first.source, first.teacher, first.seed, console, lambda _, task: first.interchanges.check(task)
    )
    for name, of in folders.items():
        for folder in of:
            task = drop_trained_on(task, folder / STUDENT, f"student {name}", console)
    students = {name: [_finished(folder) for folder in of] for name, of in folders.items()}
    mapping = {name: interchanges.mapped(teacher, of[0].student) for name, of in students.items()}
    found = compare(
        teacher, students, mapping, task, kinds=USUAL, pairs=pairs, positions=interchanges.positions, seed=seed,
        effective_only=effective_only,
    )  # fmt: skip
    console.print(str(found), markup=False, highlight=False, soft_wrap=True)
    if output is not None:
        from_first(lambda: _save(found, output))
        console.print(f"written: {output}", markup=False, highlight=False, soft_wrap=True)


def _save(found: Comparison, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "compare.json", found.to_dict())
    write(output / "compare.png", found.plot()._repr_png_())


def students_of_runs(commands: Mapping[Path, FitCommand]) -> Folders:
    """Return the folders of each student; runs that differ in their seed, or in which students they have, are one's.

    Raises:
        DistillError: fewer than two students, or one of a seed twice.
    """
    found: dict[tuple[str, str], list[Path]] = {}
    names: dict[tuple[str, str], str] = {}
    seeds: dict[tuple[str, str, int], Path] = {}
    for run, command in commands.items():
        settings = str(asdict(replace(command, seed=0, seeds=(), objective=None)))
        for plan, seed in command.plans_by_seed(run):
            title, key = plan.title, (plan.title, settings)
            taken = any(title == other and settings != of for other, of in found)
            names.setdefault(key, f"{title} ({run.name})" if taken else title)
            if (same := seeds.setdefault((*key, seed), run)) != run:
                raise DistillError(
                    f"{same} and {run} hold the same student, {title} of seed {seed}, which counts once; name "
                    "one of them, or train with another --seed."
                )
            found.setdefault(key, []).append(command.folder_of(run, plan, seed))
    if not found:
        raise DistillError(
            f"{' and '.join(map(str, commands))} hold{'s' * (len(commands) == 1)} no student yet; go on with: distill "
            f"fit --resume {next(iter(commands))}."
        )
    if len(found) < 2:
        raise DistillError(
            f"{' and '.join(map(str, commands))} hold{'s' * (len(commands) == 1)} one student, "
            f"{next(iter(names.values()))}, and nothing to compare it with; name a run of others too: distill compare "
            "RUN OTHER."
        )
    return {names[key]: folders for key, folders in found.items()}


def _command(run: Path) -> FitCommand:
    """Return the settings of a run."""
    if not (run / COMMAND).is_file():
        raise DistillError(f"{run} holds no run of distill fit to compare; name its folder: distill compare RUN.")
    return FitCommand.read(run)


def _refuse_others(commands: Mapping[Path, FitCommand]) -> None:
    """Raise DistillError for runs of other rows, of another teacher or with other interchanges than the first one's."""
    (first_run, first), *others = commands.items()
    for run, command in others:
        of_teacher = {"teacher": command.teacher, **({} if command.teacher else {"seed": command.seed})}
        settings: dict[str, Any] = {
            **asdict(replace(command.source, fraction=1.0)), **of_teacher,
            "mapping": command.interchanges.mapping, "share": command.interchanges.share,
        }  # fmt: skip
        expected = {
            **asdict(replace(first.source, fraction=1.0)), "teacher": first.teacher, "seed": first.seed,
            "mapping": first.interchanges.mapping, "share": first.interchanges.share,
        }  # fmt: skip
        other = next((name for name, value in settings.items() if value != expected[name]), None)
        if other is None:
            continue
        if other == "seed":
            raise DistillError(
                f"{first_run} and {run} have other seeds and train teachers of their own, and students are compared "
                "under one teacher; train one for all: distill teach --output teacher, and distill fit --teacher "
                "teacher."
            )
        raise DistillError(
            f"{first_run} has --{other} {expected[other]} and {run} has {settings[other]}, and students are compared "
            "on the same rows, under one teacher and mapping; name runs that have the same: distill compare "
            f"{first_run}."
        )


def _finished(folder: Path) -> FitResult:
    """Return the result of a student that is finished, with its network, the rows and the kinds it was trained on."""
    run = next((each for each in folder.parents if (each / COMMAND).is_file()), folder.parent)
    way_out = f"go on with the run: distill fit --resume {run}"
    if not (folder / RESULT).is_file():
        raise DistillError(f"{folder} holds no finished student; {way_out}.")
    result = read_json(folder / RESULT, way_out)
    student, seen = load_model(folder / STUDENT), SeenRows.load(folder / STUDENT)
    return FitResult(student, (), Evaluation(None, None), result["settings"], result["seconds"], folder, seen)
