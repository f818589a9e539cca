"""What one step of each objective costs beside a step of plain KD.

    python benchmarks/objectives_cost.py [--groups bert cnn mlm] [--rounds 5] [--device cuda]

A step is one of `distill.steps`, the optimizer's part included. All sides of a group take their steps in turn, each
with a student of its own from the same weights; the figures are ratios of medians of seconds, within one run. What
takes part beside KD is written "KD + ...". One JSON line for each group is appended to `objectives_cost.json`, and
with it how often teacher and student ran to their heads in one step. Where medians and the fastest steps disagree,
other work disturbed the run.

Teachers have random weights. The rows of BSS have the labels that the teacher gives them, so that all are moved; it
stops when all have crossed the boundary, after 10 steps at most: how many of those it takes depends on the teacher.

The groups: a BERT classifier of 12 layers × 384 and a student of 6, the same with the head of a masked language model,
and two CNNs on images of 28 × 28. Sides with "in 4 parts" have `accumulate=4`.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

import distill
from distill import (
    AT,
    BSS,
    CRD,
    DIITO,
    DKD,
    ICD,
    KD,
    PKD,
    Cosine,
    DistilBERT,
    FitNets,
    Labels,
    MaskedLM,
    Sobolev,
    TinyBERT,
)
from distill.networks import CNN
from interventions import Location

VOCABULARY, CLASSES, FOREVER = 30522, 10, 10**6  # steps, so that no schedule of an objective moves while it is timed
IN_PARTS = " in 4 parts"


@dataclass(frozen=True)
class Group:
    """Two models, the rows that they see, and what is compared on them.

    Attributes:
        mapping: for those that need one.
        head: the name of the module that ends a run of either model.
        sides: objectives by name, made anew for each student.
        parted: names of the sides that are also measured in parts.
    """

    teacher: nn.Module
    student: nn.Module
    rows: dict[str, Tensor]
    mapping: dict
    head: str
    sides: dict[str, Callable[[], list[distill.Objective]]]
    parted: tuple[str, ...]


def seeded(made: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return made()


def bert(kind: type, layers: int, seed: int) -> nn.Module:
    sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_labels": CLASSES}
    config = BertConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **sizes)
    return seeded(lambda: kind(config), seed)


def beside_kd(*objectives: Callable[[], distill.Objective]) -> Callable[[], list[distill.Objective]]:
    return lambda: [KD(), *(each() for each in objectives)]


def tokens(asked: argparse.Namespace) -> dict[str, Tensor]:
    ids = torch.randint(1000, VOCABULARY, (asked.rows, asked.tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def classifiers(asked: argparse.Namespace) -> Group:
    teacher, student = (bert(BertForSequenceClassification, *sizes) for sizes in ((12, 0), (6, 1)))
    sides = {
        "KD": beside_kd(),
        "KD + Labels": beside_kd(Labels),
        "DKD": lambda: [DKD()],
        "KD + Cosine": beside_kd(Cosine),
        "KD + PKD": beside_kd(PKD),
        "KD + FitNets": beside_kd(FitNets),
        "KD + AT": beside_kd(AT),
        "TinyBERT": lambda: [TinyBERT()],
        "KD + CRD": beside_kd(CRD),
        "KD + ICD": beside_kd(ICD),
        "KD + Sobolev": beside_kd(Sobolev),
        "KD + BSS": beside_kd(lambda: BSS(both=False)),
        "KD + DIITO": beside_kd(DIITO),
        "KD + DIITO Crossway": beside_kd(lambda: DIITO(distill.Crossway())),
    }
    labels = torch.randint(CLASSES, (asked.rows,), generator=torch.Generator().manual_seed(1))
    mapping = distill.layer_mapping(teacher, student, "full")
    parted = ("KD", "TinyBERT", "KD + CRD", "KD + DIITO")
    return Group(teacher, student, tokens(asked) | {"labels": labels}, mapping, "classifier", sides, parted)


def masked(asked: argparse.Namespace) -> Group:
    teacher, student = (bert(BertForMaskedLM, *sizes) for sizes in ((12, 0), (6, 1)))
    rows = tokens(asked)
    chosen = torch.rand(rows["input_ids"].shape, generator=torch.Generator().manual_seed(2)) < 0.15
    rows["labels"] = rows["input_ids"].masked_fill(~chosen, -100)
    rows["input_ids"] = rows["input_ids"].masked_fill(chosen, 103)
    sides = {"KD": beside_kd(), "KD + MaskedLM": beside_kd(MaskedLM), "DistilBERT": lambda: [DistilBERT()]}
    return Group(teacher, student, rows, distill.layer_mapping(teacher, student, "full"), "cls", sides, ())


def convolutions(asked: argparse.Namespace) -> Group:
    teacher, student = (seeded(partial(CNN, sizes), seed) for seed, sizes in enumerate(((64, 128, 128), (32, 64, 64))))
    maps = {Location(module=f"blocks.{block}"): Location(module=f"blocks.{block}") for block in range(3)}
    sides = {
        "KD": beside_kd(),
        "KD + Labels": beside_kd(Labels),
        "DKD": lambda: [DKD()],
        "KD + FitNets": beside_kd(lambda: FitNets({Location(module="blocks.1"): Location(module="blocks.1")})),
        "KD + AT": beside_kd(lambda: AT(maps)),
        "KD + CRD": beside_kd(CRD),
        "KD + ICD": beside_kd(ICD),
        "KD + Sobolev": beside_kd(Sobolev),
        "KD + BSS": beside_kd(lambda: BSS(both=False)),
        "KD + DIITO": beside_kd(lambda: DIITO(positions=None)),
        "KD + DIITO Crossway": beside_kd(lambda: DIITO(distill.Crossway(), positions=None)),
    }
    drawn = torch.Generator().manual_seed(0)
    rows = {
        "pixel_values": torch.rand(asked.rows, 1, 28, 28, generator=drawn),
        "labels": torch.randint(CLASSES, (asked.rows,), generator=drawn),
    }
    mapping = distill.layer_mapping(teacher, student, "full")
    return Group(teacher, student, rows, mapping, "classifier", sides, tuple(sides))


GROUPS = {"bert": classifiers, "cnn": convolutions, "mlm": masked}


def answered(group: Group, count: int, device: torch.device) -> dict[str, Tensor]:
    """Some of the rows, with the labels that the teacher gives them."""
    rows = {name: column[:count] for name, column in group.rows.items()}
    shown = {name: column for name, column in rows.items() if name != "labels"}
    with torch.no_grad():
        given = group.teacher(**{name: column.to(device) for name, column in shown.items()})
    return rows | {"labels": getattr(given, "logits", given).argmax(-1).cpu()}


@contextmanager
def counting(*heads: nn.Module) -> Iterator[list[int]]:
    """How often each of some modules is called."""
    counts = [0] * len(heads)

    def counts_one(number: int) -> Callable[..., None]:
        def add(*_: object) -> None:
            counts[number] += 1

        return add

    handles = [head.register_forward_pre_hook(counts_one(number)) for number, head in enumerate(heads)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def measured(group: Group, asked: argparse.Namespace) -> dict:
    accelerator = Accelerator(cpu=asked.device == "cpu")
    group.teacher.to(accelerator.device).eval()
    records, students = {}, {}
    for name, parts in [*((name, 1) for name in group.sides), *((name, 4) for name in group.parted)]:
        if asked.only and name not in asked.only:
            continue
        shown = name + IN_PARTS * (parts > 1)
        students[shown] = copy.deepcopy(group.student)
        rows = answered(group, asked.batch, accelerator.device) if name == "KD + BSS" else group.rows
        schedule = distill.Schedule(steps=FOREVER, batch_size=asked.batch, lr=1e-9, accumulate=parts)
        records[shown] = distill.steps(
            group.teacher, students[shown], group.mapping, rows, objective=group.sides[name](), schedule=schedule
        )
    clock = time.process_time if accelerator.device.type == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in records}
    runs: dict[str, list[int]] = {}
    for number in range(asked.rounds + 2):
        for name, step in records.items():
            heads = [model.get_submodule(group.head) for model in (group.teacher, students[name])]
            if number == 1:
                with counting(*heads) as runs[name]:
                    next(step)
                continue
            began = clock()
            next(step)
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            if number > 1:
                seconds[name].append(clock() - began)
    for step in records.values():
        step.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = {name: min(values) for name, values in seconds.items()}
    return {
        "median_seconds": {name: round(value, 4) for name, value in medians.items()},
        "ratio_to_KD": {name: round(value / medians["KD"], 3) for name, value in medians.items()},
        "ratio_to_KD_of_fastest": {name: round(value / fastest["KD"], 3) for name, value in fastest.items()},
        "ratio_to_one_part": {
            name: round(medians[name] / medians[name.removesuffix(IN_PARTS)], 3) for name in medians if IN_PARTS in name
        },
        "runs_of_teacher_and_student": runs,
    }


def main() -> None:
    """Measure and append."""
    options = argparse.ArgumentParser()
    options.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    options.add_argument("--only", nargs="+", help="sides by name; KD must be one")
    options.add_argument("--device", default="cpu")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--tokens", type=int, default=48)
    options.add_argument("--rows", type=int, default=8192)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    for name in asked.groups:
        result = {
            "date": str(date.today()),
            "group": name,
            "device": torch.cuda.get_device_name()
            if asked.device == "cuda"
            else f"{platform.machine()} cpu, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "settings": {key: value for key, value in vars(asked).items() if key not in ("groups", "out")},
            **measured(GROUPS[name](asked), asked),
        }
        print(json.dumps(result, indent=1), flush=True)
        with asked.out.open("a") as log:
            log.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
