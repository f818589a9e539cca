"""`distill rerun`: a run once more, with its own options, and whether its students are the same to the bit."""

from collections.abc import Iterator
from pathlib import Path

from distill.cli.fit import run_fit
from distill.cli.fit_command import COMMAND, FitCommand
from distill.cli.student_runs import TIMES
from distill.errors import DistillError
from distill.processes import from_first, is_first
from distill.storage.files import MANIFEST, read_json
from distill.training.progress import console_of
from distill.training.run_folder import FINGERPRINTS, SETTINGS

WEIGHTS = (".safetensors", ".bin")
WAY_OUT = "make it anew: distill fit --config {run}/run.toml"


def run_again(run: Path, output: Path | None = None) -> Path:
    """Repeat a finished run in a new folder, print which of its students are the same, and return the report's path.

    How much longer one student is trained than another, where a clock decided it, is taken from the run.

    Args:
        run: the folder of the run.
        output: a new folder; by default `runs/NAME-N` with the first number that is free.

    Raises:
        DistillError: no finished run, or a folder that is used.
    """
    if not (run / COMMAND).exists():
        raise DistillError(f"{run} holds no run of distill fit; name the folder of one, e.g. runs/pvr-1.")
    if not (run / "result.json").exists():
        raise DistillError(
            f"{run} is not finished, so there is nothing to compare with; go on: distill fit --resume {run}."
        )
    command = FitCommand.read(run)
    report = run_fit(command, output, timed=run / TIMES)
    if is_first():
        console = console_of()
        for sentence in from_first(lambda: list(_compared(command, run, report.parent))):
            console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    return report


def _compared(command: FitCommand, before: Path, now: Path) -> Iterator[str]:
    """Yield a sentence on each student: whether its weights are those of the run before, and else what differs."""
    folders, others = command.folders(before), command.folders(now)
    for title in sorted(folders.keys() | others.keys()):
        if title not in folders or title not in others:
            yield f"{title}: only in {before if title in folders else now}."
            continue
        if _weights_of(folders[title]) == _weights_of(others[title]):
            yield f"{title}: the same to the bit as in {before}."
            continue
        changed = list(_changed(folders[title].parent, others[title].parent))
        why = f": changed since then: {', '.join(changed)}" if changed else ", with the same data and teacher"
        yield f"{title}: other weights than in {before}{why}."


def _weights_of(student: Path) -> dict[str, str]:
    """Return {file: SHA-256} of the weights of a saved student."""
    files = read_json(student / MANIFEST, WAY_OUT.format(run=student.parents[1]))["files"]
    return {name: each["sha256"] for name, each in files.items() if name.endswith(WEIGHTS)}


def _changed(before: Path, now: Path) -> Iterator[str]:
    """Yield what differs between two trainings, as their data or their teacher."""
    one, other = (read_json(each / SETTINGS, WAY_OUT.format(run=each.parent))[FINGERPRINTS] for each in (before, now))
    yield from sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
