"""On-policy distillation beside TRL: the same loss on the same tokens, and the processor time of a step.

    PYTHONPATH=folder_of_trl python benchmarks/on_policy.py [--steps 30] [--rounds 3]

Teacher and student are stories260K and its first two layers of five; a step is of 8 prompts, after each of which the
student writes 24 tokens. The losses are those of the first step for β 0, 0.5 and 1: of `distill.KD` on what
`distill.Written` let the student write, and of `generalized_jsd_loss` of TRL on the same rows. The times are medians
of the processor time of a step, the optimizer's part included, of `distill.steps` and of two trainers of TRL in turn,
in one process; the ratios are of one round each, and their medians are written into `on_policy.json`.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import distill
from distill.losses import forward_kl, jensen_shannon, reverse_kl
from distill.objectives import Objective, Step

MODEL = Path(os.environ.get("SHARED_DATA", "../shared/data")) / "models" / "stories260K"
DIVERGENCES = {0.0: forward_kl, 0.5: partial(jensen_shannon, beta=0.5), 1.0: reverse_kl}
PROMPTS = [
    "Once upon a time", "Lily and Tom went to", "The little dog", "One day, a big bear", "Mom said", "There was a boy",
    "She was very happy and", "The sun",
]  # fmt: skip
TOKENS, RATE, FIRST = 24, 1e-4, 5  # the first steps of a run are not timed


class Remembered(Objective):
    """An objective of nothing that remembers the batch of the last step."""

    batch: dict[str, Tensor]

    def forward(self, step: Step) -> dict[str, Tensor]:
        Remembered.batch = dict(step.batch)
        return {"nothing": step.student.logits.sum() * 0}


def ours(teacher: Any, student: Any, rows: Any, steps: int, *objectives: Objective) -> Any:
    schedule = distill.Schedule(steps=steps, batch_size=len(PROMPTS), lr=RATE, warmup=0.0, decay="constant")
    data = distill.Written(rows, max_new_tokens=TOKENS)
    return distill.steps(teacher, student, {}, data, objective=list(objectives), schedule=schedule)


def losses(teacher: Any, student: Any, rows: Any) -> dict[str, Any]:
    from trl.experimental.gkd import GKDTrainer

    found = {}
    for beta, divergence in DIVERGENCES.items():
        record = next(
            ours(teacher, copy.deepcopy(student), rows, 1, distill.KD(1.0, divergence=divergence), Remembered())
        )
        batch = Remembered.batch
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = [model(**inputs).logits[:, :-1] for model in (student, teacher)]
        theirs = GKDTrainer.generalized_jsd_loss(*logits, labels=batch["labels"][:, 1:], beta=beta).item()
        tokens = int((batch["labels"] != -100).sum())
        found[f"beta {beta}"] = {
            "distill": record.loss, "trl": theirs, "difference": abs(record.loss - theirs), "tokens": tokens,
        }  # fmt: skip
    return found


def clocked(marks: list[float]) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.process_time())

    return Clock()


def settings(kind: Any, folder: str, steps: int, **more: Any) -> Any:
    return kind(
        folder, max_steps=steps, per_device_train_batch_size=len(PROMPTS), learning_rate=RATE,
        lr_scheduler_type="constant", report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        use_cpu=True, bf16=False, gradient_checkpointing=False, beta=1.0, temperature=1.0, **more,
    )  # fmt: skip


def gkd(teacher: Any, student: Any, tokenizer: Any, rows: Any, steps: int) -> list[float]:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def collate(items: list[Any]) -> dict[str, Tensor]:
        read = tokenizer(PROMPTS, return_tensors="pt", padding=True)
        ids, mask = read["input_ids"], read["attention_mask"]
        return {"input_ids": ids, "attention_mask": mask, "labels": ids, "prompts": ids, "prompt_attention_mask": mask}

    marks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = GKDTrainer(
            student, teacher, settings(GKDConfig, folder, steps, lmbda=1.0, max_new_tokens=TOKENS), collate,
            train_dataset=Dataset.from_dict({"messages": PROMPTS * steps}), processing_class=tokenizer,
            callbacks=[clocked(marks)],
        )  # fmt: skip
        trainer.train()
    return marks


def distillation(teacher: Any, student: Any, tokenizer: Any, rows: Any, steps: int) -> list[float]:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    marks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            student, teacher, settings(DistillationConfig, folder, steps, max_completion_length=TOKENS),
            Dataset.from_dict({"prompt": PROMPTS * steps}), processing_class=tokenizer, callbacks=[clocked(marks)],
        )  # fmt: skip
        trainer.train()
    return marks


def distilled(teacher: Any, student: Any, tokenizer: Any, rows: Any, steps: int) -> list[float]:
    divergence = distill.KD(1.0, divergence=reverse_kl)
    return [time.process_time() for _ in ours(teacher, student, rows, steps, divergence)]


def times(make: Callable[[], tuple[Any, Any]], tokenizer: Any, rows: Any, given: argparse.Namespace) -> dict[str, Any]:
    sides = {"distill.steps": distilled, "GKDTrainer": gkd, "DistillationTrainer": distillation}
    medians: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(given.rounds):
        for name, side in sides.items():
            marks = side(*make(), tokenizer, rows, given.steps)[FIRST:]
            medians[name].append(statistics.median(b - a for a, b in pairwise(marks)))
    ratios = {
        name: statistics.median(own / other for own, other in zip(medians["distill.steps"], each, strict=True))
        for name, each in medians.items() if name != "distill.steps"
    }  # fmt: skip
    return {
        "milliseconds": {name: [round(1e3 * each, 1) for each in found] for name, found in medians.items()},
        "distill.steps / other": {name: round(ratio, 3) for name, ratio in ratios.items()},
    }


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left", pad_token="<unk>")

    def make() -> tuple[Any, Any]:
        teacher = AutoModelForCausalLM.from_pretrained(MODEL)
        return teacher, distill.from_layers(teacher, 2)

    read = tokenizer(PROMPTS)
    rows = distill.Rows.of(
        {name: [torch.tensor(row) for row in read[name]] for name in ("input_ids", "attention_mask")}
    )
    report = {
        "date": str(date.today()), "device": f"{platform.machine()} cpu, 1 thread",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "trl")},
        "settings": {"prompts": len(PROMPTS), "new tokens": TOKENS, "steps": given.steps, "rounds": given.rounds},
        "losses": losses(*make(), rows), "times": times(make, tokenizer, rows, given),
    }  # fmt: skip
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
