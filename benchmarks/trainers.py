"""The same small distillation by `distill.fit`, by two trainers, and by a bare loop in torch: time of a step, losses.

    python benchmarks/trainers.py [--peers FOLDER] [--steps 100] [--rounds 3]
    python benchmarks/trainers.py --page  # write the figures into docs/language-models.md, and measure nothing

The job: stories260K teaches a student of two of its five layers, by KD at temperature 1 over the next tokens of 8
blocks of 64 tokens of WikiText-2 a step, each block once; AdamW with a constant rate, no weight decay, no clipping. So
every side computes the same teacher, student, divergence and update, on the same rows in the same order, and logs,
measures and saves nothing.

- `bare loop`: the loop that one writes by hand.
- `distill.fit`
- `transformers.Trainer`, with a `compute_loss` written by hand.
- `trl.DistillationTrainer`, from the folder of `--peers` or where it is installed, else left out. It trains on what the
  student writes; here a subclass gives it the tokens of the text as if they had been written, which leaves out the
  writing and nothing else.

A side runs in a process of its own, with one thread; in a round all sides run in turn, the order reversed in every
second one. `step` is the processor time from one forward to the next, the mean over all steps but the first ten;
`whole` is that of the call, with all that is set up, without imports. The ratios are to the bare loop of the same
round: least, median and largest of the rounds. `losses` says how far the losses of all steps are from those of the bare
loop. All is written into `trainers.json`.
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

FILE = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parent.parent / "docs" / "language-models.md"
DATA = Path(os.environ.get("SHARED_DATA", "../shared/data"))
MODEL, TEXT = DATA / "models" / "stories260K", DATA / "wikitext" / "train.txt.gz"
ROWS, LENGTH, RATE, FIRST = 8, 64, 1e-3, 10
BARE = "bare loop"
Losses = list[float] | list[Tensor]
marks: list[float] = []
"""The processor time at the forward of each step."""


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of the student from the teacher over all tokens that have a next one."""
    logs = [each[:, :-1].flatten(0, 1).log_softmax(-1) for each in (student, teacher)]
    return functional.kl_div(*logs, reduction="batchmean", log_target=True)


