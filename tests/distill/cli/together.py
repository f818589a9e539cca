"""Runs commands in as many processes as it is started in, and prints what each of them printed, as JSON.

Run by `test_together.py`: python -m tests.distill.cli.together FOLDER.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch

from distill.cli import main
from distill.comparison.compare import compare
from distill.evaluation.evaluate import evaluate
from distill.evaluation.metrics import accuracy
from distill.processes import dividing, from_first, gather_parts, gather_results, may_say, own_part, process_state
from tests.distill.conftest import save_bert, sentences, write_csv
from tests.distill.tiny_models import bert, gpt2_lm, spread, text

PAIRS = 40


def command(*arguments: object) -> dict[str, object]:
    """Return the exit status, output and errors of a command."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv, status = ["distill", *map(str, arguments)], 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def in_process(rank: int, error: Exception) -> str:
    """Return the error that comes of one in one process."""

    def fail() -> None:
        if process_state().process_index == rank:
            raise error

    try:
        gather_results(fail)
    except Exception as found:
        return f"{type(found).__name__}: {found}"
    return ""


def figures() -> dict[str, object]:
    """Return what two networks' figures are, measured by each process whole and divided among them."""
    teacher, student, rows = spread(bert(4)), spread(bert(2), 1), text(9)
    decoders = spread(gpt2_lm(2)), spread(gpt2_lm(1), 1)
    found = {}
    for name, block in {"whole": contextlib.nullcontext(), "divided": dividing(teacher, student)}.items():
        with block:
            measured = evaluate(teacher, student, "full", rows, pairs=PAIRS)
            found[name] = {
                "own pairs": len(own_part(torch.arange(PAIRS))),
                "figures": measured.to_dict(),
                "decoders": evaluate(*decoders, {}, text(9, labels=False)).to_dict(),
                "decoders on one row": evaluate(*decoders, {}, text(1, labels=False)).to_dict(),
                "accuracy of one row": accuracy(student, rows.take(torch.tensor([0]))).value,
                "compared": compare(
                    teacher, {"a": student, "b": spread(bert(2), 2)}, "full", rows, pairs=PAIRS
                ).to_dict(),
            }
    return found


def commands(folder: Path) -> dict[str, dict[str, object]]:
    """Return what commands say, which succeed and which fail."""
    teacher, data, run = folder / "teacher", folder / "films.csv", folder / "run"
    if process_state().is_main_process:
        save_bert(teacher, classifier=True)
        write_csv(data, sentences(60))
    process_state().wait_for_everyone()
    train = ["fit", "--data", data, "--teacher", teacher, "--any-teacher", "--student-layers", 2, "--steps", 2]
    train += ["--batch-size", 8, "--objective", "kd", "--eval-pairs", PAIRS]
    os.chdir(folder)
    return {
        "fit": command(*train, "--output", run),
        "claimed": command(*train),
        "cache": command(
            "cache", "--data", data, "--teacher", teacher, "--output", folder / "answers", "--batch-size", 8
        ),
        "evaluate": command("evaluate", run, "--pairs", PAIRS),
        "used": command(*train, "--output", run),
        "missing": command(*train[:2], folder / "none.csv", *train[3:]),
        "usage": command("fit", "--stepz", 1),
        "finished": command("fit", "--resume", run),
    }


if __name__ == "__main__":
    state = process_state()
    told = {
        "from first": from_first(lambda: state.process_index),
        "undivided": gather_parts(lambda: state.process_index),
        "all": gather_results(lambda: state.process_index),
        "errors": [in_process(rank, error) for rank in (0, 1) for error in (ValueError("no"), OSError(2, "gone"))],
        "said": [may_say("a"), may_say("a"), may_say(f"{state.process_index}")],
        "figures": figures(),
        "commands": commands(Path(sys.argv[1])),
    }
    print(json.dumps(told))
    state.destroy_process_group()
