"""The command line: `distill fit`, `evaluate`, `compare`, `audit`, `headroom`, `teach`, …, and how each exits."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from distill.cli.flags import (
    Anyway,
    BatchSize,
    Classes,
    Clusters,
    Compressed,
    Data,
    Debug,
    Epochs,
    EvalData,
    Fraction,
    Label,
    LearningRate,
    MappedBlocks,
    MaxLength,
    ObjectiveNames,
    Original,
    ParamDtype,
    ResumeFolder,
    Seed,
    Share,
    SliceBy,
    SourceRule,
    SplitSeed,
    Steps,
    StudentLayers,
    Task,
    Teacher,
    Text,
    TextsOrTask,
)
from interventions import printable

app = typer.Typer(
    help="Train a student to compute like its teacher, and measure how far it does.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

UsageError: Any = typer.BadParameter.__base__
"""The error that typer raises for options: click's, or that of typer's own copy of click."""


def _print_version(wanted: bool) -> bool:
    """Print the version of the distribution, which holds both packages, and exit."""
    if wanted:
        print(f"distill {metadata.version('causal-distillation')}")
        raise typer.Exit
    return wanted


@app.callback()
def show_version(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train a student to compute like its teacher, and measure how far it does."""


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
    clusters: Clusters = None,
    teacher: Teacher = None,
    student_layers: StudentLayers = None,
    mapping: Annotated[
        str, typer.Option(help="full, middle, late, single, search (by the first steps), or entries teacher~student.")
    ] = "full",
    objective: ObjectiveNames = None,
    sources: SourceRule = None,
    pairs: Annotated[str | None, typer.Option(hidden=True, help="What --sources was called before.")] = None,
    fraction: Fraction = 1.0,
    epochs: Epochs = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    param_dtype: ParamDtype = None,
    temperature: Annotated[float, typer.Option(help="Of the softened answers.")] = 2.0,
    share: Share = 0.3,
    sigma: Annotated[float, typer.Option(help="Of mixup and noise, in units of each vector's own size.")] = 1.0,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option(help="A new folder for everything; runs/… by default.")] = None,
    resume: ResumeFolder = None,
    anyway: Anyway = False,
    any_teacher: Annotated[
        bool, typer.Option("--any-teacher", help="Accept a teacher no better than the majority class.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Distil a teacher into a smaller student: by its answers, and by interchange."""
    from distill.cli.fit import resume_fit, run_fit
    from distill.cli.fit_command import FitCommand
    from distill.cli.options import DataOptions, InterchangeOptions, ScheduleOptions, sources_of

    if resume is not None:
        with _exit_on_interrupt():
            resume_fit(resume, anyway=anyway)
        return
    command = FitCommand(
        source=DataOptions(
            task, _text(data), _text(eval_data), text, label, fraction, classes, max_length, split_seed, clusters
        ),
        timing=ScheduleOptions(epochs, steps, batch_size, lr, param_dtype),
        interchanges=InterchangeOptions(mapping, sources_of(sources, pairs), share, sigma),
        teacher=teacher,
        student_layers=student_layers,
        objective=objective,
        temperature=temperature,
        seed=seed,
        any_teacher=any_teacher,
    )
    with _exit_on_interrupt():
        run_fit(command, output)


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
    clusters: Clusters = None,
    teacher: Annotated[str | None, typer.Option(help="A classifier: folder or hub name.")] = None,
    student: Annotated[Path | None, typer.Option(help="The folder of a student.")] = None,
    mapping: Annotated[str, typer.Option(help="full, middle, late or single.")] = "full",
    share: Share = 0.3,
    pairs: Annotated[int, typer.Option(help="How many pairs of base and source.")] = 2000,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Measure accuracy and interchange accuracy of students on held-out pairs."""
    from distill.cli.evaluate import run_evaluate
    from distill.cli.options import DataOptions, InterchangeOptions

    source = DataOptions(
        task,
        _text(data),
        _text(eval_data),
        text,
        label,
        classes=classes,
        max_length=max_length,
        split_seed=split_seed,
        clusters=clusters,
    )
    interchanges = InterchangeOptions(mapping, share=share)
    with _exit_on_interrupt():
        run_evaluate(run, source, teacher, student, interchanges, pairs, seed)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="The folders of finished `distill fit`, e.g. of other seeds.")],
    pairs: Annotated[int, typer.Option(help="How many pairs of base and source.")] = 2000,
    effective_only: Annotated[
        bool, typer.Option("--effective-only", help="Take only pairs whose interchange changes the teacher's answer.")
    ] = False,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option(help="A new folder for compare.json and compare.png.")] = None,
    debug: Debug = False,
) -> None:
    """Compare the students of runs over the same rows and pairs: differences with intervals, by kind of interchange."""
    from distill.cli.compare import run_compare

    with _exit_on_interrupt():
        run_compare(runs, pairs, seed, effective_only, output)


@app.command()
def headroom(
    task: Task = None,
    data: Data = None,
    eval_data: EvalData = None,
    text: Text = None,
    label: Label = None,
    classes: Classes = None,
    max_length: MaxLength = None,
    split_seed: SplitSeed = None,
    teacher: Teacher = None,
    student_layers: StudentLayers = None,
    mapping: Annotated[str, typer.Option(help="full, middle, late, single, or entries teacher~student.")] = "full",
    objective: ObjectiveNames = None,
    sources: SourceRule = None,
    fraction: Fraction = 1.0,
    steps: Annotated[int, typer.Option(help="Steps of training without interchange before.")] = 200,
    batches: Annotated[int, typer.Option(help="Batches to measure on.")] = 8,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    temperature: Annotated[float, typer.Option(help="Of the softened answers.")] = 2.0,
    share: Share = 0.3,
    sigma: Annotated[float, typer.Option(help="Of mixup and noise, in units of each vector's own size.")] = 1.0,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Measure, before a fit, whether its interchanges ask a student for something that its answers do not."""
    from distill.cli.fit_command import FitCommand
    from distill.cli.headroom import run_headroom
    from distill.cli.options import DataOptions, InterchangeOptions, ScheduleOptions, sources_of

    command = FitCommand(
        source=DataOptions(task, _text(data), _text(eval_data), text, label, fraction, classes, max_length, split_seed),
        timing=ScheduleOptions(None, None, batch_size, lr),
        interchanges=InterchangeOptions(mapping, sources_of(sources, None), share, sigma),
        teacher=teacher,
        student_layers=student_layers,
        objective=objective,
        temperature=temperature,
        seed=seed,
    )
    with _exit_on_interrupt():
        run_headroom(command, steps, batches)


@app.command()
def audit(
    original: Original,
    compressed: Compressed,
    data: TextsOrTask,
    text: Text = None,
    label: Label = None,
    slice_by: SliceBy = None,
    mapping: MappedBlocks = None,
    max_length: MaxLength = None,
    examples: Annotated[int, typer.Option(help="Rows on which the parts are exchanged one by one.")] = 256,
    pairs: Annotated[int, typer.Option(help="How many pairs of rows are interchanged.")] = 500,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option(help="A new folder for the page; runs/audit-… by default.")] = None,
    debug: Debug = False,
) -> None:
    """Compare a compressed model with its original: whether it is the same computation, and where it is not."""
    from distill.cli.audit import AuditOptions, run_audit

    options = AuditOptions(text, label, slice_by, mapping, max_length, examples, pairs, seed)
    with _exit_on_interrupt():
        run_audit(original, compressed, data, options, output)


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
    fraction: Fraction = 1.0,
    epochs: Epochs = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    param_dtype: ParamDtype = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in the output folder.")] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Resume although the data or a version has changed.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train a teacher: fine-tune an encoder on a task, or train the network of an embedded task."""
    from distill.cli.options import DataOptions, ScheduleOptions
    from distill.cli.teach import run_teach

    source = DataOptions(task, _text(data), _text(eval_data), text, label, fraction, classes, max_length, split_seed)
    timing = ScheduleOptions(epochs, steps, batch_size, lr, param_dtype)
    with _exit_on_interrupt():
        run_teach(source, encoder, timing, seed, output, resume="anyway" if resume and anyway else resume)


@app.command()
def objectives() -> None:
    """List what a student can be trained on: terms, formula, source, and cost in runs."""
    from distill.cli import objectives
    from distill.training.progress import Plain

    objectives.show(Plain())


def main() -> None:
    """Run the console script: bad input is one line and exit status 2, Ctrl-C is 130; `--debug` shows tracebacks."""
    try:
        _silence_libraries()
        status = app(standalone_mode=False)
    except UsageError as error:
        _refuse_usage(error)
    except typer.Abort:
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        if "--debug" in sys.argv or not _is_refusal(error):
            raise
        print(f"distill: {printable(' '.join(_message_of(error).split()))}", file=sys.stderr)
        raise SystemExit(2) from None
    if status:
        raise SystemExit(status)


def _is_refusal(error: Exception) -> bool:
    """Return whether an error is about the request, and no bug.

    The classes are imported here, as they take torch with them, which `distill --help` does not need.
    """
    from distill.errors import DistillError
    from interventions import InterventionError

    return isinstance(error, (DistillError, InterventionError, OSError))


def _message_of(error: Exception) -> str:
    """Return the message of an error, with the path where the system refused one."""
    if not isinstance(error, OSError) or error.filename is None:
        return str(error)
    return f"{str(error.filename)[:200]} cannot be used: {error.strerror}; name another path, or see who may use it."


def _refuse_usage(error: Any) -> NoReturn:
    """Print what is wrong with an option on one line, or the help where there is no argument, and exit."""
    text = error.format_message()
    if "\n" in text:
        error.show()
        raise SystemExit(error.exit_code) from None
    path = error.ctx.command_path if error.ctx else "distill"
    print(printable(f"distill: {text.rstrip('.')}; see {path} --help."), file=sys.stderr)
    raise SystemExit(error.exit_code) from None


@contextmanager
def _exit_on_interrupt() -> Iterator[None]:
    """Print on Ctrl-C how to resume, and exit with 130; typer itself would exit without a message."""
    try:
        yield
    except KeyboardInterrupt as stop:
        print(printable(f"\ndistill: {str(stop) or 'stopped.'}"), file=sys.stderr)
        raise SystemExit(130) from None


def _silence_libraries() -> None:
    """Turn off the progress bars and loading notes of other libraries, and print each warning once, on one line."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.formatwarning = _once(_one_line)


def _once(form: Callable[..., str]) -> Callable[..., str]:
    """Return a format of warnings that is empty for a text that was shown before.

    Networks are tried several times in a run, and would warn each time.
    """
    shown: set[str] = set()

    def form_once(*warning: Any, **place: Any) -> str:
        text = form(*warning, **place)
        known = text in shown
        shown.add(text)
        return "" if known else text

    return form_once


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format a warning without the source line that gave it, with "distill: " before those of this package."""
    return printable(f"{'distill: ' if 'distill' in Path(filename).parts else ''}{message}\n")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
