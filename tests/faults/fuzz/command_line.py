"""Wrong invocations of the command line: what becomes of each, in this process.

`python -m tests.faults.fuzz.command_line [--every N] [--json FILE]`
"""

import argparse
import contextlib
import importlib
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import transformers

from tests.faults.fuzz.attack import Outcome, TookTooLong, limited
from tests.faults.fuzz.homes import DAMAGES, FILES, FINE, MENDED, distill, made

LONGEST = 60  # seconds
PAIRS = 8
HUGE = "9" * 30
NUMBERS = ("word", "", " ", "-1", "0", "0.5", "1.5", "1", "3", "nan", "inf", "-inf", "1e400", "1e-400", HUGE,
           "-" + HUGE, "0x10", "1_0", "1,5", "٣", "\x1b[31m3", "--", "True", "None", "2**3")  # fmt: skip
NAMES = ("", " ", "nonsense", "../..", "\x1b[31m", "a\nb", "kd,", ",", "kd,kd", "None", "0", "é" * 500, "--help me",
         "~")  # fmt: skip
PATHS = ("", "/", "/dev/null", "nowhere/at/all", "nowhere", "x" * 5000, "\x1b[31m", "a\nb", "folder of mine",
         "films.csv/below", "encoder", "films.csv", "nul\x00")  # fmt: skip
WHOLE = {"1", "3", "1_0", "٣", " 3"}
ABOVE_0 = WHOLE | {"0.5", "1.5"}
RIGHT: dict[str, set[str]] = {
    "--max-length": WHOLE | {HUGE},  # at most what the model reads
    "--split-seed": WHOLE | {"0", "-1"},
    "--seed": WHOLE | {"0", "-1"},
    "--student-layers": {"1"},
    "--fraction": {"0.5", "1"},
    "--epochs": {"0.5", "1", "1.5", "3", "1_0", HUGE},  # of which --steps wins
    "--steps": {"1", "3", "٣", "1_0"},
    "--batch-size": WHOLE,
    "--lr": ABOVE_0 | {HUGE},
    "--temperature": ABOVE_0 | {HUGE},
    "--share": {"0.5", "1"},
    "--sigma": ABOVE_0 | {"0", "1e-400", HUGE},
    "--pairs": WHOLE,
    "--examples": WHOLE,
    "--data": {"films.csv"},
    "--from": {"encoder"},
    "--output": {"nowhere", "nowhere/at/all", "folder of mine", "\x1b[31m", "a\nb"},
    "--objective": {"kd,kd"},
    "--batches": WHOLE | {HUGE},  # at most what the rows make
    "headroom --steps": {"0", "1", "3", "٣", "1_0"},
    "headroom --batch-size": WHOLE - {"1"},  # a batch pairs its rows
    "headroom --objective": set(),
}
"""The values that are right, by option, or by command and option; no other is."""
NAMES_OF_CLASSES = {"unknown labels.csv", "nan labels.csv", "real labels.csv"}
"""Files whose labels are right for a teacher, which learns them."""
OF_SOME_ROWS = {"short row.csv", "no label.csv"}
"""Files of which a row lacks its label, which is left out and said."""


@dataclass(frozen=True)
class Invocation:
    """What is called, with what is wrong in it."""

    name: str
    value: str
    arguments: tuple[str, ...]
    right: bool = False


def fits(*more: str, without: str = "", output: str = "new") -> tuple[str, ...]:
    """Return the arguments of a short training, and more."""
    given = {"--data": "films.csv", "--teacher": "teacher", "--steps": "1", "--batch-size": "8", "--objective": "kd",
             "--output": output}  # fmt: skip
    parts = [part for name, value in given.items() if name != without for part in (name, value)]
    return ("fit", *parts, "--any-teacher", *more)


def teaches(*more: str, without: str = "") -> tuple[str, ...]:
    """Return the arguments of a short training of a teacher, and more."""
    given = {"--data": "films.csv", "--from": "encoder", "--steps": "1", "--output": "new"}
    return ("teach", *(part for name, value in given.items() if name != without for part in (name, value)), *more)


def evaluates(*more: str, without: str = "") -> tuple[str, ...]:
    """Return the arguments of a short measurement, and more."""
    given = {"--data": "films.csv", "--teacher": "teacher", "--student": "student", "--pairs": "4"}
    return ("evaluate", *(part for name, value in given.items() if name != without for part in (name, value)), *more)


def foresees(*more: str, without: str = "") -> tuple[str, ...]:
    """Return the arguments of a short look at what a training could add, and more."""
    given = {"--data": "films.csv", "--teacher": "teacher", "--steps": "1", "--batches": "1", "--batch-size": "8"}
    return ("headroom", *(part for name, value in given.items() if name != without for part in (name, value)), *more)


