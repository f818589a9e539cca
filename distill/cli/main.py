"""The command line: `distill fit`, `evaluate`, `compare`, `audit`, `headroom`, `teach`, …, and how each exits."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from distill.cli.messages import (
    exit_on_interrupt,
    is_refusal,
    message_of,
    refuse_usage,
    say,
    silence_libraries,
    together,
)
from distill.cli.options.flags import (
    AnyTeacher,
    Anyway,
    BatchSize,
    ClusterFlags,
    Compressed,
    Config,
    Debug,
    Every,
    Fraction,
    Label,
    LanguageFlags,
    LearningRate,
    MappedBlocks,
    MaxLength,
    MonitorFlags,
    Original,
    PackingFlags,
    Push,
    ResumeFolder,
    RowFlags,
    ScheduleFlags,
    Seed,
    Seeds,
    Share,
    SliceBy,
    StudentFlags,
    Teacher,
    Temperature,
    Text,
    TextsOrTask,
    TopK,
)
from distill.cli.options.signatures import takes
from interventions import __version__

app = typer.Typer(
    help="Train a student to compute like its teacher, and measure how far it does.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

UsageError: Any = typer.BadParameter.__base__
"""The error that typer raises for options: click's, or that of typer's own copy of click."""


def _print_version(wanted: bool) -> bool:
    """Print the version of the distribution, which holds both packages, and exit."""
    if wanted:
        print(f"distill {__version__}")
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
@takes(RowFlags, ClusterFlags, PackingFlags, StudentFlags, LanguageFlags, ScheduleFlags, MonitorFlags)
def fit(
    seed: Seed = 0,
    seeds: Seeds = None,
    output: Annotated[Path | None, typer.Option(help="A new folder for everything; runs/… by default.")] = None,
    resume: ResumeFolder = None,
    every: Every = "200",
    anyway: Anyway = False,
    any_teacher: AnyTeacher = False,
    push: Push = None,
    config: Config = None,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Distil a teacher into a smaller student: by its answers, and by interchange."""
    from distill.cli.fit import run_or_resume
    from distill.cli.fit_command import FitCommand

    own = {"seed": seed, "seeds": seeds, "every": every, "any_teacher": any_teacher}
    with exit_on_interrupt():
        run_or_resume(FitCommand.of_options({**options, **own}), output, resume, anyway=anyway, push=push)


@app.command()
@takes(RowFlags, ClusterFlags, PackingFlags)
def cache(
    output: Annotated[Path, typer.Option(help="The folder of the answers; what it has is not computed again.")],
    teacher: Teacher = None,
    fraction: Fraction = 1.0,
    top_k: TopK = None,
    temperature: Temperature = 2.0,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 64,
    seed: Seed = 0,
    debug: Debug = False,
    **rows: Any,
) -> None:
    """Compute the answers of a teacher to all training rows, for trainings that read them: distill fit --cache."""
    from distill.cli.cache import run_cache
    from distill.cli.options.groups import DataOptions

    with exit_on_interrupt():
        source = DataOptions.of_options({**rows, "fraction": fraction})
        run_cache(source, teacher, seed, output, batch_size=batch_size, top_k=top_k, temperature=temperature)


@app.command()
def rerun(
    run: Annotated[Path, typer.Argument(help="The folder of a finished `distill fit`.")],
    output: Annotated[Path | None, typer.Option(help="A new folder for everything; runs/… by default.")] = None,
    debug: Debug = False,
) -> None:
    """Repeat a run with its own options in a new folder, and say whether its students are the same to the bit."""
    from distill.cli.rerun import run_again

    with exit_on_interrupt():
        run_again(run, output)


@app.command()
@takes(RowFlags, ClusterFlags, PackingFlags)
def evaluate(
    run: Annotated[Path | None, typer.Argument(help="The folder of a finished `distill fit`.")] = None,
    teacher: Annotated[str | None, typer.Option(help="A classifier: folder or hub name.")] = None,
    student: Annotated[Path | None, typer.Option(help="The folder of a student.")] = None,
    mapping: Annotated[str, typer.Option(help="full, middle, late or single.")] = "full",
    share: Share = 0.3,
    pairs: Annotated[int, typer.Option(help="How many pairs of base and source.")] = 2000,
    seed: Seed = 0,
    debug: Debug = False,
    **rows: Any,
) -> None:
    """Measure accuracy and interchange accuracy of students on held-out pairs."""
    from distill.cli.evaluate import run_evaluate
    from distill.cli.options.groups import DataOptions, InterchangeOptions

    with exit_on_interrupt():
        source, interchanges = DataOptions.of_options(rows), InterchangeOptions(mapping, share=share)
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
@takes(RowFlags, StudentFlags)
def headroom(
    fraction: Fraction = 1.0,
    steps: Annotated[int, typer.Option(help="Steps of training without interchange before.")] = 200,
    batches: Annotated[int, typer.Option(help="Batches to measure on.")] = 8,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    seed: Seed = 0,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Measure, before a fit, whether its interchanges ask a student for something that its answers do not."""
    from distill.cli.fit_command import FitCommand
    from distill.cli.headroom import run_headroom

    own = {"fraction": fraction, "batch_size": batch_size, "lr": lr, "seed": seed}
    with exit_on_interrupt():
        run_headroom(FitCommand.of_options({**options, **own}), steps, batches)


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
@takes(RowFlags, ScheduleFlags)
def teach(
    output: Annotated[Path, typer.Option(help="A new folder for the teacher.")],
    encoder: Annotated[str | None, typer.Option("--from", help="An encoder to fine-tune: folder or hub name.")] = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in the output folder.")] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Resume although the data or a version has changed.")
    ] = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Train a teacher: fine-tune an encoder on a task, or train the network of an embedded task."""
    from distill.cli.options.groups import DataOptions, ScheduleOptions
    from distill.cli.teach import run_teach

    with exit_on_interrupt():
        source, timing = DataOptions.of_options(options), ScheduleOptions.of_options(options)
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
