"""What a DIITO step costs beside a plain KD step: with reuse of the base runs, and by three full runs of each model.

    python benchmarks/diito_cost.py [--device cuda] [--rounds 20]

All sides run in one process, in turn, on the same batches; the figures are ratios of medians of seconds. One JSON
line is
appended to `diito_cost.json`. The naive side is what a reference implementation does: base, source and counterfactual
from scratch, in teacher and student.
"""

import argparse
import json
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

import distill
from distill.interchange.mapping import entries_of
from distill.losses import kd
from distill.models.inputs import inputs_of
from distill.training.computation import Computation
from interventions import Run, interchange, run


def model(layers: int, seed: int, device: torch.device) -> BertForSequenceClassification:
    """A random BERT of width 384."""
    torch.manual_seed(seed)
    sizes = dict(hidden_size=384, num_attention_heads=12, intermediate_size=1536, num_labels=2)
    config = BertConfig(num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    return BertForSequenceClassification(config).to(device)


def naive_terms(teacher, student, pair, batch, generator) -> dict[str, torch.Tensor]:
    """KD and DIITO by three full runs of each model."""
    permutation = torch.randperm(len(batch["labels"]), generator=generator, device=generator.device)
    shuffled = {name: column[permutation] for name, column in batch.items()}
    rows, width = batch["input_ids"].shape
    real = batch["attention_mask"].bool()
    uniform = torch.rand(rows, 2, width, generator=generator, device=generator.device)
    chosen, taken = distill.Span(0.3).draw(real, real[permutation], uniform)
    logits = {}
    for side, net, locations in (("teacher", teacher, pair.teacher), ("student", student, pair.student)):
        with torch.set_grad_enabled(side == "student"):
            base = run(net, inputs_of(net, batch), resumable=False)
            inputs = inputs_of(net, shuffled)
            source = run(net, inputs, locations, resumable=False)  # to the end, as the reference does
            after: Run = interchange(
                net, base.inputs, source, locations, positions=chosen, source_positions=taken, resume=False
            )
        logits[side] = (base.logits, after.logits)
    return {
        "kd": kd(logits["student"][0], logits["teacher"][0], 2.0),
        "kd_cf": kd(logits["student"][1], logits["teacher"][1], 2.0),
    }


def main() -> None:
    """Measure and append."""
    options = argparse.ArgumentParser()
    options.add_argument("--device", default="cpu")
    options.add_argument("--rounds", type=int, default=12)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--tokens", type=int, default=48)
    asked = options.parse_args()
    device = torch.device(asked.device)
    teacher, student = model(12, 0, device).eval(), model(6, 1, device).train()
    pairs = entries_of(distill.layer_mapping(teacher, student, "full"), teacher, student)
    generator = torch.Generator(device).manual_seed(0)
    batch = {
        "input_ids": torch.randint(1000, 30000, (asked.batch, asked.tokens), device=device),
        "attention_mask": torch.ones(asked.batch, asked.tokens, dtype=torch.long, device=device),
        "labels": torch.zeros(asked.batch, dtype=torch.long, device=device),
    }
    plain = Computation(teacher, student, pairs, [distill.KD(2.0)]).to(device)
    reuse = Computation(teacher, student, pairs, [distill.KD(2.0), distill.DIITO()]).to(device)
    drawn = torch.Generator().manual_seed(0)
    sides = {
        "KD": lambda: plain(batch, generator),
        "KD + DIITO": lambda: reuse(batch, generator),
        "KD + DIITO, naive": lambda: naive_terms(
            teacher, student, pairs[int(torch.randint(len(pairs), (), generator=drawn))], batch, generator
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(asked.rounds + 2):
        for name, terms in sides.items():
            began = time.perf_counter()
            sum(terms().values()).backward()
            student.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "date": str(date.today()),
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()} cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "settings": {**vars(asked), "teacher_layers": 12, "student_layers": 6, "width": 384, "mapping": "full"},
        "median_seconds": {name: round(value, 4) for name, value in medians.items()},
        "ratio_to_KD": {name: round(value / medians["KD"], 3) for name, value in medians.items()},
    }
    print(json.dumps(result, indent=1))
    with Path(__file__).with_suffix(".json").open("a") as log:
        log.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