def compares(*more: str, without: str = "") -> tuple[str, ...]:
    """Return the arguments of a short comparison of two runs, and more."""
    return ("compare", "run", "other", *(() if without == "--pairs" else ("--pairs", "4")), *more)


def audits(*more: str, without: str = "") -> tuple[str, ...]:
    """Return the arguments of a short audit, and more."""
    given = {"--data": "films.csv", "--pairs": "4", "--examples": "4", "--output": "new"}
    parts = [part for name, value in given.items() if name != without for part in (name, value)]
    return ("audit", "teacher", "student", *parts, *more)


COMMANDS = {
    "fit": fits, "teach": teaches, "evaluate": evaluates, "headroom": foresees, "compare": compares, "audit": audits,
}  # fmt: skip
OF_NUMBERS = {
    "fit": ("--max-length", "--split-seed", "--student-layers", "--fraction", "--epochs", "--steps", "--batch-size",
            "--lr", "--temperature", "--share", "--sigma", "--seed"),
    "teach": ("--max-length", "--fraction", "--epochs", "--steps", "--batch-size", "--lr", "--seed"),
    "evaluate": ("--max-length", "--share", "--pairs", "--seed", "--split-seed"),
    "compare": ("--pairs", "--seed"),
    "audit": ("--max-length", "--examples", "--pairs", "--seed"),
    "headroom": ("--student-layers", "--steps", "--batches", "--batch-size", "--lr", "--temperature", "--share",
                 "--sigma", "--seed"),
}  # fmt: skip
OF_NAMES = {
    "fit": ("--task", "--text", "--label", "--classes", "--mapping", "--objective", "--sources", "--param-dtype"),
    "teach": ("--task", "--text", "--label", "--classes", "--param-dtype"),
    "evaluate": ("--task", "--text", "--label", "--classes", "--mapping"),
    "compare": (),
    "audit": ("--text", "--label", "--slice", "--mapping"),
    "headroom": ("--task", "--mapping", "--objective", "--sources"),
}
OF_PATHS = {
    "fit": ("--data", "--eval-data", "--teacher", "--output", "--resume"),
    "teach": ("--data", "--eval-data", "--from", "--output"),
    "evaluate": ("--data", "--eval-data", "--teacher", "--student", ""),
    "compare": ("--output", ""),
    "audit": ("--data", "--output"),
    "headroom": ("--teacher",),
}
CONFLICTS = [
    ("fit", "--data"), ("fit", "--nope"), ("fit", "extra"), ("fit", "--steps"), ("nope",), ("--nope",),
    ("teach",), ("evaluate",), ("objectives", "extra"), ("objectives", "--steps", "1"), ("evaluate", "run", "run"),
    fits("--task", "pvr"), fits("--task", "digits"), fits("--task", "mnist"), fits("--resume", "nowhere"),
    fits("--classes", "positive,negative"), fits("--classes", "a,b"), fits("--classes", "negative,negative"),
    fits("--eval-data", "films.csv"), fits("--teacher", "student", "--student-layers", "2"),
    fits("--objective", "diito", "--mapping", "block_output.0~block_output.9", without="--objective"),
    fits("--mapping", "~"), fits("--mapping", "a~b"), fits("--mapping", "block_output.0~"),
    fits("--mapping", "block_output.0~block_output.0,block_output.0"), fits("--text", "label"),
    fits("--text", "label", "--label", "text"), fits("--max-length", "100000000"),
    teaches("--resume"), teaches("--anyway"), teaches("--task", "pvr"), teaches("--from", "nowhere", without="--from"),
    teaches("--classes", "positive"), evaluates("--task", "pvr"), ("evaluate", "run", "--student", "student"),
    ("evaluate", "run", "--data", "test.csv", "--task", "pvr"), 
    ("evaluate", "--teacher", "teacher"), ("fit", "--resume", "teacher"), ("fit", "--resume", "films.csv"),
    ("evaluate", "teacher"), ("evaluate", "films.csv"), ("evaluate", "student"), evaluates(without="--data"),
    fits(without="--teacher"), teaches(without="--output"), teaches(without="--from"),
    ("compare",), ("compare", "run"), ("compare", "run", "run"), ("compare", "teacher", "run"), compares("--data", "a"),
    ("audit",), ("audit", "teacher"), ("audit", "teacher", "student"), audits("--slice", "text", "--mapping", "0~9"),
    audits("--data", "pvr", without="--data"), audits("--mapping", "0~0 0~0"), audits("--text", "label"),
]  # fmt: skip
HARMLESS = [fits("--text", "label"), fits("--text", "label", "--label", "text"), fits("--max-length", "100000000"),
            ("evaluate", "run", "--student", "student"), teaches("--anyway"), fits("--mapping", "~"),
            audits("--text", "label")]  # fmt: skip


