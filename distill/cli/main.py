"""The command line: `distill fit`, `distill evaluate`, `distill teach`, `distill objectives`."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from interventions import printable

app = typer.Typer(
    help="Train a student to compute like its teacher, and measure how far it does.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

UsageError: Any = typer.BadParameter.__base__
"""What typer raises for options: that of click, or of typer's own copy of it."""

Task = Annotated[
    str | None,
    typer.Option(help="pvr, agreement or sst2; pvr where neither task nor data is given (digits, mnist: in Python)."),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="A folder for the task, or a .csv, .tsv or .jsonl file with a text and a label column, or texts alone."
    ),
]
EvalData = Annotated[
    Path | None, typer.Option(help="A file of held-out rows; a fifth of the data is held out otherwise.")
]
Text = Annotated[str | None, typer.Option(help="The text column of a file.")]
Label = Annotated[str | None, typer.Option(help="The label column of a file.")]
Classes = Annotated[
    str | None,
    typer.Option(
        help="The labels of the data in the order of the model's outputs, with commas; matched with the names in "
        "its configuration by default."
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(help="Tokens at which texts of a file are cut; 128 by default, at most what the model reads."),
]
ParamDtype = Annotated[
    str | None,
    typer.Option(help="How half-precision weights are trained: float32, the default, or 'as loaded'."),
]
SplitSeed = Annotated[
    int | None,
    typer.Option(help="Which rows of a file are held out; by default as for the teacher, whatever --seed is."),
]
Seed = Annotated[int, typer.Option(help="Decides everything that is drawn.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def fit(
    task: Task = None,
    data: Data = None,
    eval_data: EvalData = None,
    text: Text = None,
    label: Label = None,
    classes: Classes = None,
    max_length: MaxLength = None,
    split_seed: SplitSeed = None,
    teacher: Annotated[
        str | None, typer.Option(help="A classifier: folder or hub name. Embedded tasks train their own.")
    ] = None,
    student_layers: Annotated[
        int | None, typer.Option(help="Layers of the student; half of the teacher's by default.")
    ] = None,
    mapping: Annotated[str, typer.Option(help="full, middle, late, single, or entries teacher~student.")] = "full",
    objective: Annotated[
        str | None,
        typer.Option(
            help="kd, diito (KD + interchange), labels, dkd, icd, … (see distill objectives), or several with commas. "
            "By default kd and diito, compared."
        ),
    ] = None,
    sources: Annotated[
        str | None, typer.Option(help="Sources of interchanges: shuffle (the default), in-context, mixup or noise.")
    ] = None,
    pairs: Annotated[str | None, typer.Option(hidden=True, help="What --sources was called before.")] = None,
    fraction: Annotated[float, typer.Option(help="The share of the training rows to use.")] = 1.0,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training rows.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps, instead of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="The learning rate.")] = None,
    param_dtype: ParamDtype = None,
    temperature: Annotated[float, typer.Option(help="Of the softened answers.")] = 2.0,
    share: Annotated[float, typer.Option(help="The share of positions that are interchanged.")] = 0.3,
    sigma: Annotated[float, typer.Option(help="Of mixup and noise, in units of each vector's own size.")] = 1.0,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option(help="A new folder for everything; runs/… by default.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="The folder of a run that was stopped: go on with it, as it was started.")
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Resume although the data, the teacher or a version has changed.")
    ] = False,
    any_teacher: Annotated[
        bool, typer.Option("--any-teacher", help="Accept a teacher no better than the majority class.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Distil a teacher into a smaller student: by its answers, and by interchange."""
    from distill.cli import commands

    if resume is not None:
        with _stoppable():
            commands.resume_fit(resume, anyway=anyway)
        return
    command = commands.FitCommand(
        source=commands.Source(
            task, _text(data), _text(eval_data), text, label, fraction, classes, max_length, split_seed
        ),
        timing=commands.Timing(epochs, steps, batch_size, lr, param_dtype),
        interchanges=commands.Interchanges(mapping, commands.sources_of(sources, pairs), share, sigma),
        teacher=teacher,
        student_layers=student_layers,
        objective=objective,
        temperature=temperature,
        seed=seed,
        any_teacher=any_teacher,
    )
    with _stoppable():
        commands.run_fit(command, output)


@app.command()
def evaluate(
    run: Annotated[Path | None, typer.Argument(help="The folder of a finished `distill fit`.")] = None,
    task: Task = None,
    data: Data = None,
    eval_data: EvalData = None,
    text: Text = None,
    label: Label = None,
    classes: Classes = None,
    max_length: MaxLength = None,
    split_seed: SplitSeed = None,
    teacher: Annotated[str | None, typer.Option(help="A classifier: folder or hub name.")] = None,
    student: Annotated[Path | None, typer.Option(help="The folder of a student.")] = None,
    mapping: Annotated[str, typer.Option(help="full, middle, late or single.")] = "full",
    share: Annotated[float, typer.Option(help="The share of positions that are interchanged.")] = 0.3,
    pairs: Annotated[int, typer.Option(help="How many pairs of base and source.")] = 2000,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Measure accuracy and interchange accuracy of students on held-out pairs."""
    from distill.cli import commands

    source = commands.Source(
        task, _text(data), _text(eval_data), text, label, classes=classes, max_length=max_length, split_seed=split_seed
    )
    interchanges = commands.Interchanges(mapping, share=share)
    with _stoppable():
        commands.run_evaluate(run, source, teacher, student, interchanges, pairs, seed)


@app.command()
def teach(
    output: Annotated[Path, typer.Option(help="A new folder for the teacher.")],
    task: Task = None,
    data: Data = None,
    eval_data: EvalData = None,
    text: Text = None,
    label: Label = None,
    classes: Classes = None,
    max_length: MaxLength = None,
    split_seed: SplitSeed = None,
    encoder: Annotated[str | None, typer.Option("--from", help="An encoder to fine-tune: folder or hub name.")] = None,
    fraction: Annotated[float, typer.Option(help="The share of the training rows to use.")] = 1.0,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training rows.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps, instead of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="The learning rate.")] = None,
    param_dtype: ParamDtype = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in the output folder.")] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Resume although the data or a version has changed.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train a teacher: fine-tune an encoder on a task, or train the network of an embedded task."""
    from distill.cli import commands

    source = commands.Source(
        task, _text(data), _text(eval_data), text, label, fraction, classes, max_length, split_seed
    )
    timing = commands.Timing(epochs, steps, batch_size, lr, param_dtype)
    with _stoppable():
        go_on: Any = "anyway" if resume and anyway else resume
        commands.run_teach(source, encoder, timing, seed, output, resume=go_on)


@app.command()
def objectives() -> None:
    """List what a student can be trained on: terms, formula, source, and cost in runs."""
    from distill.cli import objectives
    from distill.training.progress import Plain

    objectives.show(Plain())


def main() -> None:
    """The console script: bad input is one line and exit status 2, Ctrl-C is 130; `--debug` shows tracebacks."""
    try:
        _quiet()
        status = app(standalone_mode=False)
    except UsageError as error:
        _refuse_usage(error)
    except typer.Abort:
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        if "--debug" in sys.argv or not _is_refusal(error):
            raise
        print(f"distill: {printable(' '.join(_told(error).split()))}", file=sys.stderr)
        raise SystemExit(2) from None
    if status:
        raise SystemExit(status)


def _is_refusal(error: Exception) -> bool:
    """Return whether an error is about what was requested, and no fault of ours.

    The classes are imported here: `distill --help` raises nothing, and needs no torch.
    """
    from distill.errors import DistillError
    from interventions import InterventionError

    return isinstance(error, (DistillError, InterventionError, OSError))


def _told(error: Exception) -> str:
    """What an error says; of a path that the system refuses, which one it is."""
    if not isinstance(error, OSError) or error.filename is None:
        return str(error)
    return f"{str(error.filename)[:200]} cannot be used: {error.strerror}; name another path, or see who may use it."


def _refuse_usage(error: Any) -> NoReturn:
    """Say what is wrong with an option in one line; without any argument the help is shown."""
    text = error.format_message()
    if "\n" in text:
        error.show()
        raise SystemExit(error.exit_code) from None
    path = error.ctx.command_path if error.ctx else "distill"
    print(printable(f"distill: {text.rstrip('.')}; see {path} --help."), file=sys.stderr)
    raise SystemExit(error.exit_code) from None


@contextmanager
def _stoppable() -> Iterator[None]:
    """Say on Ctrl-C how to go on; typer itself would end without a word."""
    try:
        yield
    except KeyboardInterrupt as stop:
        print(printable(f"\ndistill: {str(stop) or 'stopped.'}"), file=sys.stderr)
        raise SystemExit(130) from None


def _quiet() -> None:
    """Keep the progress bars and loading notes of other libraries out of ours; what is wrong we say ourselves."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.formatwarning = _once(_one_line)


def _once(form: Callable[..., str]) -> Callable[..., str]:
    """A form of warnings that says nothing of what was said before, as networks are tried several times in a run."""
    said: set[str] = set()

    def told(*warning: Any, **where: Any) -> str:
        text = form(*warning, **where)
        known = text in said
        said.add(text)
        return "" if known else text

    return told


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning without the line of the source that gave it; it says whether it is ours."""
    return printable(f"{'distill: ' if 'distill' in Path(filename).parts else ''}{message}\n")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
