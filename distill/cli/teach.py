"""`distill teach`: a teacher, trained on the labels of a task or file."""

from dataclasses import replace
from pathlib import Path

from distill.cli.loading import warnings_as_notes
from distill.cli.options.groups import DataOptions, ScheduleOptions
from distill.errors import DistillError
from distill.models.pretrained import load_tokenizer, new_classifier, save_teacher
from distill.processes import from_first
from distill.teach import teach
from distill.training.progress import console_of
from distill.training.run_folder import Resume, refuse_used
from distill.training.schedule import Schedule


def run_teach(
    source: DataOptions, encoder: str | None, timing: ScheduleOptions, seed: int, output: Path, *, resume: Resume
) -> None:
    """Train a teacher, print its accuracy, and save it with its tokenizer.

    Args:
        source: the rows, with labels.
        encoder: the model to fine-tune, by its folder or its name on the hub; None trains the network of the task.
        timing: settings of the schedule, in the place of those of the task.
        seed: of the rows, the new weights and the training.
        output: a new folder.
        resume: start from the newest checkpoint in `output`, as `fit` does.
    """
    console = console_of()
    if not resume:
        from_first(lambda: refuse_used(output))
    if encoder is None and (source.task == "sst2" or source.data is not None):
        raise DistillError(f"{source.name!r} needs an encoder to fine-tune; name one: --from FOLDER_OR_NAME.")
    tokenizer = load_tokenizer(encoder) if encoder is not None and source.task != "pvr" else None
    with warnings_as_notes(console):
        task = source.load(tokenizer, seed)
    if "labels" not in task.train.columns:
        raise DistillError(
            f"{source.name!r} has no labels to teach; add a column of them, 'label', or name it: --label COLUMN."
        )
    if encoder is not None:
        network = new_classifier(encoder, task, seed)
    elif task.network is not None:
        network = task.network(seed)
    else:
        raise DistillError(f"task {task.name!r} needs an encoder to fine-tune; name one: --from FOLDER_OR_NAME.")
    schedule = replace(
        Schedule.of(task.recipe, seed), **({"steps": None} if "epochs" in timing.given else {}) | timing.given
    )
    result = teach(network, task, schedule=schedule, output_dir=output, resume=resume, console=console)
    from_first(lambda: save_teacher(network, tokenizer, output, result.seen, source.split_seed or 0))
    common = "" if task.majority is None else f", the most common class {task.majority:.3f}"
    console.print(f"{result.evaluation}{common}", markup=False, highlight=False)
    console.print(f"teacher: {output}", markup=False, highlight=False, soft_wrap=True)