def invocations() -> Iterator[Invocation]:
    """Yield all that is tried."""
    for command, begun in COMMANDS.items():
        for options, values in ((OF_NUMBERS, NUMBERS), (OF_NAMES, NAMES), (OF_PATHS, PATHS)):
            for option in options[command]:
                for value in values:
                    taken = () if option == "" else (option,)
                    arguments = (command, value) if not taken else begun(option, value, without=option)
                    right = RIGHT.get(f"{command} {option}", RIGHT.get(option, set()))
                    yield Invocation(f"{command} {option}", value, arguments, value in right)
    for name in FILES:
        for command, begun in COMMANDS.items():
            if command == "compare":
                continue
            fine = (FINE - {"good.txt"} | NAMES_OF_CLASSES if command == "teach" else FINE) | OF_SOME_ROWS
            right = name in (fine | {"one class.csv", "one row.csv"} if command == "audit" else fine)
            yield Invocation(f"{command} --data", name, begun("--data", f"files/{name}", without="--data"), right)
    for damage in DAMAGES:
        teacher, student = f"teacher {damage}", f"student {damage}"
        unread = damage == "with a cut log"
        yield Invocation("fit --teacher", damage, fits("--teacher", teacher, without="--teacher"), unread)
        yield Invocation("fit --resume", damage, ("fit", "--resume", f"stopped {damage}"), damage in MENDED)
        yield Invocation("evaluate RUN", damage, ("evaluate", f"run {damage}", "--pairs", "4"), unread)
        yield Invocation("compare RUN", damage, ("compare", f"run {damage}", "other", "--pairs", "4"), unread)
        yield Invocation("evaluate --student", damage, evaluates("--student", student, without="--student"), unread)
    for arguments in CONFLICTS:
        yield Invocation("conflict", " ".join(arguments), arguments, arguments in HARMLESS)


def invoked(invocation: Invocation, home: Path) -> Outcome:
    """Call, and say what became of it: clear, right, silent, raw or hangs."""
    with contextlib.chdir(home):
        before = {*home.iterdir()}
        try:
            with limited(LONGEST):
                status, _out, err = distill(*invocation.arguments)
            kind, text = _kind(invocation, status, err), f"{status}: {err or _out[-200:]}"
        except TookTooLong:
            kind, text = "hangs", ""
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            kind, text = "raw", f"{type(error).__name__} at {frame.filename}:{frame.lineno}: {error}"[:300]
        left = {*home.iterdir()} - before
        if left and kind == "clear" and not invocation.right:
            kind, text = "left", f"{[path.name for path in left]}; {text}"
        for path in left:
            _remove(path)
    return Outcome("distill", invocation.name, invocation.value[:60], kind, text)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _kind(invocation: Invocation, status: int, err: str) -> str:
    if status == 0:
        return "right" if invocation.right else "silent"
    told = [line for line in err.splitlines() if line.startswith("distill: ")]
    others = [line for line in err.splitlines() if not line.startswith(("distill: ", "note: "))]
    is_line = bool(told) and not others and not set(err) & set("\x1b\r\x00")
    return "clear" if status in (1, 2) and is_line and "Traceback" not in err else "raw"


@contextlib.contextmanager
def home() -> Iterator[Path]:
    """Make what is needed, in a folder that is removed, with a cache of its own."""
    fit, measurement = (importlib.import_module(f"distill.{name}") for name in ("cli.fit", "evaluation.measurement"))
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    whole, most, kept = fit.compare, measurement.MOST_PAIRS, dict(os.environ)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.environ |= {"DISTILL_CACHE": f"{folder}/.cache", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
            os.environ.pop(name, None)
        fit.compare, measurement.MOST_PAIRS = partial(whole, pairs=PAIRS), PAIRS
        try:
            yield made(Path(folder))
        finally:
            fit.compare, measurement.MOST_PAIRS = whole, most
            os.environ.clear()
            os.environ.update(kept)


def main(arguments: list[str] | None = None) -> int:
    """Try all, print what is lost, and count."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz.command_line")
    parser.add_argument("names", nargs="*", help="how invocations begin; all by default")
    parser.add_argument("--every", type=int, default=1, help="try each so many alone")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    chosen = [each for each in invocations() if not given.names or each.name.startswith(tuple(given.names))]
    with home() as folder:
        outcomes = [invoked(each, folder) for each in chosen[:: given.every]]
    counts = Counter(each.kind for each in outcomes)
    for each in outcomes:
        if each.kind not in ("clear", "right"):
            print(f"{each.kind:7}{each.argument} {each.value!r}: {each.text!r}"[:400])
    print(f"{len(outcomes)} tried: " + ", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    if given.json:
        given.json.write_text(json.dumps([asdict(each) for each in outcomes]))
    return int(set(counts) > {"clear", "right"})


if __name__ == "__main__":
    sys.exit(main())