def by_hand(teacher: nn.Module, student: nn.Module, rows: Tensor, tokenizer: Any) -> Losses:
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.0)
    losses = []
    teacher.eval()
    student.train()
    for ids in rows.split(ROWS):
        marks.append(time.process_time())
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            taught = teacher(**inputs).logits
        loss = divergence(student(**inputs).logits, taught)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fitted(teacher: nn.Module, student: nn.Module, rows: Tensor, tokenizer: Any) -> Losses:
    from rich.console import Console

    import distill

    class Marked(distill.KD):
        def forward(self, step: Any) -> dict[str, Tensor]:
            marks.append(time.process_time())
            return super().forward(step)

    data = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}
    result = distill.fit(
        teacher, student, None, data, objective=Marked(1.0), schedule=schedule_of(len(rows) // ROWS),
        console=Console(quiet=True),
    )  # fmt: skip
    return [record.loss for record in result.records]


def schedule_of(steps: int) -> Any:
    import distill

    return distill.Schedule(
        steps=steps, batch_size=ROWS, lr=RATE, warmup=0.0, decay="constant", clip=None, weight_decay=0.0
    )


def settings(kind: Any, folder: str, steps: int, **more: Any) -> Any:
    return kind(
        folder, max_steps=steps, per_device_train_batch_size=ROWS, learning_rate=RATE, weight_decay=0.0,
        max_grad_norm=0.0, lr_scheduler_type="constant", optim="adamw_torch", report_to="none", save_strategy="no",
        eval_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False,
        gradient_checkpointing=False, **more,
    )  # fmt: skip


def by_transformers(teacher: nn.Module, student: nn.Module, rows: Tensor, tokenizer: Any) -> Losses:
    import transformers
    from torch.utils.data import SequentialSampler

    losses: list[Tensor] = []
    teacher.eval()

    class Distilling(transformers.Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(train_dataset or self.train_dataset)

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            marks.append(time.process_time())
            with torch.no_grad():
                taught = teacher(**inputs).logits
            loss = divergence(model(**inputs).logits, taught)
            losses.append(loss.detach())
            return loss

    data: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        given = settings(transformers.TrainingArguments, folder, len(rows) // ROWS)
        Distilling(student, given, train_dataset=data).train()
    return losses


def by_trl(teacher: nn.Module, student: nn.Module, rows: Tensor, tokenizer: Any) -> Losses:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    losses: list[Tensor] = []
    texts = rows.tolist()

    class OfText(DistillationTrainer):
        def _generate(self, prompts: list[str]) -> Any:
            chosen = [texts[int(number)] for number in prompts]
            return [row[:1] for row in chosen], [row[1:] for row in chosen], None, None, None

        def compute_loss(self, *given: Any, **named: Any) -> Any:
            marks.append(time.process_time())
            loss = super().compute_loss(*given, **named)
            losses.append(loss.detach())
            return loss

    numbers = Dataset.from_dict({"prompt": [str(number) for number in range(len(rows))]})
    with tempfile.TemporaryDirectory() as folder:
        given = settings(
            DistillationConfig, folder, len(rows) // ROWS, beta=0.0, temperature=1.0, shuffle_dataset=False,
            max_completion_length=LENGTH - 1,
        )  # fmt: skip
        OfText(student, teacher, given, numbers, processing_class=tokenizer).train()
    return losses


SIDES: dict[str, Callable[..., Losses]] = {
    BARE: by_hand,
    "distill.fit": fitted,
    "transformers.Trainer": by_transformers,
    "trl.DistillationTrainer": by_trl,
}


def blocks(tokenizer: Any, rows: int) -> Tensor:
    """The first blocks of the text, `[rows, LENGTH]`."""
    with gzip.open(TEXT, "rt", encoding="utf-8") as file:
        text = file.read(rows * LENGTH * 4)
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    return ids[: rows * LENGTH].view(rows, LENGTH)


def run_side(side: str, steps: int) -> dict[str, Any]:
    """Train by one side, and return its times and losses."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import distill
    from distill.training.schedule import order

    if side.startswith("trl."):
        import trl.trainer.distillation_trainer  # noqa: F401
    _ = distill.fit, transformers.Trainer  # which are imported when they are first named
    marks.clear()
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left", pad_token="<unk>")
    rows = blocks(tokenizer, steps * ROWS)
    if side != "distill.fit":  # which takes the rows in an order that its seed decides
        rows = torch.cat([rows[chosen] for chosen in order(len(rows), schedule_of(steps), range(steps))])
    teacher = AutoModelForCausalLM.from_pretrained(MODEL)
    student = distill.from_layers(teacher, 2)
    began = time.process_time()
    losses = SIDES[side](teacher, student, rows, tokenizer)
    whole = time.process_time() - began
    counted = marks[-steps:][FIRST:]  # trials before the first step run a forward too
    return {
        "step": (counted[-1] - counted[0]) / (len(counted) - 1), "whole": whole, "losses": [float(x) for x in losses],
    }  # fmt: skip


def started(side: str, given: argparse.Namespace) -> dict[str, Any] | None:
    """Run a side in a process of its own; None where what it needs is not there."""
    command = [sys.executable, __file__, "--side", side, "--steps", str(given.steps)]
    command += [] if given.peers is None else ["--peers", str(given.peers)]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if ran.returncode:
        why = (ran.stderr.strip().splitlines() or [f"ended with {ran.returncode}"])[-1]
        if side.startswith("trl.") and "No module named 'trl'" in why:
            return None
        raise SystemExit(f"{side}: {why}")
    return json.loads(ran.stdout.strip().splitlines()[-1])


def spread(figures: list[float]) -> dict[str, float]:
    found = {"min": min(figures), "median": statistics.median(figures), "max": max(figures)}
    return {name: round(value, 3) for name, value in found.items()}


def report(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of all sides, from their rounds."""
    bare, sides = found[BARE], {}
    for side, rounds in found.items():
        ratios = {
            name: spread([own[name] / other[name] for own, other in zip(rounds, bare, strict=True)])
            for name in ("step", "whole")
        }
        apart = [abs(a - b) for a, b in zip(rounds[0]["losses"], bare[0]["losses"], strict=True)]
        losses = rounds[0]["losses"]
        sides[side] = {
            "step [ms]": spread([1e3 * each["step"] for each in rounds]),
            "whole [s]": spread([each["whole"] for each in rounds]),
            "step / bare loop": ratios["step"], "whole / bare loop": ratios["whole"],
            "losses": {
                "first": round(losses[0], 6), "last": round(losses[-1], 6), "steps": len(losses),
                "largest difference from bare loop": float(f"{max(apart):.2g}"),
                "same in all rounds": all(each["losses"] == losses for each in rounds),
            },
        }  # fmt: skip
    return sides


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "accelerate", "trl"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def of_rounds(figures: dict[str, float], digits: int = 2) -> str:
    """Write the median with the least and the largest."""
    low, middle, high = (f"{figures[name]:.{digits}f}" for name in ("min", "median", "max"))
    return f"{middle} [{low}, {high}]"


def table(lines: dict[str, Any]) -> str:
    """Return the conditions and the figures as Markdown."""
    known, given = lines["versions"], lines["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in known.items())
    rows = [
        f"Measured on {lines['date']} with {versions}: {given['steps']} steps, {given['rounds']} rounds; "
        f"{lines['machine']}.",
        "",
        "| trained by | a step [ms] | / bare loop | the whole call / bare loop | losses, at most, from the bare loop |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, side in lines["sides"].items():
        step, whole = (of_rounds(side[f"{part} / bare loop"]) for part in ("step", "whole"))
        apart = side["losses"]["largest difference from bare loop"]
        beside = ["", "", ""] if name == BARE else [step, whole, f"{apart:.1g}"]
        rows.append(f"| {' | '.join([name, of_rounds(side['step [ms]'], 1), *beside])} |")
    return "\n".join(rows)


def with_figures(page: str, lines: dict[str, Any]) -> str:
    """Return the text of the page with other figures."""
    before, rest = page.split("\nMeasured on ", 1)
    return "\n".join([before, table(lines), "", rest.split("|\n\n", 1)[1]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="a folder that holds trl, if it is not installed")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--page", action="store_true", help="write the last figures into the page; measure nothing")
    given = parser.parse_args()
    if given.page:
        lines = json.loads(FILE.read_text(encoding="utf-8"))
        PAGE.write_text(with_figures(PAGE.read_text(encoding="utf-8"), lines), encoding="utf-8")
        return
    if given.peers is not None:
        sys.path.append(str(given.peers.absolute()))
    if given.side is not None:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        print(json.dumps(run_side(given.side, given.steps)))
        return
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(given.rounds):
        for side in list(found)[:: 1 if number % 2 == 0 else -1]:
            ran = started(side, given)
            if ran is None:
                found.pop(side)
                continue
            found[side].append(ran)
            print(f"{side:26} {1e3 * ran['step']:6.2f} ms a step", file=sys.stderr, flush=True)
    lines = {
        "date": str(date.today()),
        "machine": f"{platform.machine()} cpu, 1 thread, processor time of the process, a machine shared with others",
        "versions": versions(),
        "settings": {
            "model": MODEL.name, "student layers": 2, "rows of a step": ROWS, "tokens of a row": LENGTH,
            "steps": given.steps, "rounds": given.rounds, "rate": RATE,
            "optimizer": "AdamW, no weight decay, no clipping; torch's loop over parameters, distill.fit's foreach",
        },
        "sides": report(found),
    }  # fmt: skip
    FILE.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
