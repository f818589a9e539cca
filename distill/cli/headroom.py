"""`distill headroom`: what the causal term of a `distill fit` could add, measured before it is run."""

from distill.cli.fit_command import FitCommand
from distill.cli.loading import load_task_and_teacher
from distill.cli.student_runs import words_of
from distill.errors import DistillError
from distill.prospects.headroom import headroom
from distill.training.progress import console_of


def run_headroom(command: FitCommand, steps: int, batches: int) -> None:
    """Measure the headroom of the student of a command, with its data and its interchanges, and print it.

    Args:
        command: the settings of the run that is thought of.
        steps: how many steps the student is trained for before.
        batches: how many batches are measured on.

    Raises:
        DistillError: objectives without interchange.
    """
    objective = "diito" if command.objective is None else command.objective
    if "diito" not in objective.split(","):
        raise DistillError(
            f"--objective {objective} interchanges nothing, so there is no headroom to measure; leave it out, or add "
            f"diito: --objective {objective},diito."
        )
    command.objectives(objective)  # raises DistillError before anything is loaded
    console = console_of()
    task, teacher, tokenizer = load_task_and_teacher(
        command.source, command.teacher, command.seed, console, command.check
    )
    student = command.student(teacher, task)
    found = headroom(
        teacher,
        student,
        task,
        command.interchanges.mapped(teacher, student),
        objective=command.objectives(objective, words_of(tokenizer)),
        steps=steps,
        batches=batches,
        schedule=command.timing.schedule(task, command.seed),
        seed=command.seed,
    )
    console.print(str(found), markup=False, highlight=False, soft_wrap=True)
