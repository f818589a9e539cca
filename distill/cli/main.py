"""The command line: `distill fit`, `evaluate`, `compare`, `audit`, `headroom`, `teach`, …, and how each exits."""

import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from distill.cli.flags import (
    AnyTeacher,
    Anyway,
    BatchSize,
    Classes,
    Clusters,
    Compressed,
    Data,
    Debug,
    Epochs,
    EvalData,
    Every,
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
    Seeds,
    Share,
    Sigma,
    SliceBy,
    SourceRule,
    SplitSeed,
    Steps,
    StudentLayers,
    Task,
    Teacher,
    Temperature,
    Text,
    TextsOrTask,
)
from distill.cli.messages import (
    exit_on_interrupt,
    is_refusal,
    message_of,
    refuse_usage,
    say,
    silence_libraries,
    together,
)

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
    temperature: Temperature = 2.0,
    share: Share = 0.3,
    sigma: Sigma = 1.0,
    seed: Seed = 0,
    seeds: Seeds = None,
    output: Annotated[Path | None, typer.Option(help="A new folder for everything; runs/… by default.")] = None,
    resume: ResumeFolder = None,
    every: Every = "200",
    anyway: Anyway = False,
    any_teacher: AnyTeacher = False,
    debug: Debug = False,
) -> None:
    """Distil a teacher into a smaller student: by its answers, and by interchange."""
    from distill.cli.fit import run_or_resume
    from distill.cli.fit_command import FitCommand
    from distill.cli.options import DataOptions, InterchangeOptions, ScheduleOptions, sources_of

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
        seeds=tuple(seeds or ()),
        every=every,
    )
    with exit_on_interrupt():
        run_or_resume(command, output, resume, anyway=anyway)


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
    with exit_on_interrupt():
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

    with exit_on_interrupt():
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
    temperature: Temperature = 2.0,
    share: Share = 0.3,
    sigma: Sigma = 1.0,
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
    with exit_on_interrupt():
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
    with exit_on_interrupt():
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
    with exit_on_interrupt():
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
        silence_libraries()
        with together():
            status = app(args=_one_each(sys.argv[1:]), prog_name="distill", standalone_mode=False)
    except UsageError as error:
        refuse_usage(error)
    except typer.Abort:
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        if "--debug" in sys.argv or not is_refusal(error):
            raise
        say(f"distill: {' '.join(message_of(error).split())}")
        raise SystemExit(2) from None
    if status:
        raise SystemExit(status)


def _one_each(arguments: list[str]) -> list[str]:
    """Return the arguments with `--seeds` before every seed, as typer takes one value an option."""
    found, several = list[str](), False
    for each in arguments:
        several = each == "--seeds" or (several and each.isdecimal())
        found += ["--seeds", each] if several and found and found[-1] != "--seeds" and each != "--seeds" else [each]
    return found


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
